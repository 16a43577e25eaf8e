// Package registry keeps artifacts: binaries by digest, described once in a sandbox, cut into pages, copied to holders, and known to
// every node by a committed record. A node that needs one fetches verified pages from the holders into its cache and executes what it
// verified. Nothing unverified is ever executed (DESIGN.md §8, §10 G9).
//
// An artifact comes in by Push (command line, deploy of a local file) or by a file in the drop folder. Its os and architecture are read
// from the file's header, its name, version and interfaces from Describe; an executable without our handshake is kept as a program.
//
// Goroutines: Run watches the drop folder. Everything else runs in the caller's.
//
// Limits: MaxFile for one file, MaxFiles for one artifact; one Describe at a time.
package registry
