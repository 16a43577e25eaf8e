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
	trans  *transport
	caller *peers.Caller
	where  *whereabouts
	follow *follower
	queue  *queue
	reads  *rounds
	keeper *keeper
	mirror *mirror
	seen   *sightings

	raft    atomic.Pointer[raft.Raft] // nil until the disk was vouched for
	known   atomic.Uint64             // highest log index that was ever answered to this node
	feeds   atomic.Int64              // served
	voted   atomic.Uint64             // elections started here because the leader was proven dead
	serving inflight                  // what raft has not answered yet
	closing chan struct{}
	notice  pulse       // something was committed: tell the followers
	halted  atomic.Bool // stopped for good
	lagging atomic.Bool // commits to be noticed

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
		caller: peers.NewCaller(cfg.Peers), seen: newSightings(),
	}
	if err := a.label(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	m, err := d.machine()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("raft database %s: %w", cfg.Dir, err), d.Close())
	}
	a.view.fromDisk(m)
	a.known.Store(m.index)
	d.committed = func() uint64 {
		if r := a.raft.Load(); r != nil {
			return max(m.index, r.CommitIndex())
		}
		return m.index
	}
	a.fsm = &fsm{m: newMachine(), view: a.view, halt: a.halt, onApply: a.onApply}
	a.trans = newTransport(cfg.Peers, cfg.Self, a.t.RPC, newRaftLog(cfg.Log), &a.ids)
	a.follow = &follower{a: a}
	a.queue = newQueue()
	a.reads = &rounds{a: a}
	a.keeper = newKeeper(a)
	a.mirror = newMirror(a)
	peers.ServeCalls(cfg.Peers, protoCall, func() *wirev1.ArbiterRequest { return new(wirev1.ArbiterRequest) }, a.serveCall)
	cfg.Peers.Handle(protoFeed, a.serveFeed)
	return a, nil
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
	next := &wirev1.ArbiterDisk{Format: diskFormat, Self: l.GetSelf(), Boots: l.GetBoots() + 1, Boot: a.cfg.Boot}
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
	if err := raft.BootstrapCluster(a.raftConfig(), a.disk, a.disk, a.disk, a.trans, conf); err != nil {
		if errors.Is(err, raft.ErrCantBootstrap) {
			return "", fmt.Errorf("bootstrap: %s holds a group already; start without bootstrap to go on with it", a.cfg.Dir)
		}
		return "", fmt.Errorf("bootstrap: %w", err)
	}
	// The cluster's id is the group's first command. It stands in the log as the configuration does, and commits with it.
	e := &wirev1.ArbiterEntry{Format: 1, Proposer: []byte(a.cfg.Self), Commands: []*wirev1.ArbiterCommand{
		{Kind: &wirev1.ArbiterCommand_SetMeta{SetMeta: &wirev1.ArbiterSetMeta{Cluster: cluster, Format: 1, Coordinator: []byte(a.cfg.Self)}}},
	}}
	b, err := proto.Marshal(e)
	if err != nil {
		return "", fmt.Errorf("bootstrap: %w", err)
	}
	if err := a.disk.StoreLog(&raft.Log{Index: 2, Term: 1, Type: raft.LogCommand, Data: b}); err != nil {
		return "", fmt.Errorf("bootstrap: %w", err)
	}
	return cluster, nil
}

func (a *Arbiter) address() raft.ServerAddress { return raft.ServerAddress(a.cfg.Self.String()) }

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
	}
	cancel()
	unsubscribe()
	wg.Wait()
	return errors.Join(err, a.Close())
}

// takePart has the disk vouched for, starts raft, and does what a member of the group does.
func (a *Arbiter) takePart(ctx context.Context) error {
	if err := a.verify(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		a.halt(err)
		return err
	}
	r, err := a.startRaft()
	if err != nil {
		return err
	}
	a.standAtStart(r)
	var wg sync.WaitGroup
	for _, f := range []func(context.Context, *raft.Raft){a.observe, a.keeper.run, a.tellCommits, a.mirror.run} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			f(ctx, r)
		}()
	}
	wg.Wait()
	return nil
}

func (a *Arbiter) startRaft() (*raft.Raft, error) {
	var r atomic.Pointer[raft.Raft]
	a.trans.start(func() uint64 {
		if x := r.Load(); x != nil {
			return max(x.AppliedIndex(), a.fsm.applied.Load())
		}
		return 0
	})
	x, err := raft.NewRaft(a.raftConfig(), a.fsm, a.disk, a.disk, a.disk, a.trans)
	if err != nil {
		return nil, fmt.Errorf("start raft on %s: %w", a.cfg.Dir, err)
	}
	r.Store(x)
	a.raft.Store(x)
	if a.halted.Load() {
		x.Shutdown() // it met what it does not know before it was stored
	}
	a.trans.layer.admit()
	return x, nil
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
		_ = a.trans.Close()
	}
}

// onApply is told the last entry of an applied batch.
func (a *Arbiter) onApply(l *raft.Log) {
	a.raise(l.Index)
	a.lagging.Store(true)
	a.notice.beat()
	a.mirror.beat()
}

// raise notes a log index that is known to be committed.
func (a *Arbiter) raise(index uint64) {
	for {
		k := a.known.Load()
		if index <= k || a.known.CompareAndSwap(k, index) {
			return
		}
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
			f := r.Shutdown()
			err = errors.Join(err, a.trans.Close(), f.Error())
			<-a.trans.done
			if !a.halted.Load() {
				err = errors.Join(err, a.disk.markCommitted(r.CommitIndex()))
			}
		} else {
			err = errors.Join(err, a.trans.Close())
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
	mu     sync.Mutex // guards closed; n is raised with it held
	closed bool
	n      sync.WaitGroup
}

func (i *inflight) enter() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return false
	}
	i.n.Add(1)
	return true
}

func (i *inflight) leave() { i.n.Done() }

func (i *inflight) wait() {
	i.mu.Lock()
	i.closed = true
	i.mu.Unlock()
	i.n.Wait()
}
