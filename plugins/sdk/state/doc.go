// Package state is the durable heart of a component: an ordered map whose every change is one transaction, remembered together with the reply it
// gave, in a journal that a node copies elsewhere.
//
// # What it is
//
// A Store holds one immutable version after another. A version is the map, the replies that may be asked for again (the dedupe table) and the number
// of its last journal entry, the mark. A write transaction works on a copy-on-write clone and becomes the next version in one step, or leaves no
// trace; readers and checkpoints hold on to the version they started with and never stop a writer.
//
// Everything in a version, the dedupe table included, is written into checkpoints and journal entries: whoever restores them answers a repeated call
// from the table like the one that executed it. The encoding is in package statev1.
//
// # What it is not
//
// No disk and no network: durability is the node's work (it follows the journal and releases a reply when the reply's mark is committed). The state
// lives in memory and is as large as memory allows.
//
// # Isolation
//
// Serializable. Write transactions run one at a time, from their first access to their end; read-only ones see one version.
//
// # Exactly once
//
// A call with a key is admitted once: a second one with the same key waits for the first and then gets its reply; a later one gets the remembered
// reply. Keys "<caller>/<n>" are remembered until the caller says, by its low-water mark, that it will not ask again (or has been silent for
// CallerAge); any other key until it was not seen for KeyAge. A table that is full refuses new keyed calls rather than forgetting. Age is measured by
// this process and starts anew with a restore, so a restore can only remember longer.
//
// # Goroutines
//
// None of its own. All methods of Store may be called from any goroutine.
//
// # Limits
//
// See Limits; the journal keeps at most Limits.JournalBytes of entries for those who come back, and a follower that does not read makes new writes be
// refused (ErrBacklog) once Limits.BacklogBytes of entries wait for it: entries are never dropped under a follower.
package state
