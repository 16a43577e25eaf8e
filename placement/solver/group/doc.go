// Package group chooses the nodes of one overlay: Rhizoma's problem, as instance.Group states it.
//
// For a fixed size the objective is a sum over the members plus two decreasing functions of bottlenecks: how far the worst served anchor
// is from its nearest member (the radius), and the longest of the shortest paths inside the group (the diameter). Two searches follow
// each other:
//
//   - local search: the current group repaired, or a greedy one; then the best of all adds, removals and swaps until none wins, and
//     again from disturbed groups. Adding a node to a group of which the distances are known costs the square of its size.
//   - branch and bound over boxes (size × interval of the radius × interval of the diameter), best bound first. In a box the radius and
//     diameter count with their lower ends, a node is a candidate while a group with it could still win, and two nodes fit together
//     while the shortest path over all candidates is within the box. Boxes are split where they are most slack; in a narrow one a
//     depth-first search chooses members, the hardest anchor first.
//
// The result says the best group found, a bound that no group exceeds, and whether the two met (Proven): then no group is better by more
// than Tolerance.
//
// The order of work does not depend on time, only its end does: with a context that does not end, the same problem and seed give the
// same result; otherwise a prefix of the same work.
//
// Goroutines: none. Limits: instance.MaxNodes; memory grows with the square of the candidates, of which branch and bound takes at most
// maxCandidates.
package group
