// Package members keeps every node's full view of the cluster, and notices within milliseconds when a process dies and within two
// seconds (profile lan) when a machine goes silent (DESIGN §3, Members and Watchers).
//
// What a node says of itself (Info) is ordered by (StartedUnixMs, Boot, Counter), which only that node raises. A Verdict (dead, left)
// ends an Info up to a version; the node refutes a false one with a greater Counter, and a new Boot ends the old one by definition.
// Changes are pushed: urgent ones (a birth, a death, a goodbye, a refutation) directly to this node's partners, then everything from each
// receiver to a few of its own, in batches. Partners are all members where there are at most 64 others; where there are more a node chooses
// 32 at random and takes in those that chose it, up to 64, so that what it keeps up does not grow with the cluster. An exchange of digests
// with one random member every 10 s, and soon after urgent news, carries what was lost.
//
// Each node pushes heartbeats to its watchers, the k members closest to it in the key space (at most half of them of one zone while
// there are others). Evidence, strongest first: a closed connection and a refused dial (dead at once); a goodbye (left); silence,
// which makes a suspect, and dead when two agree, or all that can be asked when there are fewer. Any byte received on the watch stream is
// life. A node that was itself late (its 100 ms tick ran over 200 ms behind within 5 s) waits longer and does not vote. What another node
// reports is believed when it is proof or when most of the subject's watchers agree; else it only makes this node look for itself. So a
// node that was cut off and returns does not get the others declared dead.
//
// It is not a source of safety: two nodes may see different views for a while, and a false death costs a restart, never a doubled
// commit (dht/arbiter fences). Who is a member is not decided here either: Admit and Expel carry out committed records.
//
// # Goroutines
//
// Run starts the loop (a 100 ms tick: own delay, silences, redials, gossip, saving) and the deliverer of changes. One goroutine for
// each of this node's watchers and one for its answers; one per incoming watch stream (the host's); one per peer with unsent
// pushes; one per inquiry into a silent node and two per question it asks (at most 32 inquiries at once); one per redial (at most 32).
// All of them end before Run returns, apart from the host's, which end with their streams.
//
// # Limits
//
// See limits.go. The view holds whoever was admitted and not revoked, 0.4 KiB each besides what the node says of itself: as many as the arbiter has registers of
// members. Strangers are at most maxUnknown. Of the lost those that were seen last are looked for, keepTail of them, each every five minutes at the least.
package members
