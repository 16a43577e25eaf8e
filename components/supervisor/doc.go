// Package supervisor turns this node's ownership into running instances. It looks at the arbiter's registers and the desired state and
// makes the processes on this node agree with them: it starts what the node owns, restores its state, keeps that state durable, replaces
// it (restart, swap, move, failover: one transaction, Replace), and ends what another node owns now.
//
// It is level-triggered: nothing is remembered in a control flow. Each instance has one actor that compares what should be with what is
// and takes one step; a change of a register, of the desired state, a member's death, a process's end or a command wakes it.
//
// What must be certain is left to the arbiter: an epoch is taken by a claim, a checkpoint is a restore point once it is committed, and
// whatever this node believes meanwhile costs at most a refused command.
//
// Two things it decides without the arbiter. What is exactly-one runs only under a lease that the arbiter's leader acknowledged, and is ended before
// that ends (session.go). What keeps (on_partition) goes on without the arbiter as a branch, which is committed or reconciled afterwards (branch.go,
// reconcile.go).
//
// # Goroutines
//
// Run: one loop that hands changes to actors; the keeper of the node's lease, the renewer of instances' leases, the watch over their ends, and the
// reconciler of branches, and the keeper of pages that are wanted here ahead of their need. One actor for each instance this node owns or prepares; two for each standby that it keeps. For each running instance: its
// saver (commits), the keepers of its copies and of its history and, with each-call, one reader of its journal; a compaction now and then. For each death of a node: one per instance
// it owned, until someone has claimed it.
//
// # Limits
//
// One replace at a time per instance; a chain of 256 deltas between bases, more where the base is large; 30 s for a take-over; back-off 100 ms to 30 s
// between starts of an instance that fails.
package supervisor
