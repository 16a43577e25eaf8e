// Package sim runs the real protocol code of a cluster against faults drawn from a seed, thousands of times, and asserts what must hold
// at every moment and what must come back when the faults are over. docs/testing.md says how it works and how a seed is replayed.
//
// Everything is in its tests. A schedule is one cluster in a testing/synctest bubble: time is virtual, the network is peers.Net with
// resets and refusals, disks are Pebble's in-memory file system that forgets what was not synced, and clocks run at rates within 1 % of
// each other and stand still while their node is stopped. Faults, sizes and operations come from the seed alone; what the seed does not
// decide is the order of goroutines that are ready at the same virtual time, so a replay is close to what failed and not always the same.
//
// What a simulated node cannot show: a process that stands still in the middle of a function (its goroutines go on here, cut off from
// network and clock), real sockets, real disks, and the memory of real processes. internal/e2e and internal/demo show those.
package sim
