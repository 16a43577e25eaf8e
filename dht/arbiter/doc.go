// Package arbiter is the one group that decides: a Raft group (hashicorp/raft) whose voters are the 1, 2, 3 or 5 eligible members closest
// to PlacementKey by the overlay's metric. It keeps generic registers with an owner, an epoch, a checkpoint and a body, and carries out
// claims, commits and transactions on them. What a key means is the business of whoever uses it.
//
// It is not a scheduler, and no data goes through it: roots and holders, not pages. Its machine knows no clocks; the leases that its leader
// acknowledges (lease.go) and what the rule of two nodes goes by are in memory. It does not decide who is dead (dht/members does), and does not by
// itself recover a group that has lost most of its voters.
//
// # Who does what
//
// Every node can call everything. Commands are gathered per node, one log entry at a time, and carried to the leader; an answer that did
// not come is in doubt and the same entry goes out again, so every command is made to be recognised when it comes twice: a claim by its
// nonce, a commit by (epoch, nonce, seq), a transaction by its nonce in a bounded table, and what creates or overwrites by the log index
// that its proposer knew (TOO_OLD otherwise). Voters and learners show their own machine as the local view; other nodes follow the feed
// of a voter. Reads through Read ask the leader, which confirms with fresh heartbeats that it leads.
//
// The keeper, at the leader, changes the group one server at a time. The coordinator, the closest eligible voter, is a committed value,
// and leadership is handed to it. When the leader is proven dead the closest surviving voter stands for election at once.
//
// # Incarnations
//
// The group has lives, numbered. A node goes on without the others' consent in two cases only, each time as the only voter of the next
// incarnation: as the last of two, by the rule of two nodes (two.go), and by Recover, which an operator asks for. On contact the higher
// incarnation wins: the node of the lower one exports what it holds to LostFound, empties its raft database and is brought in again. Raft
// streams begin with the incarnations of both ends and are refused where they differ; calls and feeds carry it. Between two incarnations
// raft is shut down and started again, while the Arbiter and its callers live on (life.go).
//
// # Rules held
//
// Epochs of a register are unique and rise by one per claim, also beyond its deletion (I1). A commit counts only in the current epoch,
// with the next seq, and at least W distinct holders (I2). An entry of an unknown format, command or field stops apply, snapshots and
// votes of the node for good, visibly in Status (never skipped). A node whose disk was emptied, copied or rolled back is refused
// (ErrRolledBack); it joins with a new identity (package node). Nothing of a lower incarnation is accepted once a higher one was met; that it was met is on disk first (I8). While the rule
// of two nodes holds no vote changes (I7). Raft's TrailingLogs keeps its default: with a small one a follower can be sent an older snapshot
// than it has, which the library installs; the transport keeps such snapshots from it as well (transport.go).
//
// # Goroutines
//
// Run starts: the feed's follower, the propose loop, and, once the disk is vouched for, raft itself, the observer of raft, the keeper,
// the teller of commits, the mirror, the watch over the other of two nodes with its beat, and the transport's forwarder; those anew in each
// incarnation. Besides: one per accepted raft stream, per pipeline, per call and feed served (two), per round of linearizable reads, per
// commit notice and probe under way. All end with Run or Close.
//
// # Limits
//
// MaxKey, MaxBody, MaxHolders, MaxOps; entries of 4 MiB; 65,536 commands waiting on a node; 4,096 feeds served; all registers in memory,
// about 300 B each besides their bodies. A node outside of the group keeps a copy of what it shows on disk, a second behind that at most (recall.go). A shard
// number, always 0, stands in every entry, snapshot, call, feed and raft stream (shard.go).
package arbiter
