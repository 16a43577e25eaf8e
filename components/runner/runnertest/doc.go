// Package runnertest is a component for tests of what lies round components: a counter that keeps its state and its answers in memory,
// with switches to misbehave in every way that a process can. A test binary becomes it by calling Main first in TestMain, and starts
// itself: no build, no file. It speaks the contract without the SDK, so that both are tested against the contract and not against
// each other. It is not an example to follow (plugins/counter is).
//
// Goroutines: those of its gRPC server, in the component's process only.
package runnertest
