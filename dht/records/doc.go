// Package records keeps small signed values under keys, replicated on the members closest to each key: facts, mirrors of committed
// registers, checkpoint indexes.
//
// A record is a libp2p envelope, signed by its writer, around {key, version, writer, ttl, deleted, value}; it is stored in kad-dht's own
// datastore, under kad-dht's own keys and in its own format, so that a stock kad-dht client with the cluster's prefix and Validator
// finds it by GetValue. Keys start with "/kb/" (see Validator for who may write what). Records of a key are totally ordered by
// (incarnation, epoch, revision, writer), and a lower one never replaces a higher one, whoever brings it: kad-dht's writes go through
// Datastore, ours through the same place behind it.
//
// Put goes in one hop to the r members closest to the key (5, or 3 where fewer than 5 are alive) and counts acknowledgements; it wants
// W = floor(min(r, alive)/2)+1 and asks the next closest for each that fails. Get asks the r closest at once and returns the newest of
// what a majority says, with how many of them had it. Records that never expire are on disk before they are acknowledged; those with a
// TTL are not synced, as their writer repeats them.
//
// # Views
//
// The closest are found by arithmetic over the view. A view may be capped (Cap): it then knows the node's neighbourhood in the key space and a few
// members elsewhere, is sure of the keys in that neighbourhood, which are those that the node holds, and for all others Config.Route
// looks the closest up, which costs hops. What a lookup said is used for writes within a round of anti-entropy; the keeper looks those
// up again that the node holds without being sure of the other holders. What nobody found is not offered, compared or dropped, and a Put or Get
// that needs it fails. Local, Subscribe and what is stored never depend on a lookup.
//
// # Age
//
// No two clocks are compared. A holder counts from when the record arrived, plus the age that its sender told: nothing from the writer,
// what it had counted itself from a holder that repairs. So an age never counts the time on the wire and is otherwise a lower bound; of
// several holders the reader believes the highest. A record that came by kad-dht's own PUT_VALUE starts at zero, as that says no age.
// The time to live is measured against this age, by each holder. Over a restart the holder's own wall clock fills the gap.
//
// # Repair
//
// Readers write the newest back to holders that lack it. When the view changes, the first old holder of a key offers it to the new
// ones. Every 30 s a node compares sums over 64 ranges of the key space with two of those it shares keys with. What a node holds
// without being among the closest is offered to them and dropped when all of them have it; its own keys stay. A deletion is a record
// too (a tombstone) and is kept for seven days, as long as a lost member is looked for.
//
// # What it is not
//
// No consensus: two readers may see different records for a while, and a Put that fails may have reached some holders. What must be
// certain belongs to the arbiter. No large values: 16 KiB with the envelope.
//
// # Goroutines
//
// Run: expiry, anti-entropy and repair (one), subscribers (one), until its context ends. For each Put, Get and Scan: one per peer asked, each
// bounded by AttemptTimeout; they may outlive the call. Lookups: at most 8 for a call or the keeper, which waits for them.
package records
