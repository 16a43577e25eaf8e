package arbiter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

const protoCall = protocol.ID("/coppice/arbiter/1")

// Arbiter is one node's part in the group: voter, learner, or follower of a feed. All its methods may be called on any node, by any
// goroutine, from New on; those that need the group wait for it.
type Arbiter struct {
	cfg Config
	t   Timings
	log *slog.Logger

	disk   *disk
	fsm    *fsm
	view   *view
	trans  atomic.Pointer[transport] // of this life of raft
	caller *peers.Caller
	where  *whereabouts
	follow *follower
	recall *recall
	queue  *queue
	reads  *rounds
	keeper *keeper
	mirror *mirror
	seen   *sightings
	leases *leases
	two    *two

	raft    atomic.Pointer[raft.Raft] // nil until the disk was vouched for, and between two incarnations
	base    atomic.Uint64             // committed when raft was last started
	known   answered                  // how far the log is that was ever answered to this node
	feeds   atomic.Int64              // served
	voted   atomic.Uint64             // elections started here because the leader was proven dead
	serving inflight                  // what raft has not answered yet
	closing chan struct{}
	notice  pulse       // something was committed: tell the followers
	halted  atomic.Bool // stopped for good
	lagging atomic.Bool // commits to be noticed

	outranked pulse      // a higher incarnation was met
	turns     chan turn  // wishes to go on in the next incarnation
	outdated  chan error // the group went on to a format that this build does not know; buffered

	begun    time.Duration // boot time of New
	ids      idCache
	failures failures
	once     sync.Once
}

// New opens the raft database and registers the arbiter's protocols. The local view shows at once what the disk knows to be committed;
// everything else begins with Run.
func New(cfg Config) (*Arbiter, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	d, err := openDisk(cfg.FS, cfg.Dir, cfg.Log)
	if err != nil {
		return nil, err
	}
	a := &Arbiter{
		cfg: cfg, t: cfg.Timings, log: cfg.Log, disk: d, view: newView(), where: &whereabouts{}, closing: make(chan struct{}),
		caller: peers.NewCaller(cfg.Peers), seen: newSightings(), turns: make(chan turn), outdated: make(chan error, 1),
		begun: cfg.BootTime(),
	}
	if err := a.label(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	m, err := d.machine(cfg.Format)
	if err == nil {
		err = errors.Join(m.known(cfg.Format), d.settle(m))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("raft database %s: %w", cfg.Dir, err), d.Close())
	}
	a.view.fromDisk(m)
	a.raise(point{m.meta.Incarnation, m.index})
	a.base.Store(m.index)
	d.committed = func() uint64 {
		if r := a.raft.Load(); r != nil {
			return max(a.base.Load(), r.CommitIndex())
		}
		return a.base.Load()
	}
	a.fsm = &fsm{m: newMachine(), format: cfg.Format, view: a.view, halt: a.halt, onApply: a.onApply}
	d.guard.onFailure(a.halt)
	a.trans.Store(a.newTransport())
	a.two = newTwo(a)
	a.follow, a.recall = &follower{a: a}, &recall{a: a}
	if err := a.recall.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("raft database %s: %w", cfg.Dir, err), d.Close())
	}
	a.queue = newQueue()
	a.reads = &rounds{a: a}
	a.keeper = newKeeper(a)
	a.mirror = newMirror(a)
	a.leases = newLeases(a)
	peers.ServeCalls(cfg.Peers, protoCall, func() *wirev1.ArbiterRequest { return new(wirev1.ArbiterRequest) }, a.serveCall)
	cfg.Peers.Handle(protoFeed, a.serveFeed)
	return a, nil
}

func (a *Arbiter) newTransport() *transport {
	return newTransport(a.cfg.Peers, a.cfg.Self, door{speaks: a.speaks, greet: a.greet, met: a.meet}, a.t.RPC, newRaftLog(a.log), &a.ids)
}

// label checks that the database is this node's own, and counts the start.
func (a *Arbiter) label() error {
	l := a.disk.label
	if l == nil {
		l = &wirev1.ArbiterDisk{Format: diskFormat, Self: []byte(a.cfg.Self)}
	}
	if l.GetFormat() != diskFormat {
		return fmt.Errorf("the raft database %s has format %d, this build knows %d", a.cfg.Dir, l.GetFormat(), diskFormat)
	}
	if id := peer.ID(l.GetSelf()); id != a.cfg.Self {
		return fmt.Errorf("%w: %s belongs to node %s, this is %s; a copied data directory needs its own identity and an empty raft database",
			ErrRolledBack, a.cfg.Dir, id, a.cfg.Self)
	}
	next := &wirev1.ArbiterDisk{
		Format: diskFormat, Self: l.GetSelf(), Boots: l.GetBoots() + 1, Boot: a.cfg.Boot, Group: l.GetGroup(), Seen: l.GetSeen(), Settled: l.GetSettled(),
	}
	if err := a.disk.writeLabel(next); err != nil {
		return fmt.Errorf("label the raft database %s: %w", a.cfg.Dir, err)
	}
	return nil
}

// Bootstrap makes this node the first of a new group, its only voter. It is called before Run, on an empty database only. cluster is
// the cluster's id; "" draws one. It returns the id.
func (a *Arbiter) Bootstrap(cluster string) (string, error) {
	if cluster == "" {
		cluster = fmt.Sprintf("%016x%016x", a.cfg.Rand(), a.cfg.Rand())
	}
	me := a.address()
	conf := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(me), Address: me}}}
	if err := raft.BootstrapCluster(a.raftConfig(), a.disk, a.disk, a.disk, a.trans.Load(), conf); err != nil {
		if errors.Is(err, raft.ErrCantBootstrap) {
			return "", fmt.Errorf("bootstrap: %s holds a group already; start without bootstrap to go on with it", a.cfg.Dir)
		}
		return "", fmt.Errorf("bootstrap: %w", err)
	}
	// The cluster's id is the group's first command. It stands in the log as the configuration does, and commits with it.
	e := &wirev1.ArbiterEntry{Format: 1, Shard: thisShard, Proposer: []byte(a.cfg.Self), Commands: []*wirev1.ArbiterCommand{
		{Kind: &wirev1.ArbiterCommand_SetMeta{SetMeta: &wirev1.ArbiterSetMeta{Cluster: cluster, Format: 1, Coordinator: []byte(a.cfg.Self)}}},
	}}
	b, err := proto.Marshal(e)
	if err != nil {
		return "", fmt.Errorf("bootstrap: %w", err)
	}
	if err := a.disk.StoreLog(&raft.Log{Index: 2, Term: 1, Type: raft.LogCommand, Data: b}); err != nil {
		return "", fmt.Errorf("bootstrap: %w", err)
	}
	first := newMachine().meta.incarnation()
	if _, _, err := a.disk.setIncarnations(func(_, seen incarnation) (incarnation, incarnation) { return first, seen }); err != nil {
		return "", fmt.Errorf("bootstrap: %w", err)
	}
	return cluster, nil
}

func (a *Arbiter) address() raft.ServerAddress { return raft.ServerAddress(a.cfg.Self.String()) }

// leaderPace is by how much a leader's raft is told a longer heartbeat time than its followers'. Raft sends heartbeats every tenth to fifth
// of it: by itself 7 a second to each follower, for a time-out that is only the last resort behind watchers and links. Half of the followers'
// time-out still fits between two of them.
const leaderPace = 2.5

// pace has raft send heartbeats at leaderPace while this node leads, and wait for others' for the usual time while it does not. Raft looks at
// once whether the leader was heard when its time-out gets shorter; so one that has just stepped down, and heard nobody while it led, waits
// until it hears the next leader, or for as long as raft would have: else it would stand against whom it handed over to. led is when this node
// was last seen to lead.
func (a *Arbiter) pace(r *raft.Raft, led time.Time) {
	want := a.t.Heartbeat
	if r.State() == raft.Leader {
		want = time.Duration(leaderPace * float64(want))
	}
	c := r.ReloadableConfig()
	if c.HeartbeatTimeout == want {
		return
	}
	if want < c.HeartbeatTimeout && time.Since(r.LastContact()) >= want && time.Since(led) < want {
		return // the next look, within a second, does it
	}
	c.HeartbeatTimeout, c.ElectionTimeout = want, want
	if err := r.ReloadConfig(c); err != nil {
		a.failures.note("set raft's pace", err)
	}
}

func (a *Arbiter) raftConfig() *raft.Config {
	c := raft.DefaultConfig() // TrailingLogs stays as it is: see doc.go
	c.LocalID = raft.ServerID(a.address())
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = a.t.Heartbeat, a.t.Heartbeat, a.t.Heartbeat
	c.CommitTimeout = a.t.Idle
	c.MaxAppendEntries = 256
	c.SnapshotInterval, c.SnapshotThreshold = a.t.Snapshot, a.t.SnapshotAfter
	c.ShutdownOnRemove = false
	c.NoLegacyTelemetry = true
	c.Logger = newRaftLog(a.log)
	if planted.Bug("snapshot-older") {
		c.TrailingLogs = 8
	}
	return c
}

// Run takes part until the context ends or the node must not go on (ErrRolledBack). It then closes everything; an Arbiter runs once.
func (a *Arbiter) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	run := func(f func(context.Context)) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f(ctx)
		}()
	}
	unsubscribe := a.cfg.Members.Subscribe(a.memberChanged)
	if a.cfg.Links != nil {
		a.cfg.Links.Notify(a.linkChanged)
	}
	run(a.follow.run)
	run(a.recall.run)
	run(a.proposeLoop)
	refused := make(chan error, 1)
	run(func(ctx context.Context) {
		if err := a.takePart(ctx); err != nil {
			refused <- err
		}
	})
	var err error
	select {
	case <-ctx.Done():
	case err = <-refused:
	case err = <-a.outdated:
		a.halt(err)
	}
	cancel()
	unsubscribe()
	wg.Wait()
	return errors.Join(err, a.Close())
}

// halt stops taking part in the group for good, visibly. The node goes on as a follower of others' feed.
func (a *Arbiter) halt(err error) {
	if !a.halted.CompareAndSwap(false, true) {
		return
	}
	a.failures.halt(err)
	a.log.Error("arbiter: this node has stopped applying and voting", "err", err)
	if r := a.raft.Load(); r != nil {
		r.Shutdown() // without waiting: this may be raft's own goroutine
		_ = a.trans.Load().Close()
	}
	a.cfg.Halted(err)
}

// onApply is told the last entry of an applied batch.
func (a *Arbiter) onApply(l *raft.Log) {
	a.raise(point{a.fsm.m.meta.Incarnation, l.Index})
	a.two.applied(a.fsm.m.meta.TwoNode)
	a.lagging.Store(true)
	a.notice.beat()
	a.mirror.beat()
}

// answered is the highest point of the log that was ever answered to this node.
type answered struct {
	mu sync.Mutex // guards at
	at point
}

func (k *answered) now() point {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.at
}

// raise notes a point of the log that is known to be committed.
func (a *Arbiter) raise(p point) {
	a.known.mu.Lock()
	defer a.known.mu.Unlock()
	if a.known.at.before(p) {
		a.known.at = p
	}
}

// Close ends everything. Run does it, too; calls under way end with ErrClosed or ErrInDoubt.
func (a *Arbiter) Close() error {
	var err error
	a.once.Do(func() {
		close(a.closing)
		a.queue.close()
		a.caller.Close()
		// Raft answers what it was given, at the latest when it finds that it lost its leadership. After its shutdown it might not.
		a.serving.wait()
		if r := a.raft.Load(); r != nil {
			err = a.endRaft(r)
		} else {
			err = a.trans.Load().Close()
		}
		err = errors.Join(err, a.disk.Close())
	})
	return err
}

// failures keeps the last background failure for Status.
type failures struct {
	mu       sync.Mutex // guards the rest
	last     string
	haltedBy string
}

func (f *failures) note(what string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last = fmt.Sprintf("%s %s: %v", time.Now().UTC().Format(time.RFC3339), what, err)
}

func (f *failures) halt(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.haltedBy = err.Error()
}

func (f *failures) get() (last, halted string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last, f.haltedBy
}

// inflight counts what must end before raft is shut down.
type inflight struct {
	mu     sync.Mutex // guards the rest
	closed bool
	paused bool
	n      int
	idle   pulse // n fell to 0
}

func (i *inflight) enter() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed || i.paused {
		return false
	}
	i.n++
	return true
}

func (i *inflight) leave() {
	i.mu.Lock()
	i.n--
	idle := i.n == 0
	i.mu.Unlock()
	if idle {
		i.idle.beat()
	}
}

// wait lets nobody in any more, and returns when all have left.
func (i *inflight) wait() {
	i.mu.Lock()
	i.closed = true
	i.mu.Unlock()
	i.drain(nil)
}

// pause lets nobody in until resume, and waits for those inside, but not for longer than limit.
func (i *inflight) pause(limit time.Duration) {
	i.mu.Lock()
	i.paused = true
	i.mu.Unlock()
	t := time.NewTimer(limit)
	defer t.Stop()
	i.drain(t.C)
}

func (i *inflight) resume() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.paused = false
}

func (i *inflight) drain(limit <-chan time.Time) {
	for {
		idle := i.idle.next()
		i.mu.Lock()
		n := i.n
		i.mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-idle:
		case <-limit:
			return
		}
	}
}
