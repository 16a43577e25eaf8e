// Package store is the node's one database: Pebble on an injected file system, shared by everything that keeps small durable
// things (records, the index of pages, events, kad-dht's values). It opens the database with limits fit for an idle node of a few
// dozen MiB, reports what Pebble finds in the background, and watches the disk so that a node stops taking on duties before the
// disk is full instead of dying with it.
//
// It is not a place for payload (pages lie beside it as files) and not the Raft log (a second, separate Store).
//
// # Who owns which keys
//
// The key space is shared. Datastore(prefix) owns "ds/<prefix>/…"; a package that writes through DB() itself owns one prefix of its
// own that ends in "/" and is not "ds/". Nobody touches another's prefix.
//
// # Durability
//
// Writes through Datastore are synced before they return unless NoSync was asked for. Writes through DB() say so themselves
// (pebble.Sync). A write that Pebble cannot make durable is never acknowledged: see Fatal below.
//
// # Full disk
//
// The watch reads the free space every Every. Below Low the store reports Low()==true and calls OnLow(true): the node leaves the
// voters and the holders. Below Critical, or at the first ENOSPC, the ballast file is removed, which leaves Pebble room for the
// commits and compactions of that retreat, and FS gives the same to whoever else writes to that disk. Above Resume everything is undone, the ballast first.
//
// # Fatal
//
// Pebble's commit pipeline cannot go on after a failed commit. It calls Logger.Fatalf, which must not return, since the caller would
// take the write for done. The store logs, calls OnFatal, and ends the goroutine without acknowledging (Goexit); without an OnFatal it
// ends the process with status 1. The locks that the goroutine held stay held: whoever needs one waits for ever, so the node must not wait for
// everybody when it ends.
//
// # Goroutines
//
// One: the disk watch, from Open to Close. Pebble has its own (flush, compaction, WAL, on a real disk a health check).
package store
