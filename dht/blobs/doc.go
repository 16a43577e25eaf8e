// Package blobs keeps and moves content-addressed nodes: pages of states and artifacts, trees over them, deltas chained to the state
// they change. A Node is named by the SHA-256 of its encoding, links to others, and is complete when everything below it is here.
//
// What it promises:
//
//   - Put, PutPush and WriteStream return after the fsync; concurrent ones share it.
//   - A member acknowledges a root to another only when the root and everything below it are present and on its disk.
//   - What is read is verified. A page that does not match its name is a *CorruptError, is removed, and its ancestors are no longer
//     complete; the store then fetches it again from another member. Everything is read once a day, slowly, whether anybody asks for it or not.
//   - Completeness is kept on disk, so the next node of a chain of any length costs one look at its predecessor.
//   - The collector removes only what no live root, pin or young node reaches. A have-answer, a Put and an acknowledgement pin for ten
//     minutes; a restore pins by name for as long as it renews. After a start nothing is collected for ten minutes, as pins are kept
//     in memory only.
//
// What it is not: it does not choose holders, repair their number, or know what a root means. It is not a file system, and it gives
// no secrecy: every member may ask for every node.
//
// # Moving nodes
//
// Between two members runs one stream for small urgent pushes, one for bulk and one for fetching (protocol /coppice/blob/1). A push
// sends the root with those small nodes below it that the peer is not known to have: one message, one round trip, acknowledged after
// the fsync. WriteStreamTo brings the pages of a stream to peers while it is written, which are asked about each MiB what they have of it; the push of
// the root then finds most of it there. Where the peer says that something is missing, or there is too much to guess, it is asked what it has, in windows that
// grow, and the missing nodes follow in frames of 64 KiB. Fetch asks several holders at once and gives what one lacks to another.
//
// # Goroutines
//
// Run: the collector, the repairs and the scrubber, until its context ends. For each stream opened to a peer: one reader. For each stream a peer
// opened: one reader and one that answers. For each Push: one per peer, at most MaxInflight for a peer; those of slow peers outlive
// the call and end with the store. For each stream that travels: two per peer, which end at the latest when what they write has timed out. Close ends all of them.
//
// # Limits
//
// A node: 1 MiB of data, 16,384 links, 64 bytes of kind. A frame: 8 MiB.
package blobs
