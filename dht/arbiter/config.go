package arbiter

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
)

// Member is what the arbiter needs to know about a member of the view.
type Member struct {
	ID       peer.ID
	Boot     uint64 // of its process; 0: unknown. Another one means that the process before is gone
	Alive    bool
	Dead     bool          // confirmed dead, left, or expelled; neither Alive nor Dead: suspect
	For      time.Duration // how long it has been in this state, as this node saw it
	Zone     string        // "": unknown
	Role     string        // full (or ""), voter, worker
	NoVoter  bool
	Draining bool
	Left     bool   // it said goodbye; it is Dead, too
	Format   uint32 // highest format of entries that it knows; 0: as old as can be
}

// Members is the view of the cluster.
type Members interface {
	// List returns all members, this node included.
	List() []Member
	// Subscribe calls f when a member's state changes. f must not block.
	Subscribe(f func(old, new Member)) (cancel func())
}

// Config is what an Arbiter is made of. All fields without a default named here must be set.
type Config struct {
	Self    peer.ID
	Boot    uint64 // random per process start
	Peers   peers.Peers
	Links   peers.Links // optional: evidence about the leader's link besides the members' view
	Members Members
	FS      vfs.FS
	Dir     string // of the raft database; made when missing
	Profile string // lan (default), local, wan
	Timings Timings
	// Rand draws nonces. It is called by several goroutines.
	Rand func() uint64
	Log  *slog.Logger // default: slog.Default
	// BootTime is a clock that counts time asleep, too (CLOCK_BOOTTIME); ages are measured with it. Default: the monotonic clock.
	BootTime func() time.Duration
	// Mirror is told, at the leader, about committed claims, puts, releases and deletes (not pure checkpoints), ordered by (Incarnation,
	// Index), at most once in Timings.Mirror. It may be told twice about a change. It may block: what happens meanwhile is gathered.
	Mirror func([]Register)
	// Leased says whether the owner of a register runs under a lease (Lease), by the register's key and body; it may change from epoch to epoch
	// only. Default: none is.
	Leased func(key string, body []byte) bool
	// Expelled says whether a member was expelled for good. The members' view forgets such a one, so the keeper asks: as a voter it is dead, at once.
	// It must not block. Default: none is.
	Expelled func(peer.ID) bool
	// AuditLeases is told, in order, what this node decides about leases while it leads. It must not block, nor call back. May be nil.
	AuditLeases func(LeaseStep)
	// Format is the highest format of entries that this node knows. Default: MaxFormat; another one in tests of mixed versions.
	Format uint32
	// MaxVoters is 1, 3, 5 (default) or 7.
	MaxVoters int
	// Turned is told after this node has gone on in the next incarnation, alone (file ""), or has given up what it held of a lower one, which
	// is in file now. It must not block.
	Turned func(incarnation uint64, file, why string)
	// Halted is told when this node has stopped applying and voting for good: its database failed, or it met what it does not know. The members
	// should hear of it (NoVoter), so that another one votes in its place. It must not block.
	Halted func(error)
	// LostFound is the folder into which a node writes what it held of an incarnation that a higher one superseded. Default: lost+found
	// beside Dir.
	LostFound string
}

// Timings are the durations of the arbiter. A zero field takes the profile's value.
type Timings struct {
	Heartbeat     time.Duration // without a word of the leader for so long, a voter stands for election: 1 s lan, 5 s wan
	Idle          time.Duration // raft's CommitTimeout, between appends of an idle leader: 1 s lan, 5 s wan
	RPC           time.Duration // of one exchange between voters or with the leader: 1 s lan, 4 s wan
	Keeper        time.Duration // between looks of the keeper: 500 ms
	DeadFor       time.Duration // a voter is replaced when it was confirmed dead for so long: 1 s
	Unknown       time.Duration // a voter that no view names counts as dead after so long: 30 s
	Settle        time.Duration // a newcomer may vote when it has been up for so long, or nobody has: 60 s
	Swap          time.Duration // between voter changes for distance's sake: 10 min
	Transfer      time.Duration // between hand-overs of a healthy leader: 10 min
	Stagger       time.Duration // between the voters' elections after a proven death: 50 ms lan, 250 ms wan
	FeedCoalesce  time.Duration // pure checkpoints of a key go to followers once in so long: 1 s
	FeedKeepalive time.Duration // of an idle feed: 1 s lan, 2.5 s wan
	Mirror        time.Duration // between batches to Mirror: 50 ms
	Alone         time.Duration // the primary of two nodes goes on alone after so long without the other: 3 s lan, 10 s wan
	Verify        time.Duration // how long a restarted voter waits for others to vouch for its disk: 1 s lan, 4 s wan
	Lease         time.Duration // of a leased register's owner, from when it asked; the same on all nodes: 3 s lan, 6 s wan
	Snapshot      time.Duration // between looks whether the log needs a snapshot: 30 s
	SnapshotAfter uint64        // entries: 8192
}

func profile(name string) (Timings, error) {
	t := Timings{
		Heartbeat: time.Second, Idle: time.Second, RPC: time.Second, Keeper: 500 * time.Millisecond, DeadFor: time.Second,
		Unknown: 30 * time.Second, Settle: time.Minute, Swap: 10 * time.Minute, Transfer: 10 * time.Minute, Stagger: 50 * time.Millisecond,
		FeedCoalesce: time.Second, FeedKeepalive: time.Second, Mirror: 50 * time.Millisecond, Verify: time.Second,
		Alone: 3 * time.Second, Lease: 3 * time.Second, Snapshot: 30 * time.Second, SnapshotAfter: 8192,
	}
	switch name {
	case "", "lan", "local":
		return t, nil
	case "wan":
		t.Heartbeat, t.Idle, t.RPC = 5*time.Second, 5*time.Second, 4*time.Second
		t.Stagger, t.FeedKeepalive, t.Verify = 250*time.Millisecond, 2500*time.Millisecond, 4*time.Second
		t.Lease = 6 * time.Second
		t.Alone = 10 * time.Second
		return t, nil
	}
	return t, fmt.Errorf("profile %q; lan, wan and local are known", name)
}

// Unheard is how long a healthy node hears nothing of the leader at most, messages' own time apart: a voter hears its heartbeats every half of
// Timings.Heartbeat (see leaderPace), and tells its followers what it knows every FeedKeepalive.
func Unheard(name string) (time.Duration, error) {
	t, err := profile(name)
	return t.Heartbeat/2 + t.FeedKeepalive, err
}

// or fills t's zero fields from d.
func (t Timings) or(d Timings) Timings {
	for _, f := range []struct{ to, from *time.Duration }{
		{&t.Heartbeat, &d.Heartbeat},
		{&t.Idle, &d.Idle},
		{&t.RPC, &d.RPC},
		{&t.Keeper, &d.Keeper},
		{&t.DeadFor, &d.DeadFor},
		{&t.Unknown, &d.Unknown},
		{&t.Settle, &d.Settle},
		{&t.Swap, &d.Swap},
		{&t.Transfer, &d.Transfer},
		{&t.Stagger, &d.Stagger},
		{&t.FeedCoalesce, &d.FeedCoalesce},
		{&t.FeedKeepalive, &d.FeedKeepalive},
		{&t.Mirror, &d.Mirror},
		{&t.Alone, &d.Alone},
		{&t.Verify, &d.Verify},
		{&t.Lease, &d.Lease},
		{&t.Snapshot, &d.Snapshot},
	} {
		if *f.to == 0 {
			*f.to = *f.from
		}
	}
	if t.SnapshotAfter == 0 {
		t.SnapshotAfter = d.SnapshotAfter
	}
	return t
}

// complete checks the configuration and fills in defaults.
func (c Config) complete() (Config, error) {
	base, err := profile(c.Profile)
	c.Timings = c.Timings.or(base)
	missing := func(what string, is bool) {
		if is {
			err = errors.Join(err, fmt.Errorf("%s is not set", what))
		}
	}
	missing("Self", c.Self == "")
	missing("Boot", c.Boot == 0)
	missing("Peers", c.Peers == nil)
	missing("Members", c.Members == nil)
	missing("FS", c.FS == nil)
	missing("Dir", c.Dir == "")
	missing("Rand", c.Rand == nil)
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.BootTime == nil {
		begun := time.Now()
		c.BootTime = func() time.Duration { return time.Since(begun) }
	}
	if c.Turned == nil {
		c.Turned = func(uint64, string, string) {}
	}
	if c.Halted == nil {
		c.Halted = func(error) {}
	}
	if c.LostFound == "" {
		c.LostFound = filepath.Join(filepath.Dir(c.Dir), "lost+found")
	}
	if c.Format == 0 {
		c.Format = MaxFormat
	}
	if c.MaxVoters == 0 {
		c.MaxVoters = 5
	}
	if c.MaxVoters < 1 || c.MaxVoters > 7 || c.MaxVoters%2 == 0 {
		err = errors.Join(err, fmt.Errorf("MaxVoters is %d; 1, 3, 5 or 7 are possible", c.MaxVoters))
	}
	if err != nil {
		return c, fmt.Errorf("configuration of the arbiter: %w", err)
	}
	return c, nil
}
