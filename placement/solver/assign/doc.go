// Package assign places the replicas of components that call each other: the assignment problem, as instance.Assignment states it.
//
// The search: what runs stays where it may, the most demanding of the rest goes where it wins most (a node that is not used yet counts
// with the part of its price that is taken), others make room where nothing fits. Then annealing: a replica goes elsewhere, two change
// places or one makes room for the other, all of a node goes to another node or is spread over the used ones. A step is evaluated by what
// it changes. Capacity, separation, limits a node and a region, and quarantine hold all the time; calls that are too far and missing
// regions may be crossed on the way. Where that is affordable all placements are gone through at the end, less what cannot be better.
//
// The bound counts each replica on its best node, with the part of the node's price that it takes at least and each of its calls to the
// nearest node that may host what is called; so it is sound and, where nodes are scarce, generous.
//
// With Options.Steps the same problem and seed give the same placement. With a deadline only, the search cools by the clock and does not.
// What runs is never left for something worse: the first placement looked at is the current one, completed. With Options.Repair it is the
// last as well, and nothing is moved that may stay, unless something else has no place otherwise.
//
// Goroutines: none. Limits: instance.MaxNodes, instance.MaxReplicas. Memory grows with nodes + replicas + components × regions + bindings ×
// nodes, the latter for the bound.
package assign
