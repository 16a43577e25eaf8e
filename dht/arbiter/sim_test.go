package arbiter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
)

// cluster is a whole group over a network in memory and disks that forget what was not synced, in a synctest bubble.
type cluster struct {
	t      testing.TB
	net    *peers.Net
	rng    *rand.Rand
	mu     sync.Mutex
	nodes  []*node
	adjust func(*Config)
	wg     sync.WaitGroup
}

// node is one member through all its lives.
type node struct {
	c    *cluster
	id   peer.ID
	fs   *vfs.MemFS
	zone string
	boot uint64
	// format that its next life knows; 0: this build's
	format atomic.Uint32

	cancel context.CancelFunc
	done   chan error
	life   atomic.Pointer[life] // nil while dead
}

// life is one run of a node.
type life struct {
	a       *Arbiter
	members *fakeMembers
}

func (n *node) arb() *Arbiter {
	if l := n.life.Load(); l != nil {
		return l.a
	}
	return nil
}

// view returns the view of the running node, or an empty one.
func (n *node) view() *fakeMembers {
	if l := n.life.Load(); l != nil {
		return l.members
	}
	return newFakeMembers(n.id)
}

func (n *node) end() { n.life.Store(nil) }

func newFakeMembers(self peer.ID) *fakeMembers {
	return &fakeMembers{self: self, states: map[peer.ID]*fakeState{}, subs: map[int]func(old, new Member){}}
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

func newCluster(t testing.TB, seed uint64) *cluster {
	c := &cluster{t: t, net: peers.NewNet(seed), rng: rand.New(rand.NewPCG(seed, 7))}
	return c
}

// add makes a node without starting it.
func (c *cluster) add() *node {
	n := &node{c: c, id: testID(len(c.nodes) + 1), fs: vfs.NewCrashableMem()}
	c.mu.Lock()
	c.nodes = append(c.nodes, n)
	c.mu.Unlock()
	return n
}

var testTimings = Timings{Settle: 10 * time.Second}

func (n *node) start(bootstrap bool) {
	n.c.t.Helper()
	if err := n.tryStart(bootstrap); err != nil {
		n.c.t.Fatalf("start %s: %v", n.id, err)
	}
}

func (n *node) tryStart(bootstrap bool) error {
	c := n.c
	ep := c.net.Join(n.id)
	n.boot = c.draw() | 1
	view := newFakeMembers(n.id)
	for _, o := range c.all() {
		if o == n || o.arb() != nil {
			view.set(o, true)
		}
	}
	var mu sync.Mutex
	r := rand.New(rand.NewPCG(n.boot, 1))
	begun := time.Now()
	cfg := Config{
		Self: n.id, Boot: n.boot, Peers: ep, Links: ep, Members: view, FS: n.fs, Dir: "raft", Timings: testTimings,
		Rand:     func() uint64 { mu.Lock(); defer mu.Unlock(); return r.Uint64() },
		Log:      c.logger().With("self", n.id.String()[len(n.id.String())-4:]),
		BootTime: func() time.Duration { return time.Since(begun) },
		Format:   n.format.Load(),
	}
	if c.adjust != nil {
		c.adjust(&cfg)
	}
	a, err := New(cfg)
	if err != nil {
		return err
	}
	if bootstrap {
		if _, err := a.Bootstrap(""); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.done = cancel, make(chan error, 1)
	n.life.Store(&life{a, view})
	done := n.done
	go func() { done <- a.Run(ctx) }()
	return nil
}

// logger writes everything with SIM_LOG set, and nothing without.
func (c *cluster) logger() *slog.Logger {
	level := slog.LevelError + 4
	if os.Getenv("SIM_LOG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

func (c *cluster) draw() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rng.Uint64()
}

func (c *cluster) intn(n int) int { return int(c.draw() % uint64(n)) }

// announce tells everybody about a node's state after a while.
func (c *cluster) announce(n *node, alive bool, after time.Duration) {
	a := n.arb()
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		time.Sleep(after)
		if n.arb() != a {
			return // it has another life by now
		}
		for _, o := range c.all() {
			if o != n && o.arb() != nil {
				o.view().set(n, alive)
			}
		}
	}()
}

// up starts a node and has the others know it.
func (c *cluster) up(n *node, bootstrap bool) {
	n.start(bootstrap)
	c.announce(n, true, 20*time.Millisecond)
}

// grow makes and starts n nodes, the first of them bootstraps.
func (c *cluster) grow(n int) {
	for range n {
		x := c.add()
		c.up(x, len(c.nodes) == 1)
		time.Sleep(50 * time.Millisecond)
	}
}

// kill ends a node's process; its disk keeps what was synced.
func (c *cluster) kill(n *node) {
	cancel, done := n.cancel, n.done
	n.fs = n.fs.CrashClone(vfs.CrashCloneCfg{})
	c.net.Kill(n.id)
	n.end()
	cancel()
	c.wg.Add(1)
	go func() {
		defer c.wg.Done()
		<-done
	}()
	c.announce(n, false, 15*time.Millisecond)
}

// stop ends a node in order.
func (n *node) stop() {
	if n.arb() == nil {
		return
	}
	n.cancel()
	if err := <-n.done; err != nil {
		n.c.t.Errorf("run %s: %v", n.id, err)
	}
	n.end()
	n.c.net.Kill(n.id)
}

func (c *cluster) close() {
	for _, n := range c.nodes {
		n.stop()
	}
	c.wg.Wait()
	c.net.Close()
}

// all returns the nodes, dead ones too.
func (c *cluster) all() []*node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.nodes)
}

func (c *cluster) live() []*node {
	var out []*node
	for _, n := range c.all() {
		if n.arb() != nil {
			out = append(out, n)
		}
	}
	return out
}

func (c *cluster) leader() *node {
	for _, n := range c.live() {
		if n.arb().Status().Role == "leader" {
			return n
		}
	}
	return nil
}

func (c *cluster) of(id peer.ID) *node {
	for _, n := range c.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

// eventually waits for a condition, in virtual time.
func (c *cluster) eventually(within time.Duration, what string, cond func() bool) {
	c.t.Helper()
	for end := time.Now().Add(within); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			for _, n := range c.live() {
				s := n.arb().Status()
				c.t.Logf("%s %s voters=%d learners=%d index=%d age=%s keeper=%q last=%q", n.id.String()[:8], s.Role, len(s.Voters), len(s.Learners), s.Index, s.FeedAge, s.Keeper, s.LastError)
			}
			c.t.Fatalf("not within %s: %s", within, what)
		}
	}
}

// settled waits until all live nodes agree on so many voters, in one incarnation.
func (c *cluster) settled(within time.Duration, voters, learners int) {
	c.t.Helper()
	c.eventually(within, fmt.Sprintf("%d voters and %d learners, known to all", voters, learners), func() bool {
		var first Status
		var life incarnation
		for i, n := range c.live() {
			s := n.arb().Status()
			_, seen := n.arb().disk.incarnations()
			if i == 0 {
				first, life = s, seen
			}
			// One that has met a higher incarnation shows the lower one until it hears of the other's registers.
			if seen != life || n.arb().superseded() || n.arb().view.now().meta.incarnation() != life {
				return false
			}
			if !s.HasLeader || len(s.Voters) != voters || len(s.Learners) != learners || !slices.Equal(s.Voters, first.Voters) {
				return false
			}
		}
		return true
	})
}

// fakeMembers is a node's view, as the test has it.
type fakeMembers struct {
	self   peer.ID
	mu     sync.Mutex
	states map[peer.ID]*fakeState
	next   int
	subs   map[int]func(old, new Member)
}

type fakeState struct {
	m     Member
	since time.Time
}

func (s *fakeState) now() Member {
	m := s.m
	m.For = time.Since(s.since)
	return m
}

// forget takes a member out of the view, as those are that are expelled.
func (f *fakeMembers) forget(id peer.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.states, id)
}

func (f *fakeMembers) List() []Member {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []Member
	for _, s := range f.states {
		out = append(out, s.now())
	}
	return out
}

func (f *fakeMembers) Subscribe(g func(old, new Member)) func() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next++
	id := f.next
	f.subs[id] = g
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.subs, id)
	}
}

func (f *fakeMembers) set(n *node, alive bool) {
	f.change(n.id, func(m *Member) { m.Alive, m.Dead, m.Zone, m.Format = alive, !alive, n.zone, n.format.Load() })
}

func (f *fakeMembers) change(id peer.ID, g func(*Member)) {
	f.mu.Lock()
	s := f.states[id]
	if s == nil {
		s = &fakeState{m: Member{ID: id}, since: time.Now()}
		f.states[id] = s
	}
	old := s.now()
	g(&s.m)
	if s.m.Alive != old.Alive || s.m.Dead != old.Dead {
		s.since = time.Now()
	}
	now := s.now()
	var subs []func(old, new Member)
	for _, x := range f.subs {
		subs = append(subs, x)
	}
	f.mu.Unlock()
	for _, x := range subs {
		x(old, now)
	}
}

func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

// put sets a body with a transaction.
func put(a *Arbiter, key, body string, d time.Duration) error {
	ctx, cancel := within(d)
	defer cancel()
	res, err := a.Txn(ctx, TxnRequest{Then: []Op{{Put: &PutOp{Key: key, Body: []byte(body)}}}})
	if err == nil && !res.Succeeded {
		err = errors.New("not done")
	}
	return err
}
