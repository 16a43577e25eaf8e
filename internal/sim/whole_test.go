package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/coppice-project/coppice/internal/sim/history"
	"github.com/coppice-project/coppice/membrane"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
)

// wholeKind is all of a node but its sockets and real processes: members, arbiter, records, blobs, supervisor, membranes and the SDK. Instances of
// a counter are called from everywhere while everything goes wrong; what was answered must be linearizable.
var wholeKind = kind{"whole", func(s *schedule) { newWhole(s).run() }}

const (
	simApp    = "shop"
	protoGate = protocol.ID("/sim/gate/1")
	// lapse is when a component's process ends itself because its node does not grant its lease.
	lapse = 2 * time.Second
	// collectAfter is the collector's grace in the simulation: longer than faults that follow on each other keep a commit waiting (a split, the
	// leader's death and flapping took 9 s: whole/120), as ten minutes are longer than any real upload.
	collectAfter = 15 * time.Second
	// ownedWithin is when every instance must be served again after healing: reconnected (netTimeout), found dead (1.6 s), the lease of the
	// last owner waited for (3.1 s), and 5 s.
	ownedWithin = netTimeout + 1600*time.Millisecond + 3100*time.Millisecond + 5*time.Second
)

// grantedLeases says that an exactly-one instance needs a lease which the arbiter's leader grants and claims wait for. While it is false the
// lease is only what its owner has heard, and the simulation has shown where that is too little: an owner that hears the arbiter through
// somebody else, or hears and is not heard, goes on beside its successor; one that led the arbiter itself takes a second longer to notice that it
// is cut off; and a process that waits for the arbiter outlives its lease. So for exactly-one such cuts are left out, a process counts only
// while it may serve, for leadersDoubt beside its successor it is borne with, and reads are in no history.
const grantedLeases = true

// leadersDoubt is what a leader that is cut off takes to find out.
const leadersDoubt = time.Second

// whole is a world of whole nodes.
type whole struct {
	*world
	shelf     *shelf
	guarantee string
	instances []string

	hist   sync.Mutex // guards the rest
	ops    map[string][]history.Op[int64]
	frozen map[*life]time.Time  // since when
	beside map[string]time.Time // by instance: since when two may serve it
}

func newWhole(s *schedule) *whole {
	w := &whole{world: newWorld(s), ops: map[string][]history.Op[int64]{}, frozen: map[*life]time.Time{}, beside: map[string]time.Time{}}
	w.guarantee = components.Safe
	if w.oneIn(2) {
		w.guarantee = components.ExactlyOne
	}
	for i := range 1 + w.intn(2) {
		w.instances = append(w.instances, fmt.Sprintf("%s/store-%d", simApp, i))
	}
	w.build = w.buildLife
	return w
}

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
	p.sup = supervisor.New(supervisor.Config{
		Self: n.id, Name: n.name, Boot: l.boot, Arbiter: l.arb, Members: p.members, Blobs: p.blobs, Artifacts: w.shelf, Runner: p.procs, Peers: l.end,
		Caller: p.caller, Events: eventLog{w.world, n}, Shell: p.newShell, RunDir: "/nowhere", LogDir: "/nowhere", DataDir: "/nowhere", Log: l.log,
		Rand: rand.New(rand.NewPCG(l.boot, 5)), BootTime: l.clock.now, Touch: l.arb.HeardLeader, Settle: 500 * time.Millisecond,
		Adopted: func(arbiter.Register) { p.direct.tell() },
	})
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
func (e eventLog) Publish(ev events.Event) { e.w.logf("%s: %s: %s", e.n.name, ev.Type, ev.Message) }

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
func (s *shell) Close() { s.p.router.Remove(s.m.Instance()) }

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

// ===== the schedule =====

func (w *whole) run() {
	defer func() {
		w.close()
		if !w.failed() {
			w.eyes.group()
		}
	}()
	var err error
	if w.shelf, err = newShelf(); err != nil {
		w.failf("the component cannot be described: %v", err)
		return
	}
	w.net.SetTimeout(netTimeout)
	size := 4 + w.intn(2)
	for range size {
		w.add()
	}
	for i, n := range w.all() {
		n.start(i == 0)
	}
	if _, ok := w.eventually(15*time.Second, w.met); !ok {
		w.statuses()
		w.failf("%d nodes have not met, or have no group", size)
		return
	}
	if !w.deploy() {
		return
	}
	w.goes.Go(w.look)
	w.goes.Go(w.operate)
	if _, ok := w.eventually(10*time.Second, w.served); !ok {
		w.failf("the instances do not run before the first fault")
		w.owners()
		return
	}
	w.copies()
	end := time.Now().Add(w.between(6*time.Second, 12*time.Second))
	var callers sync.WaitGroup
	for i := range 3 {
		r := w.dice()
		callers.Go(func() { w.call(i, r, end) })
	}
	f := newFaults(w.world, size+1)
	f.losses = 1
	f.harms = append(f.harms, harm{"crash of a process", 4, w.crashProcess}, harm{"crash of an owner", 4, w.crashOwner},
		harm{"owner cut off", 4, w.isolateOwner}, harm{"owner stands still", 3, w.freezeOwner}, harm{"move", 3, w.move})
	if w.trusting() {
		f.harms = slices.DeleteFunc(f.harms, func(h harm) bool { return h.name == "bridge" || h.name == "one way" })
	}
	f.run(time.Until(end))
	callers.Wait()
	if w.failed() {
		return
	}
	f.over()
	w.afterwards()
	w.histories()
}

// trusting says that the lease of this schedule's instances is what their owner has heard.
func (w *whole) trusting() bool { return w.guarantee == components.ExactlyOne && !grantedLeases }

// met says whether all know all, and the group is what it should be.
func (w *whole) met() bool {
	for _, n := range w.live() {
		p := n.part()
		if s := p.l.arb.Status(); len(p.members.Alive()) != len(w.live()) || !s.HasLeader || len(s.Voters) != wantedVoters(len(w.live())) {
			return false
		}
	}
	return true
}

// deploy commits the application and places its instances, as placement does.
func (w *whole) deploy() bool {
	spec := &componentsv1.ComponentSpec{Name: "store", Artifact: counterName + "@" + counterVersion, Guarantee: w.guarantee, Count: fmt.Sprint(len(w.instances))}
	app := &componentsv1.Application{
		Format: components.ApplicationFormat, Name: simApp, Version: 1, Manifest: &componentsv1.Manifest{Application: simApp, Components: []*componentsv1.ComponentSpec{spec}},
		Pinned: []*componentsv1.Pinned{{Component: "store", Digest: counterDigest, Name: counterName, Version: counterVersion, Durable: componentsv1.Durability_DURABILITY_EACH_CALL}},
	}
	body, err := proto.Marshal(app)
	if err != nil {
		w.failf("encode the application: %v", err)
		return false
	}
	nodes := w.live()
	ctx, cancel := within(healed)
	defer cancel()
	arb := nodes[0].part().l.arb
	if _, err := arb.Txn(ctx, arbiter.TxnRequest{Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: components.ApplicationRegister(simApp), Body: body}}}}); err != nil {
		w.failf("deploy: %v", err)
		return false
	}
	eff, err := components.EffectiveOf(app, "store")
	if err != nil {
		w.failf("deploy: %v", err)
		return false
	}
	for i, name := range w.instances {
		on := nodes[w.intn(len(nodes))]
		first := components.FirstBody(components.InstanceSpec{Name: name, Component: eff, Ordinal: i}, time.Now())
		for k := 1; k <= 2; k++ {
			first.Successors = append(first.Successors, nodes[(slices.Index(nodes, on)+k)%len(nodes)].id.String())
		}
		if body, err = proto.Marshal(first); err != nil {
			w.failf("encode %s: %v", name, err)
			return false
		}
		_, err := arb.Claim(ctx, arbiter.ClaimRequest{Key: components.InstanceRegister(name), Owner: on.id, Boot: on.cur.Load().boot, Body: body})
		if err != nil {
			w.failf("place %s: %v", name, err)
			return false
		}
		w.logf("%s (%s) is placed on %s", name, w.guarantee, on.name)
	}
	return true
}

// register reads an instance's register in the view of the node that is furthest.
func (w *whole) register(name string) (reg arbiter.Register, ok bool) {
	for _, n := range w.live() {
		if p := n.part(); p != nil {
			if r, there := p.l.arb.Get(components.InstanceRegister(name)); there && (!ok || r.Incarnation > reg.Incarnation || r.Incarnation == reg.Incarnation && r.Index > reg.Index) {
				reg, ok = r, true
			}
		}
	}
	return reg, ok
}

// owner is the node that owns an instance, if it runs.
func (w *whole) owner(name string) *node {
	reg, ok := w.register(name)
	if !ok {
		return nil
	}
	if n := w.of(reg.Owner); n != nil && n.cur.Load() != nil && n.cur.Load().boot == reg.Boot {
		return n
	}
	return nil
}

// served says whether every instance runs on its owner, and nowhere else.
func (w *whole) served() bool {
	for _, name := range w.instances {
		on := w.owner(name)
		if on == nil {
			return false
		}
		for _, n := range w.live() {
			p := n.part()
			if p == nil {
				return false
			}
			procs := len(p.procs.running(name))
			if info, _ := p.sup.Info(name); n == on && (info.State != components.Running || procs != 1) || n != on && procs != 0 {
				return false
			}
		}
	}
	return true
}

// owners logs what every node holds of the instances.
func (w *whole) owners() {
	w.statuses()
	for _, name := range w.instances {
		for _, n := range w.live() {
			if p := n.part(); p != nil {
				reg, _ := p.sup.Register(components.InstanceRegister(name))
				info, here := p.sup.Info(name)
				w.logf("%s: %s is of %s (boot %x) in epoch %d, seq %d; here %v: %s %q, %d processes", n.name, name, w.named(reg.Owner), reg.Boot, reg.Epoch, reg.Seq, here, info.State, info.Reason, len(p.procs.running(name)))
			}
		}
	}
}

// copies asserts, before the first fault, that a checkpoint is acknowledged by as many holders as it takes (G3).
func (w *whole) copies() {
	for _, name := range w.instances {
		n := w.live()[0]
		ctx, cancel := within(healed)
		_, err := counterv1.NewCounterClient(n.part().router.Conn(name, "")).Add(ctx, &counterv1.AddRequest{N: 0})
		cancel()
		if err != nil {
			w.failf("the first call of %s fails: %v", name, err)
			return
		}
		if reg, _ := w.register(name); reg.Seq > 0 && reg.W < 2 {
			w.failf("I6: with %d nodes the checkpoint %d of %s was committed with %d holders", len(w.live()), reg.Seq, name, reg.W)
		}
	}
}

// call makes calls from here and there until the end.
func (w *whole) call(number int, r *rand.Rand, end time.Time) {
	for time.Now().Before(end) && !w.failed() {
		time.Sleep(time.Duration(5+r.IntN(120)) * time.Millisecond)
		live := w.live()
		if len(live) == 0 {
			continue
		}
		n := live[r.IntN(len(live))]
		p := n.part()
		if p == nil || p.l.frozen.Load() {
			continue
		}
		name := w.instances[r.IntN(len(w.instances))]
		w.once(number, r, n, p, name)
	}
}

// once makes one call and records it. Reads belong to the history only where they may not be stale.
func (w *whole) once(number int, r *rand.Rand, n *node, p *part, name string) {
	ctx, cancel := within(time.Duration(500+r.IntN(5000)) * time.Millisecond)
	defer cancel()
	client := counterv1.NewCounterClient(p.router.Conn(name, ""))
	o := history.Op[int64]{Client: number, Call: w.now()}
	var v *counterv1.Value
	var err error
	read := w.guarantee == components.ExactlyOne && r.IntN(3) == 0
	if read {
		o.Name = "get " + name
		v, err = client.Get(ctx, &counterv1.GetRequest{})
		o.Step = func(s int64) (int64, bool) { return s, s == v.GetValue() }
	} else {
		o.Name = "add to " + name
		v, err = client.Add(ctx, &counterv1.AddRequest{N: 1})
		failed := err != nil
		o.Step = func(s int64) (int64, bool) { return s + 1, failed || s+1 == v.GetValue() }
	}
	o.Return = w.now()
	o.Name += fmt.Sprintf(" at %s = %d", n.name, v.GetValue())
	if err != nil {
		o.Name += " " + err.Error()
	}
	w.logf("caller %d: %s, since %.4f", number, o.Name, o.Call.Seconds())
	w.hist.Lock()
	defer w.hist.Unlock()
	switch {
	case read && (err != nil || w.trusting()):
		return
	case err != nil:
		o.Unknown = true
		w.count.InDoubt++
	default:
		w.count.Answers++
	}
	w.ops[name] = append(w.ops[name], o)
}

func (w *whole) histories() {
	w.hist.Lock()
	defer w.hist.Unlock()
	for _, name := range w.instances {
		ops := w.ops[name]
		w.checks = append(w.checks, func() (history.Verdict, string) {
			v, why := history.Check(int64(0), ops, decide)
			return v, "the calls of " + name + ": " + why
		})
	}
}

// ===== faults that aim at instances =====

func (w *whole) anyInstance() string { return w.instances[w.intn(len(w.instances))] }

func (w *whole) crashProcess(*faults) string {
	name := w.anyInstance()
	n := w.owner(name)
	if n == nil {
		return ""
	}
	p := n.part()
	if p == nil {
		return ""
	}
	for _, proc := range p.procs.running(name) {
		w.logf("a process of %s on %s dies", name, n.name)
		proc.die("killed")
	}
	return name
}

// takeOwner reserves the owner of an instance.
func (w *whole) takeOwner() (*node, string) {
	name := w.anyInstance()
	n := w.owner(name)
	if n == nil || !n.take() {
		return nil, ""
	}
	return n, name
}

func (w *whole) crashOwner(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	if f.crashOf(n) == "" {
		return ""
	}
	return fmt.Sprintf("%s of %s", n.name, name)
}

func (w *whole) isolateOwner(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	n.give()
	// It loses the others, but perhaps not its callers.
	var reach *node
	if live := w.live(); w.oneIn(2) && !w.trusting() {
		reach = live[w.intn(len(live))]
	}
	w.logf("%s, who owns %s, is cut off", n.name, name)
	heal := w.cut(func(a, b *node) bool { return (a == n || b == n) && a != reach && b != reach })
	f.pause(500*time.Millisecond, 7*time.Second)
	heal()
	return n.name
}

func (w *whole) freezeOwner(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	defer n.give()
	w.logf("%s, who owns %s, stands still", n.name, name)
	n.freeze()
	f.pause(200*time.Millisecond, 7*time.Second)
	n.thaw()
	w.logf("%s goes on", n.name)
	return n.name
}

func (w *whole) move(f *faults) string {
	if w.guarantee == components.ExactlyOne {
		return "" // a move has the old process quiet beside the new one for a moment, on purpose; alone would not know it from two
	}
	name := w.anyInstance()
	from, to := w.owner(name), f.any(false)
	if from == nil || to == nil || from == to {
		if to != nil {
			to.give()
		}
		return ""
	}
	to.give()
	p := from.part()
	if p == nil {
		return ""
	}
	w.logf("%s moves from %s to %s", name, from.name, to.name)
	ctx, cancel := within(5 * time.Second)
	defer cancel()
	_, err := p.sup.Move(ctx, name, to.id, supervisor.Wish{Trigger: "operator", Cause: "simulation"})
	return fmt.Sprintf("of %s to %s: %v", name, to.name, err)
}

// unclaimed is how long placement leaves a dead owner's instance to the neighbours, who know best; leaseOver is what exactly-one waits besides.
const (
	unclaimed = 2 * time.Second
	leaseOver = 3100 * time.Millisecond
)

// operate does what placement and an operator do: what nobody has taken over from a dead owner is claimed for somebody, and quarantines are
// lifted. (Neighbours take over from the process that they saw die; an owner whose later lives never got to claim its own is left to
// placement.)
func (w *whole) operate() {
	for {
		select {
		case <-time.After(300 * time.Millisecond):
		case <-w.ctx.Done():
			return
		}
		lead := w.leading()
		if lead == nil {
			continue
		}
		p := w.of(lead.Leader).part()
		if p == nil || p.l.frozen.Load() {
			continue
		}
		for _, name := range w.instances {
			if reg, ok := p.l.arb.Get(components.InstanceRegister(name)); ok {
				w.attend(p, name, reg)
			}
		}
	}
}

func (w *whole) attend(p *part, name string, reg arbiter.Register) {
	var body componentsv1.InstanceBody
	if proto.Unmarshal(reg.Body, &body) != nil {
		return
	}
	var op arbiter.Op
	m, known := p.members.Member(reg.Owner)
	wait := unclaimed
	if w.guarantee == components.ExactlyOne {
		wait += leaseOver
	}
	switch {
	case body.GetQuarantined():
		body.Quarantined, body.Deaths = false, nil
		data, err := proto.Marshal(&body)
		if err != nil {
			return
		}
		op.Put = &arbiter.PutOp{Key: reg.Key, Body: data}
	case known && !m.State.Running() && time.Since(m.Since) > wait:
		to := p.members.Closest(reg.Key, 1, func(m members.Member) bool { return m.State == members.Alive })
		if len(to) == 0 {
			return
		}
		next := components.Takeover(&body, components.OwnerDeath{Node: reg.Owner.String(), Name: m.Name, Boot: reg.Boot, Trigger: "placement", To: to[0].ID.String(), Now: time.Now()})
		data, err := proto.Marshal(next)
		if err != nil {
			return
		}
		op.Claim = &arbiter.ClaimRequest{Key: reg.Key, Expect: reg.Epoch, Nonce: p.l.rand.Uint64() | 1, Owner: to[0].ID, Boot: to[0].Boot, Body: data}
	default:
		return
	}
	ctx, cancel := context.WithTimeout(w.ctx, time.Second)
	defer cancel()
	res, err := p.l.arb.Txn(ctx, arbiter.TxnRequest{Compares: []arbiter.Compare{{Key: reg.Key, Field: "revision", Equal: reg.Revision}}, Then: []arbiter.Op{op}})
	if op.Claim != nil {
		w.logf("%s leads and claims %s of %s for %s: %v %v", p.l.n.name, name, w.named(reg.Owner), w.named(op.Claim.Owner), res.Succeeded, err)
	} else {
		w.logf("the operator lifts the quarantine of %s: %v %v", name, res.Succeeded, err)
	}
}

// afterwards asserts I10: every instance is served by a live owner, and answers everywhere.
func (w *whole) afterwards() {
	begun := time.Now()
	if took, ok := w.eventually(ownedWithin, w.served); !ok {
		w.failf("I10: not every instance runs on a live owner, once, %s after healing", took)
		w.owners()
		return
	}
	for _, n := range w.live() {
		p := n.part()
		for _, name := range w.instances {
			ctx, cancel := context.WithTimeout(context.Background(), time.Until(begun.Add(ownedWithin+healed)))
			o := history.Op[int64]{Client: 9, Call: w.now()}
			v, err := counterv1.NewCounterClient(p.router.Conn(name, "")).Add(ctx, &counterv1.AddRequest{N: 1})
			cancel()
			if err != nil {
				w.failf("I10: %s is not answered at %s: %v", name, n.name, err)
				w.owners()
				return
			}
			o.Return = w.now()
			o.Name = fmt.Sprintf("the last add to %s at %s = %d", name, n.name, v.GetValue())
			o.Step = func(s int64) (int64, bool) { return s + 1, s+1 == v.GetValue() }
			w.logf("%s", o.Name)
			w.hist.Lock()
			w.ops[name] = append(w.ops[name], o)
			w.hist.Unlock()
		}
	}
	w.count.Heal = time.Since(begun)
}

// ===== what is looked at all the time =====

// look asserts I3, I6 and I9 again and again.
func (w *whole) look() {
	type seen struct{ inc, epoch uint64 }
	last := map[*life]map[string]seen{}
	for round := 0; ; round++ {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-w.ctx.Done():
			return
		}
		w.lapses()
		if w.guarantee == components.ExactlyOne {
			w.alone()
		}
		if round%40 != 0 {
			continue
		}
		w.holders()
		for _, n := range w.live() {
			p := n.part()
			if p == nil || p.l.frozen.Load() {
				continue
			}
			if last[p.l] == nil {
				last[p.l] = map[string]seen{}
			}
			for _, rec := range p.records.Local(ownPrefix) {
				was, now := last[p.l][rec.Key], seen{rec.Incarnation, rec.Epoch}
				last[p.l][rec.Key] = now
				if now.inc < was.inc || now.inc == was.inc && now.epoch < was.epoch {
					w.failf("I9: the mirror of %s at %s went back from %d/%d to %d/%d", rec.Key, n.name, was.inc, was.epoch, now.inc, now.epoch)
				}
				w.mirrorIsCommitted(n, rec)
			}
		}
	}
}

// lapses ends the processes of nodes that stand still: their lease is not granted.
func (w *whole) lapses() {
	w.hist.Lock()
	defer w.hist.Unlock()
	for _, n := range w.live() {
		p := n.part()
		if p == nil {
			continue
		}
		if !p.l.frozen.Load() {
			delete(w.frozen, p.l)
			continue
		}
		since, known := w.frozen[p.l]
		if !known {
			w.frozen[p.l] = time.Now()
		} else if time.Since(since) >= lapse {
			p.procs.killAll()
		}
	}
}

// mayServe says whether this life would serve an instance now: it has a process for it, and its lease. A node that stands still serves nothing.
func (p *part) mayServe(name string) bool {
	p.mu.Lock()
	serving := p.serving[name]
	p.mu.Unlock()
	if serving == nil || p.l.frozen.Load() || len(p.procs.running(name)) == 0 {
		return false
	}
	if grantedLeases {
		return true
	}
	info, here := p.sup.Info(name)
	return here && (info.State == components.Running || info.State == components.Degraded) && serving()
}

// alone asserts that an instance that must be one is not served by two (I3).
func (w *whole) alone() {
	w.hist.Lock()
	defer w.hist.Unlock()
	for _, name := range w.instances {
		var at []string
		for _, n := range w.live() {
			if p := n.part(); p != nil && p.mayServe(name) {
				at = append(at, n.name)
			}
		}
		if len(at) < 2 {
			delete(w.beside, name)
			continue
		}
		since, known := w.beside[name]
		if !known {
			since, w.beside[name] = time.Now(), time.Now()
		}
		if grantedLeases || time.Since(since) > leadersDoubt {
			w.failf("I3: %s may be served by %s at the same time", name, strings.Join(at, " and "))
		}
	}
}

// holders asserts that who is named as a holder of a committed checkpoint has every node of it (I6).
func (w *whole) holders() {
	for _, name := range w.instances {
		reg, ok := w.register(name)
		if !ok || len(reg.Root) != len(blobs.Hash{}) {
			continue
		}
		for _, id := range reg.Holders {
			n := w.of(id)
			if n == nil || n.isLost() {
				continue
			}
			p := n.part()
			if p == nil || p.l.frozen.Load() {
				continue
			}
			if missing, err := lacks(p.blobs, blobs.Hash(reg.Root)); err == nil && missing > 0 && n.part() == p {
				w.failf("I6: %s is named as a holder of checkpoint %d of %s and lacks %d nodes of it", n.name, reg.Seq, name, missing)
			}
		}
	}
}

// lacks counts what a store lacks below a root, by walking all of it.
func lacks(s *blobs.Store, root blobs.Hash) (missing int, err error) {
	seen := map[blobs.Hash]bool{}
	for todo := []blobs.Hash{root}; len(todo) > 0; {
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[h] {
			continue
		}
		seen[h] = true
		node, err := s.Get(h)
		if _, lost := errors.AsType[*blobs.MissingError](err); lost {
			missing++
			continue
		}
		if err != nil {
			return 0, err
		}
		for _, l := range node.Links {
			todo = append(todo, l.Hash)
		}
	}
	return missing, nil
}

// mirrorIsCommitted asserts that a mirror says what was committed (I9).
func (w *whole) mirrorIsCommitted(n *node, rec records.Record) {
	var m mirrored
	if err := json.Unmarshal(rec.Value, &m); err != nil {
		w.failf("I9: the mirror %s at %s cannot be read: %v", rec.Key, n.name, err)
		return
	}
	key := components.InstanceRegister(strings.TrimPrefix(rec.Key, ownPrefix))
	if owner, known := w.eyes.ownerAt(rec.Incarnation, key, m.Epoch); !known || owner.String() != m.Owner {
		w.failf("I9: the mirror %s at %s says that %s owns epoch %d; committed is %s", rec.Key, n.name, m.Owner, m.Epoch, w.named(owner))
	}
}
