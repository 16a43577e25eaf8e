// Package instance is the two placement problems as files: what they say, how a solution is judged, and a generator of such files.
//
// The group problem (format placement-p1/1) is Rhizoma's: choose a group of nodes that form an overlay, each eligible, balanced over
// regions, within a diameter, near to anchors. The assignment problem (placement-p2/1) places the replicas of several components that
// call each other. Both maximise a utility less a cost.
//
// Reading is strict: an unknown or repeated field, a number that is not finite, negative where it must not be, or out of range is an
// error with file:line:column. Evaluate is written plainly, from scratch and apart from the solvers, so that it can judge them.
//
// Latencies are integers in units of the instance, so that sums and comparisons are exact.
//
// Goroutines: none. Limits: MaxNodes, MaxReplicas, maxFile.
package instance
