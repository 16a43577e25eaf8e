// Package demo is `coppice demo`: a whole cluster on this machine, two real applications, a load that keeps a ledger, and fifteen steps that
// break and change things. Every figure it prints was measured in that run, and every step has conditions: when one does not hold the demo
// fails and says which.
//
// It uses a cluster as any operator does: by the binary's own commands and the control API. It is no test of parts.
//
// # Goroutines
//
// In steps that wait for two things at once, one that ends with the step.
//
// # Limits
//
// Linux. Without network namespaces the cluster runs on loopback, where no link can be cut: that step then suspends the node instead and
// says so.
package demo
