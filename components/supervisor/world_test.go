package supervisor

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/grpc"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/coppice-project/coppice/membrane"
)

// seedOf returns the seed of a run: COPPICE_SEED, or def. It is printed so that a failure can be replayed.
func seedOf(t *testing.T, def uint64) uint64 {
	t.Helper()
	if s := os.Getenv("COPPICE_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("COPPICE_SEED=%q: %v", s, err)
		}
		def = v
	}
	t.Logf("seed %d (COPPICE_SEED replays it)", def)
	return def
}

const (
	testApp      = "shop"
	testInstance = "shop/store-0"
	protoGate    = protocol.ID("/test/gate/1")
)

var testKey = components.InstanceRegister(testInstance)

// world is a cluster of nodes made of the real members, arbiter, blobs, membranes and supervisors, over a network and disks in memory, in a
// synctest bubble. Placement is the test.
type world struct {
	t     *testing.T
	net   *peers.Net
	rng   *rand.Rand
	nodes []*simNode
	shelf *shelf
	boots uint64
	loads []*load
	// tune changes a node's supervisor before it starts.
	tune func(n *simNode, cfg *Config)
}

// inWorld runs f with n nodes that know each other and have their voters.
func inWorld(t *testing.T, n int, f func(w *world)) {
	t.Helper()
	inWorldWith(t, n, nil, f)
}

func inWorldWith(t *testing.T, n int, tune func(n *simNode, cfg *Config), f func(w *world)) {
	t.Helper()
	seed := seedOf(t, 7)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed)
		w.tune = tune
		defer w.close()
		for i := range n {
			w.nodes = append(w.nodes, &simNode{w: w, id: testID(i + 1), name: fmt.Sprintf("n%d", i+1), fs: vfs.NewCrashableMem()})
		}
		w.meet()
		f(w)
	})
}

func newWorld(t *testing.T, seed uint64) *world {
	return &world{t: t, net: peers.NewNet(seed), rng: rand.New(rand.NewPCG(seed, 3)), shelf: &shelf{binaries: map[string]*binary{}}}
}

// meet starts the nodes and waits until they know each other and have their voters.
func (w *world) meet() {
	w.t.Helper()
	for i, nd := range w.nodes {
		nd.start(i == 0)
	}
	n := len(w.nodes)
	want := min((n-1)/2*2+1, 5)
	w.eventually(30*time.Second, "the nodes meet and have their voters", func() bool {
		for _, nd := range w.nodes {
			if s := nd.arb.Status(); len(nd.members.Alive()) != n || !s.HasLeader || len(s.Voters) < want {
				return false
			}
		}
		return true
	})
	w.shelf.add(&binary{name: "counter", version: "1.0.0"})
}

// testID makes a well-formed peer id from a number.
func testID(n int) peer.ID {
	b := make([]byte, 34)
	b[0], b[1] = 0x12, 0x20
	r := rand.New(rand.NewPCG(uint64(n), 99))
	for i := 2; i < len(b); i++ {
		b[i] = byte(r.Uint64())
	}
	return peer.ID(b)
}

func (w *world) close() {
	for _, l := range w.loads {
		l.cancel()
	}
	for _, n := range w.nodes {
		n.stop()
	}
	w.net.Close()
	for _, l := range w.loads {
		l.goes.Wait()
	}
}

// eventually waits for a condition, in virtual time, and returns how long that took.
func (w *world) eventually(within time.Duration, what string, cond func() bool) time.Duration {
	w.t.Helper()
	begin := time.Now()
	for !cond() {
		if time.Since(begin) > within {
			for _, n := range w.up() {
				reg, _ := n.sup.Register(testKey)
				info, here := n.sup.Info(testInstance)
				w.t.Logf("%s: owner %s epoch %d seq %d; here %v: %s %q", n.name, w.nameOf(reg.Owner), reg.Epoch, reg.Seq, here, info.State, info.Reason)
			}
			w.t.Fatalf("not within %s: %s", within, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(begin)
}

func (w *world) up() []*simNode {
	return slices.DeleteFunc(slices.Clone(w.nodes), func(n *simNode) bool { return n.sup == nil })
}

func (w *world) nameOf(id peer.ID) string {
	for _, n := range w.nodes {
		if n.id == id {
			return n.name
		}
	}
	return "nobody"
}

func (w *world) node(id peer.ID) *simNode {
	for _, n := range w.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

// clock is a node's CLOCK_BOOTTIME: it stands still while its process is stopped, and jumps when that goes on. Its rate may differ from real
// time.
type clock struct {
	mu     sync.Mutex
	start  time.Time
	frozen time.Duration // negative: running
	rate   float64       // 0: 1
}

func (c *clock) now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen >= 0 {
		return c.frozen
	}
	if c.rate != 0 {
		return time.Duration(float64(time.Since(c.start)) * c.rate)
	}
	return time.Since(c.start)
}

func (c *clock) stop() { now := c.now(); c.mu.Lock(); c.frozen = now; c.mu.Unlock() }
func (c *clock) cont() { c.mu.Lock(); c.frozen = -1; c.mu.Unlock() }

// stopped says whether the process stands still: whatever it believes, it does not act.
func (c *clock) stopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.frozen >= 0
}

// simNode is one node through all its lives.
type simNode struct {
	w    *world
	id   peer.ID
	name string
	fs   *vfs.MemFS
	boot uint64
	rate float64 // of its clock; 0: 1
	zone string
	dir  string // its files, through all its lives

	// Of the present life; sup is nil while there is none.
	clock   *clock
	ep      *peers.Endpoint
	members *members.Members
	arb     *arbiter.Arbiter
	disk    *store.Store
	blobs   *blobs.Store
	caller  *peers.Caller
	runner  *simRunner
	router  *membrane.Router
	life    atomic.Pointer[simLife]         // the present one, for those who look on
	door    atomic.Pointer[membrane.Router] // router, for those who do not wait for a start
	gate    *grpc.Server
	direct  *directory
	sup     *Supervisor
	cancel  context.CancelFunc
	goes    *sync.WaitGroup
	gone    sync.WaitGroup // earlier lives that end

	mu     sync.Mutex // guards events
	events []events.Event
}

// simLife is what others look at while the node is killed and started.
type simLife struct {
	sup   *Supervisor
	clock *clock
}

// Publish implements Publisher.
func (n *simNode) Publish(ev events.Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.events = append(n.events, ev)
}

// published lists the events of a type.
func (n *simNode) published(typ string) []events.Event {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(n.events), func(ev events.Event) bool { return ev.Type != typ })
}

func (n *simNode) must(err error) {
	n.w.t.Helper()
	if err != nil {
		n.w.t.Fatalf("%s: %v", n.name, err)
	}
}

func (n *simNode) start(bootstrap bool) {
	w := n.w
	w.boots++
	if n.dir == "" {
		n.dir = w.t.TempDir()
	}
	n.boot = w.boots<<32 | w.rng.Uint64N(1<<32)
	n.ep, n.clock = w.net.Join(n.id), &clock{start: time.Now(), frozen: -1, rate: n.rate}
	var out io.Writer = io.Discard
	if os.Getenv("COPPICE_LOG") != "" {
		out = os.Stderr
	}
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug})).With("at", n.name)
	quiet := slog.New(slog.DiscardHandler)
	if os.Getenv("COPPICE_LOG") != "" {
		quiet = slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelDebug})).With("at", n.name)
	}
	var err error
	n.members, err = members.New(members.Config{
		Self:  members.Info{ID: n.id, Name: n.name, Boot: n.boot, Addrs: []string{"/mem/" + n.name}, Role: "full", Zone: n.zone},
		Peers: n.ep, Links: n.ep, BootTime: n.clock.now, Rand: rand.New(rand.NewPCG(w.rng.Uint64(), 2)), Log: quiet, FlapDeaths: -1,
	})
	n.must(err)
	for _, o := range w.nodes {
		n.members.Admit(members.Info{ID: o.id, Name: o.name})
	}
	var nonceMu sync.Mutex
	nonces := rand.New(rand.NewPCG(n.boot, 1))
	n.arb, err = arbiter.New(arbiter.Config{
		Self: n.id, Boot: n.boot, Peers: n.ep, Links: n.ep, Members: arbiter.FromMembers(n.members), FS: n.fs, Dir: "raft", Log: quiet,
		Timings: arbiter.Timings{Settle: time.Second}, BootTime: n.clock.now, Leased: components.LeasedBody,
		Rand: func() uint64 { nonceMu.Lock(); defer nonceMu.Unlock(); return nonces.Uint64() },
	})
	n.must(err)
	if bootstrap {
		_, err = n.arb.Bootstrap("")
		n.must(err)
	}
	n.disk, err = store.Open(n.fs, "db", store.Options{Log: quiet, CacheBytes: 1 << 20, MemTableBytes: 1 << 20})
	n.must(err)
	n.blobs, err = blobs.Open(blobs.Config{Self: n.id, DB: n.disk.DB(), Peers: n.ep, Log: quiet})
	n.must(err)
	n.caller = peers.NewCaller(n.ep)
	n.runner = &simRunner{shelf: w.shelf, procs: map[*simProcess]bool{}}
	n.direct = &directory{shelf: w.shelf, changed: make(chan struct{})}
	conns := &links{ep: n.ep, conns: map[string]*grpc.ClientConn{}}
	n.router = membrane.NewRouter(membrane.RouterConfig{Self: n.id.String(), Caller: fmt.Sprintf("%s.%x", n.name, n.boot), Directory: n.direct, Peers: conns, Log: log})
	n.door.Store(n.router)
	cfg := Config{
		Self: n.id, Name: n.name, Boot: n.boot, Arbiter: n.arb, Members: n.members, Blobs: n.blobs, Artifacts: w.shelf, Runner: n.runner, Peers: n.ep,
		Caller: n.caller, Events: n, Shell: n.newShell, RunDir: "/nowhere", LogDir: "/nowhere", DataDir: n.dir, Log: log,
		Rand: rand.New(rand.NewPCG(n.boot, 5)), BootTime: n.clock.now, Touch: n.arb.HeardLeader, Settle: 5 * time.Second,
		Adopted: func(arbiter.Register) { n.direct.tell() },
	}
	if w.tune != nil {
		w.tune(n, &cfg)
	}
	n.sup = New(cfg)
	n.life.Store(&simLife{n.sup, n.clock})
	n.direct.sup.Store(n.sup)
	n.blobs.SetOnAcked(n.sup.OnAcked)
	n.gate = membrane.NewServer(n.router.PeerHandler())
	lis := peers.Listener(n.ep, protoGate)
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.goes = cancel, &sync.WaitGroup{}
	unwatch := n.arb.Watch(func(_, _ *arbiter.Register) { n.direct.tell() })
	context.AfterFunc(ctx, unwatch)
	for _, run := range []func(context.Context) error{n.members.Run, n.arb.Run, n.blobs.Run, n.sup.Run} {
		n.goes.Go(func() { run(ctx) }) //nolint:errcheck // ends with ctx
	}
	gate := n.gate
	n.goes.Go(func() { gate.Serve(lis) }) //nolint:errcheck // stopped
	context.AfterFunc(ctx, func() { gate.Stop(); conns.close() })
}

// kill is kill -9 of the node and what runs on it. Its disk keeps what was synced.
func (n *simNode) kill() {
	n.fs = n.fs.CrashClone(vfs.CrashCloneCfg{})
	n.w.net.Kill(n.id)
	n.runner.killAll()
	n.end()
}

// stop ends the node in order.
func (n *simNode) stop() {
	if n.sup != nil {
		n.end()
	}
	n.gone.Wait()
}

func (n *simNode) end() {
	cancel, goes, blobs, arb, caller, disk := n.cancel, n.goes, n.blobs, n.arb, n.caller, n.disk
	runner := n.runner
	n.direct.sup.Store(nil)
	n.door.Store(nil)
	n.life.Store(nil)
	n.sup, n.ep = nil, nil
	cancel()
	n.gone.Go(func() {
		goes.Wait()
		blobs.Close()
		arb.Close() //nolint:errcheck // of a node that is gone
		caller.Close()
		disk.Close() //nolint:errcheck // of a node that is gone
		runner.killAll()
	})
}

func (n *simNode) freeze() { n.clock.stop(); n.w.net.Freeze(n.id) }
func (n *simNode) thaw()   { n.clock.cont(); n.w.net.Thaw(n.id) }
