// Package events carries what happens in the cluster to every member: hierarchical channels ("/apps/shop/store-0"), a bounded history on
// each node's disk, and the last event of each channel kept beyond it.
//
// An event has an identity: the node that published it, that node's boot, and a counter that rises by one. It is pushed to all members
// alive, where they are at most 32; else to three random ones, each of which passes on what was new to it. What a push lost, a comparison
// of what is known of each (node, boot) brings, with one random member every five seconds, and at once where a gap shows.
//
// Publish never blocks: it puts the event into a bounded queue, and what finds it full is dropped and counted (Status). Subscribers get the
// events of one node's boot in order: one that comes early waits until the gap before it is filled, or until nobody can fill it any more
// (gapMost). Events of different nodes have no order but their times, which are those of their nodes' clocks.
//
// Events are a history for people and a hint for programs; they are not synced to disk and are no place for what must not be lost: after a
// crash a node has its own last ones back from the others.
//
// # Goroutines
//
// Run: one that stores and pushes what was published, one that compares, one that calls subscribers. For each member that something is
// being pushed to: one, while there is something.
//
// # Limits
//
// History: Keep events (10,000). Channels with a last event: 4,096. An event: a channel of 256 bytes, a message of 8 KiB, 64 fields; longer
// texts are cut.
package events
