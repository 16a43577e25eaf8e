// Package placement is the coordinator's loop: it turns desired state and facts into a snapshot, has a solver propose a plan, and carries
// the plan out with claims, moves and named successors.
//
// It is level-triggered and idempotent. Each round looks at everything again: who should exist (components.Expected), who owns what in
// which epoch, which nodes live. What a round started and did not finish is in flight and left alone; what it could not start, the next
// round starts. A coordinator may die at any line: the next one looks at the same records. Two coordinators at once do no harm: each
// effect is a compare-and-set on an epoch, done by the Proposer.
//
// The solver is a component like any other (system/placement), in a process of its own. When it hangs, crashes or answers nonsense, the
// round is skipped, and Status, the Recorder and the next rounds say so; failover goes on, since successors are named in advance. A plan
// that breaks hard constraints is not carried out, whoever proposed it. The components of the application system are not placed by the
// solver: the coordinator's rule puts them on the coordinator's node, so that the solver itself can be started without a solver.
//
// A dead owner's instances belong to their successors first. Only what nobody has claimed after ClaimDelay is claimed by placement.
//
// It is not the scheduler's mind (placement/solver is), starts no process and stores nothing but what the coordinator remembers of its
// own time in office: since when it has seen each epoch, where instances failed, and the last decision. That memory is lost with the
// coordinator, on the safe side: nothing counts as settled for the next one.
//
// Snapshot and Decide are pure; Coordinator is the shell.
//
// Goroutines: Run is one, with one select. Each action that is carried out is one more (at most MaxInFlight), and each call of the
// solver one; Run waits for all of them before it returns. Plan runs in its caller's.
package placement
