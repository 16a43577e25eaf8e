// Package e2e holds the end-to-end tests: real coppice processes over real sockets on loopback, driven by the real command line and by the
// control API, broken by real signals. Each test asserts what a user relies on; docs/guarantees.md names them.
//
// There is no code here but tests. What starts and breaks the processes is in internal/cluster, what sends the load and keeps the ledger in
// internal/load.
//
// The binaries are those of internal/cluster/clustertest, and some that misbehave on purpose. Tests named TestLong… run with COPPICE_LONG=1 only.
// A failed test shows the ends of the nodes' logs and keeps its folder.
//
// # Limits
//
// Linux. A test ends only processes that it started.
package e2e
