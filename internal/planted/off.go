//go:build !planted

package planted

// Bug says whether a bug is switched on: never, in this build.
func Bug(string) bool { return false }
