// Package bench is `coppice bench`: what the platform promises in time, measured on this machine with real processes, each beside a baseline
// from the same run where there is one. Figures of different machines, or of a busy one, do not compare; ratios do.
//
// Under every benchmark that breaks or replaces something runs a load that keeps a ledger: a figure counts only when nothing that was
// answered was lost or doubled, else the benchmark fails.
//
// Placement is apart: it runs the solvers of placement/solver/group and assign on instances from files or drawn, and judges what they say.
//
// # Goroutines
//
// None of its own; see internal/cluster and internal/load.
//
// # Limits
//
// Linux only.
package bench
