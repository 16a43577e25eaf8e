package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/coppice-project/coppice/membrane"
)

// part is what a life has besides the arbiter.
type part struct {
	w       *whole
	l       *life
	members *members.Members
	disk    *store.Store
	blobs   *blobs.Store
	records *records.Records
	caller  *peers.Caller
	procs   *processes
	router  *membrane.Router
	direct  *directory
	sup     *supervisor.Supervisor

	mu      sync.Mutex             // guards serving
	serving map[string]func() bool // by instance: may it be served here now
	behind  atomic.Int64           // clock at which the view was last seen to be behind
}

func (n *node) part() *part {
	if l := n.cur.Load(); l != nil {
		if p, ok := l.ext.(*part); ok {
			return p
		}
	}
	return nil
}

// buildLife makes everything below the arbiter.
func (w *whole) buildLife(n *node, l *life) error {
	p := &part{w: w, l: l, procs: &processes{}, serving: map[string]func() bool{}}
	l.ext = p
	var err error
	p.members, err = members.New(members.Config{
		Self:  members.Info{ID: n.id, Name: n.name, Boot: l.boot, Addrs: []string{"/mem/" + n.name}, Role: "full"},
		Peers: l.end, Links: l.end, BootTime: l.clock.now, Rand: rand.New(rand.NewPCG(l.rand.Uint64(), 2)), Log: l.log, FlapDeaths: -1,
	})
	if err != nil {
		return err
	}
	for _, o := range w.all() {
		p.members.Admit(members.Info{ID: o.id, Name: o.name})
		if q := o.part(); q != nil {
			q.members.Admit(members.Info{ID: n.id, Name: n.name})
		}
	}
	l.view = arbiter.FromMembers(p.members)
	if p.disk, err = store.Open(n.fs, "db", store.Options{Log: l.log, CacheBytes: 1 << 20, MemTableBytes: 1 << 20}); err != nil {
		return err
	}
	p.blobs, err = blobs.Open(blobs.Config{
		Self: n.id, DB: p.disk.DB(), Peers: l.end, Log: l.log, PinFor: collectAfter, SweepEvery: time.Second,
		Alive: func(id peer.ID) bool {
			m, ok := p.members.Member(id)
			return ok && (m.State == members.Alive || m.State == members.Suspect)
		},
	})
	if err != nil {
		return err
	}
	p.caller = peers.NewCaller(l.end)
	p.records, err = records.Open(records.Config{
		Self: n.id, Key: n.key, Store: p.disk.Datastore("kad/", store.NoSync()), Peers: l.end, Caller: p.caller, View: records.FromMembers(p.members),
		SyncEvery: 3 * time.Second, Rand: rand.New(rand.NewPCG(l.rand.Uint64(), 4)), Log: l.log,
	})
	if err != nil {
		return err
	}
	l.runs = append(l.runs, p.members.Run, p.blobs.Run, p.records.Run)
	l.closes = append(l.closes,
		func() { _ = p.disk.Close() }, // of a node that is gone
		p.caller.Close,
		func() { _ = p.records.Close() },
		func() { _ = p.blobs.Close() })
	l.dies = append(l.dies, p.procs.killAll)
	return nil
}

// withArbiter makes what is above it.
func (p *part) withArbiter(l *life) error {
	n, w := l.n, p.w
	p.direct = &directory{shelf: w.shelf, changed: make(chan struct{})}
	conns := &gates{end: l.end, conns: map[string]*grpc.ClientConn{}}
	p.router = membrane.NewRouter(membrane.RouterConfig{Self: n.id.String(), Caller: fmt.Sprintf("%s.%x", n.name, l.boot), Directory: p.direct, Peers: conns, Log: l.log})
	cfg := supervisor.Config{
		Self: n.id, Name: n.name, Boot: l.boot, Arbiter: l.arb, Members: p.members, Blobs: p.blobs, Artifacts: w.shelf, Runner: p.procs, Peers: l.end,
		Caller: p.caller, Events: eventLog{w.world, n}, Shell: p.newShell, RunDir: "/nowhere", LogDir: "/nowhere", DataDir: "/nowhere", Log: l.log,
		Rand: rand.New(rand.NewPCG(l.rand.Uint64(), 5)), BootTime: l.clock.now, Touch: l.arb.HeardLeader, Settle: 500 * time.Millisecond,
		Adopted: func(arbiter.Register) { p.direct.tell() },
	}
	if w.keeps() {
		cfg.DataDir = n.folder()
	}
	p.sup = supervisor.New(cfg)
	p.direct.sup.Store(p.sup)
	p.blobs.SetOnAcked(p.sup.OnAcked)
	p.blobs.SetLive(p.liveRoots)
	gate := membrane.NewServer(p.router.PeerHandler())
	lis := peers.Listener(l.end, protoGate)
	l.arb.Watch(func(_, _ *arbiter.Register) { p.direct.tell() })
	l.runs = append(l.runs, p.sup.Run, func(ctx context.Context) error {
		defer context.AfterFunc(ctx, func() { gate.Stop(); conns.close() })()
		return gate.Serve(lis)
	})
	l.closes = append(l.closes, func() { gate.Stop(); conns.close(); p.direct.sup.Store(nil); p.procs.killAll() })
	l.dies = append(l.dies, func() { gate.Stop(); conns.close() })
	return nil
}

// liveRoots are what the collector keeps, as a node says it.
func (p *part) liveRoots() []blobs.Hash {
	// As in package node, in proportion.
	if age := p.l.arb.Status().FeedAge; age < 0 || age > collectAfter/4 {
		p.behind.Store(int64(p.l.clock.now()))
		return nil
	}
	if at := p.behind.Load(); at != 0 && p.l.clock.now()-time.Duration(at) < collectAfter/4 {
		return nil
	}
	out := []blobs.Hash{}
	for _, reg := range p.l.arb.List(components.InstancePrefix) {
		if len(reg.Root) == len(blobs.Hash{}) {
			out = append(out, blobs.Hash(reg.Root))
		}
	}
	for _, reg := range p.l.arb.List(components.HistoryPrefix) {
		roots, err := supervisor.HistoryRoots(reg)
		if err != nil {
			return nil
		}
		out = append(out, roots...)
	}
	for _, reg := range p.l.arb.List(components.BranchPrefix) {
		if len(reg.Root) == len(blobs.Hash{}) {
			out = append(out, blobs.Hash(reg.Root))
		}
	}
	out = append(out, p.sup.BranchRoots()...)
	for _, in := range p.sup.Infos() {
		if !in.Saved.Root.IsZero() {
			out = append(out, in.Saved.Root)
		}
	}
	return out
}

// mirrored is what a mirror says, as far as the simulation needs it.
type mirrored struct {
	Epoch, Index uint64
	Owner        string
}

const ownPrefix = "/kb/own/"

// mirror brings committed ownership into the DHT.
func (p *part) mirror(regs []arbiter.Register) {
	var entries []records.Entry
	for _, reg := range regs {
		name := components.InstanceOfKey(reg.Key)
		if name == "" {
			continue
		}
		value, err := json.Marshal(mirrored{Epoch: reg.Epoch, Index: reg.Index, Owner: reg.Owner.String()})
		if err != nil {
			p.w.failf("mirror: %v", err)
			return
		}
		entries = append(entries, records.Entry{Key: ownPrefix + name, Value: value, Incarnation: reg.Incarnation, Epoch: reg.Index, Revision: 1, Deleted: reg.Deleted})
	}
	if len(entries) == 0 {
		return
	}
	ctx, cancel := within(5 * time.Second)
	defer cancel()
	p.records.PutMany(ctx, entries) // what does not reach enough is told again by the next leader, and repaired
}

// eventLog is what the supervisors of a world tell.
type eventLog struct {
	w *world
	n *node
}

// Publish implements supervisor.Publisher.
func (e eventLog) Publish(ev events.Event) {
	e.w.logf("%s: %s: %s", e.n.name, ev.Type, ev.Message)
	if ev.Type == "running" && ev.Fields["standby"] != "" {
		e.w.mu.Lock()
		defer e.w.mu.Unlock()
		e.w.count.Standbys++
	}
}

// shell is an instance's membrane, reachable through the node's router.
type shell struct {
	p     *part
	m     *membrane.Membrane
	creds atomic.Int64
}

func (p *part) newShell(instance string, _ *components.Effective, hooks supervisor.Hooks) (supervisor.Shell, error) {
	m := membrane.New(membrane.Config{Instance: instance, Serving: hooks.Serving, OnStale: func(membrane.Token) { hooks.Stale() }, OnHung: hooks.Hung})
	p.router.Add(m)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.serving[instance] = hooks.Serving
	return &shell{p: p, m: m}, nil
}

// Membrane implements supervisor.Shell.
func (s *shell) Membrane() *membrane.Membrane { return s.m }

// NodeSocket implements supervisor.Shell.
func (s *shell) NodeSocket() string { return "" }

// Bind implements supervisor.Shell.
func (s *shell) Bind(*components.Effective) error { return nil }

// Close implements supervisor.Shell.
func (s *shell) Close() { s.p.router.Remove(s.m) }

// Credential implements supervisor.Shell.
func (s *shell) Credential() string { return fmt.Sprint(s.creds.Add(1)) }

// Forbid implements supervisor.Shell.
func (s *shell) Forbid(string) {}

// directory routes by the registers, as a node does.
type directory struct {
	shelf   *shelf
	sup     atomic.Pointer[supervisor.Supervisor] // nil once the node is gone
	mu      sync.Mutex                            // guards changed
	changed chan struct{}
}

func (d *directory) tell() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.changed)
	d.changed = make(chan struct{})
}

// Changed implements membrane.Directory.
func (d *directory) Changed(string) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

// Resolve implements membrane.Directory.
func (d *directory) Resolve(target, _ string) (membrane.Route, error) {
	sup := d.sup.Load()
	if sup == nil {
		return membrane.Route{}, membrane.ErrNoOwner
	}
	reg, ok := sup.Register(components.InstanceRegister(target))
	if !ok || reg.Owner == "" {
		return membrane.Route{}, membrane.ErrNoOwner
	}
	return membrane.Route{
		Instance: target, Node: reg.Owner.String(), Token: membrane.Token{Incarnation: reg.Incarnation, Epoch: reg.Epoch}, Methods: membrane.NewMethods(d.shelf.desc),
	}, nil
}

// gates are a node's connections to other nodes' gates.
type gates struct {
	end    *peers.Endpoint
	mu     sync.Mutex // guards the rest
	conns  map[string]*grpc.ClientConn
	closed bool
}

// Conn implements membrane.Peers.
func (g *gates) Conn(_ context.Context, node string) (grpc.ClientConnInterface, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, errors.New("this node is gone")
	}
	if c := g.conns[node]; c != nil {
		return c, nil
	}
	c, err := grpc.NewClient("passthrough:///"+node, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(peers.Dialer(g.end, protoGate)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: grpcbackoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}, MinConnectTimeout: 2 * time.Second}))
	if err == nil {
		g.conns[node] = c
	}
	return c, err
}

// HTTP implements membrane.Peers.
func (g *gates) HTTP(context.Context, string) (http.RoundTripper, error) {
	return nil, errors.New("no http in the simulation")
}

func (g *gates) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for _, c := range g.conns {
		_ = c.Close() // of a node that is gone
	}
}
