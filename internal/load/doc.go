// Package load is a load generator that can be believed: it runs in a process of its own, sends at a rate it does not lower when answers are
// late, writes down every answer, and at the end reads everything back and says what is missing and what is there twice.
//
// Clients of three kinds write and read: of the bookshop through the gateways' web pages, of the bookshop's store through the control API
// (whose answers name the node that gave them), and of the key-value component. Each client is sequential and has a rate; a call that is late
// does not delay the intended times of the next ones, and latency counts from the intended time. Every write carries an idempotency key
// "<client>/<n>" and is repeated with that same key, at another gateway each time, until it is answered or its deadline has passed. What was
// not answered in time is in doubt: it may be there once, or not at all.
//
// What a client does follows from the seed and its number alone; when it does it does not.
//
// It is not a benchmark by itself (internal/bench) and knows nothing of the nodes but their addresses.
//
// # Goroutines
//
// One per client, one that writes the ledger out, all of them within Runner. Serve answers commands one after the other.
//
// # Limits
//
// A sample of 40 bytes is kept for each call; the ledger is a file.
package load
