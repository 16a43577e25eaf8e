// Package nemesis has only tests: real nodes, real sockets and real disks under faults drawn from a seed, while clients write down what they
// are answered. At the end the histories must be linearizable and no answered effect missing or there twice.
//
// Two components with durable: each-call are under test: kv as a set of registers, whose history is checked by porcupine, and bank, whose sum
// never changes and whose balances follow from the answered transfers. Each call carries an idempotency key and is repeated, at any node,
// until it is answered; what is never answered counts as in doubt for good.
//
// The faults, by name: kill (any node), kill-leader, kill-owner, kill-half, pause (SIGSTOP of a node and what it runs), pause-component,
// crash-component, cut, flap (a link that comes and goes), one-way (a node that hears some others no more), reset (live connections are reset),
// terminate (SIGTERM), roll (one node after the other), starve (other processes take the CPU), wipe (a node loses its disk and comes as a new
// one), bridge (two halves that meet at one node only), and those of the machine: full-disk, slow-disk, failing-log and failing-disk (fsync fails),
// roll-back (an old copy of the data folder is put back: the node gets a new identity), clocks (the wall clock jumps by hours), boot-1970. The nodes' binary is built with the tag
// harm for some of them (internal/harm). A power loss, which takes what was not synced, is the business of internal/sim.
//
// Besides, TestLongCycles kills a thousand times (COPPICE_CYCLES): nodes and components, also in the middle of a checkpoint, a swap, a move or a repair; TestCycles is
// its short form.
//
// COPPICE_FAULTS names the faults of TestNemesis. COPPICE_SEED replays a run's choices, as far as timing lets it; COPPICE_NEMESIS says for how long the long run goes on (60m when not set).
package nemesis
