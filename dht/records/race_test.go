//go:build race

package records_test

// The race detector makes simulations ten times slower and finds what it finds in smaller ones too.
func init() { slowRun = true }
