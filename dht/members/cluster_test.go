package members

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
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

// clock is a node's CLOCK_BOOTTIME: it stands still while its process is stopped, and jumps when that goes on.
type clock struct {
	mu     sync.Mutex
	start  time.Time
	frozen time.Duration // negative: running
	extra  time.Duration
}

func newClock() *clock { return &clock{start: time.Now(), frozen: -1} }

func (c *clock) now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen >= 0 {
		return c.frozen
	}
	return time.Since(c.start) + c.extra
}

func (c *clock) stop()                { now := c.now(); c.mu.Lock(); c.frozen = now; c.mu.Unlock() }
func (c *clock) cont()                { c.mu.Lock(); c.frozen = -1; c.mu.Unlock() }
func (c *clock) jump(d time.Duration) { c.mu.Lock(); c.extra += d; c.mu.Unlock() }

type memBook struct {
	mu   sync.Mutex
	data []byte
}

func (b *memBook) Load() ([]byte, error) { b.mu.Lock(); defer b.mu.Unlock(); return b.data, nil }
func (b *memBook) Save(d []byte) error   { b.mu.Lock(); defer b.mu.Unlock(); b.data = d; return nil }

// node is one life of one node of a simulated cluster.
type node struct {
	*Members
	id    peer.ID
	end   *peers.Endpoint
	clock *clock
	stop  func() // ends Run

	mu        sync.Mutex
	log       []Change
	suspended []time.Duration
}

// saw returns the changes that fit.
func (n *node) saw(fits func(Change) bool) []Change {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []Change
	for _, c := range n.log {
		if fits(c) {
			out = append(out, c)
		}
	}
	return out
}

// cluster is a simulated cluster. nodes holds the running ones.
type cluster struct {
	t     *testing.T
	net   *peers.Net
	rng   *rand.Rand
	boots uint64
	ids   []peer.ID
	nodes map[peer.ID]*node
	books map[peer.ID]*memBook
	tune  func(*Config)
	fresh bool // new nodes are admitted nowhere
}

// simulate runs f on n nodes that know of each other's admission, after they have met.
func simulate(t *testing.T, seed uint64, n int, f func(c *cluster)) {
	simulateWith(t, seed, n, nil, f)
}

func simulateWith(t *testing.T, seed uint64, n int, tune func(*Config), f func(c *cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{
			t: t, net: peers.NewNet(seed), rng: rand.New(rand.NewPCG(seed, 1)), nodes: map[peer.ID]*node{},
			books: map[peer.ID]*memBook{}, tune: tune,
		}
		for i := range n {
			c.ids = append(c.ids, peer.ID(fmt.Sprintf("n%d", i+1)))
		}
		defer c.close()
		for _, id := range c.ids {
			c.start(id)
		}
		c.eventually(5*time.Second, "all nodes meet", func() error { return c.agree(c.ids) })
		time.Sleep(2 * time.Second) // heartbeats flow
		f(c)
	})
}

func (c *cluster) start(id peer.ID) *node {
	c.t.Helper()
	c.boots++
	if c.books[id] == nil {
		c.books[id] = &memBook{}
	}
	n := &node{id: id, end: c.net.Join(id), clock: newClock()}
	cfg := Config{
		Self:  Info{ID: id, Name: string(id), Boot: c.boots<<32 | c.rng.Uint64N(1<<32), Addrs: []string{"/mem/" + string(id)}},
		Peers: n.end, Links: n.end, BootTime: n.clock.now, Rand: rand.New(rand.NewPCG(c.rng.Uint64(), 2)),
		Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Book: c.books[id], FlapDeaths: -1,
		Suspended: func(d time.Duration) { n.mu.Lock(); n.suspended = append(n.suspended, d); n.mu.Unlock() },
	}
	if os.Getenv("COPPICE_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil)).With("at", id)
	}
	if c.tune != nil {
		c.tune(&cfg)
	}
	m, err := New(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	n.Members = m
	m.Subscribe(func(ch Change) { n.mu.Lock(); n.log = append(n.log, ch); n.mu.Unlock() })
	if !c.fresh {
		for _, other := range c.ids {
			m.Admit(Info{ID: other, Name: string(other)})
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := m.Run(ctx); err != nil {
			c.t.Error(err)
		}
	}()
	n.stop = func() { cancel(); <-done }
	c.nodes[id] = n
	return n
}

// kill ends a node's process at once.
func (c *cluster) kill(id peer.ID) {
	c.net.Kill(id)
	n := c.nodes[id]
	delete(c.nodes, id)
	n.stop()
}

func (c *cluster) freeze(id peer.ID) { c.nodes[id].clock.stop(); c.net.Freeze(id) }
func (c *cluster) thaw(id peer.ID)   { c.nodes[id].clock.cont(); c.net.Thaw(id) }

func (c *cluster) close() {
	c.net.Close()
	for id, n := range c.nodes {
		delete(c.nodes, id)
		n.stop()
	}
}

// agree says who does not hold exactly these nodes to be alive.
func (c *cluster) agree(alive []peer.ID) error {
	want := map[peer.ID]bool{}
	for _, id := range alive {
		want[id] = true
	}
	for _, at := range alive {
		n := c.nodes[at]
		for _, m := range n.All() {
			if (m.State == Alive) != want[m.ID] {
				return fmt.Errorf("%s holds %s to be %v (%s)", at, m.ID, m.State, m.Evidence)
			}
			if o := c.nodes[m.ID]; want[m.ID] && m.Boot != o.Self().Boot {
				return fmt.Errorf("%s knows an old life of %s", at, m.ID)
			}
		}
		if got := len(n.Alive()); got != len(alive) {
			return fmt.Errorf("%s holds %d nodes to be alive, want %d", at, got, len(alive))
		}
	}
	return nil
}

// eventually waits for a condition and returns how long it took.
func (c *cluster) eventually(within time.Duration, what string, cond func() error) time.Duration {
	c.t.Helper()
	start := time.Now()
	for {
		err := cond()
		if err == nil {
			return time.Since(start)
		}
		if time.Since(start) > within {
			c.t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(time.Millisecond)
	}
}

// holds returns nil when every running node holds a node to be in a state.
func (c *cluster) holds(id peer.ID, s State) error {
	for at, n := range c.nodes {
		if at == id {
			continue
		}
		if m, ok := n.Member(id); !ok || m.State != s {
			return fmt.Errorf("%s holds %s to be %v (%s), want %v", at, id, m.State, m.Evidence, s)
		}
	}
	return nil
}

// never fails when a running node calls one of these dead (or left) from now on. The result checks.
func (c *cluster) never(ids ...peer.ID) (check func()) {
	from := map[*node]int{}
	for _, n := range c.nodes {
		n.mu.Lock()
		from[n] = len(n.log)
		n.mu.Unlock()
	}
	return func() {
		c.t.Helper()
		for n, i := range from {
			n.mu.Lock()
			for _, ch := range n.log[i:] {
				for _, id := range ids {
					if ch.New.ID == id && !ch.New.State.Running() {
						c.t.Errorf("%s called %s %v: %s", n.id, id, ch.New.State, ch.New.Evidence)
					}
				}
			}
			n.mu.Unlock()
		}
	}
}

// locked runs f under the view's lock.
func (n *node) locked(f func()) {
	n.Members.mu.Lock()
	defer n.Members.mu.Unlock()
	f()
}

// without runs f while a node is out of c.nodes: its own opinion does not count.
func (c *cluster) without(id peer.ID, f func() func()) func() {
	n := c.nodes[id]
	delete(c.nodes, id)
	defer func() { c.nodes[id] = n }()
	return f()
}

// jitter sets delays of at least base and up to more above it.
func (c *cluster) jitter(base, more time.Duration) {
	rng := rand.New(rand.NewPCG(c.rng.Uint64(), 3)) // Net calls under its lock
	c.net.SetDelay(func(_, _ peer.ID) time.Duration { return base + time.Duration(rng.Int64N(int64(more))) })
}
