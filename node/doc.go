// Package node assembles a node: it opens the data folder, joins the overlay, and connects the parts to each other. The order is in New
// and Run; what the parts do is in their packages. The control API's verbs are here too (verbs_*.go), because a verb is mostly a question
// to several parts.
//
// # Goroutines
//
// Run starts one for each part (members, arbiter, blobs, records, events, registry, supervisor, placement), one each for the reports of
// facts and the checkpoint index, one for each listener, and ends all of them before it returns.
package node
