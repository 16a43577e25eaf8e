// Package cluster runs whole clusters of real processes on one machine, and breaks them: the demo, the benchmarks and the end-to-end tests
// share it. Each node is a `coppice up` process, in a network namespace of its own where that is permitted, else on loopback.
//
// The namespaces have no names: they vanish with the processes in them, whatever happens. One of them, the hub, holds a bridge to which
// every node is linked; what talks to the nodes as the outside world (the load generator) runs in it. The machine's own network gets no
// interface.
//
// The process that uses it becomes the reaper of what its nodes leave behind (PR_SET_CHILD_SUBREAPER): a component whose node was killed
// is found and ended, and nothing else is.
//
// # Goroutines
//
// Two per started node: one reads its standard output, one waits for its end.
//
// # Limits
//
// Linux only. At most 250 nodes.
package cluster
