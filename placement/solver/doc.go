// Package solver decides where instances run: a pure function from a snapshot of desired state and facts to a plan with its explanation.
//
// Hard constraints come first: a node that may receive (alive, not draining, not quarantined, not of role voter), the artifact's
// platform, capacity with all instances counted, CEL constraints over a node and over the instances together, nodes an instance failed on, an
// operator's pin, spread, near, together, apart, max_diameter, light_load, budget. Then the objective is maximised: the mean utility of the instances, each in (0,1), less the cost of the moves. An instance that already runs
// somewhere acceptable is moved only when that wins more than the move costs, when it has settled, and within the moves of one round.
//
// Utility of an instance on a node: the weighted mean of its objective's terms, each the bounded deviation of a value from the worse to
// the better end of its range. Without an objective: load per core, free memory, and how few instances share the node, so that
// instances spread out.
//
// Cost of moves: the policy's (or the application's) cost a move and a MiB of state that the target does not hold, as in Rhizoma. It is
// meant for a plan of CostScale instances and scaled with their number, so that what a move has to win for its own instance is the same
// in any cluster (with 0.012: about 0.1 of its utility): a mean over many hardly changes by one of them, a mean over one by any noise.
//
// Search: the current plan repaired and completed greedily, the most constrained first. Then, by the engine of package assign, all plans are
// gone through where there are few: what comes of that is optimal, and the plan says so. Else annealing: relocations, exchanges, and where the moves of a round
// are used up one goes home for another, each evaluated by what it changes. The plan is never worse than the current one: never more instances without an
// acceptable node, and with as many never a lower objective. The bound that no plan exceeds counts each instance on its best node, alone there, and of those that
// would have to move as many as may, those that win most.
//
// The length of a search is counted in steps, never in time: the same request gives the same plan, byte for byte, on any machine. What is random comes
// from the snapshot's seed.
//
// It is not the coordinator: it claims nothing, knows no clock, and keeps nothing between calls.
//
// Goroutines: none. Limits: MaxNodes, MaxInstances.
package solver
