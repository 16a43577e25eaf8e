package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/peers"
)

// world is a cluster through its lives, in a bubble.
type world struct {
	*schedule
	net    *peers.Net
	ctx    context.Context //nolint:containedctx // of the world: ends what outlives a node
	cancel context.CancelFunc
	goes   sync.WaitGroup // what belongs to no node
	eyes   *observers
	hear   *hearing // who hears whom: what stands in for members where those are not simulated
	echoes bool
	// build adds what a kind has besides the arbiter to a life that begins.
	build func(n *node, l *life) error
	// bare makes a life without an arbiter; nil: every life has one.
	bare func(n *node, l *life) error
	// audit is told what a life decides about leases; nil: nobody is.
	audit func(l *life, s arbiter.LeaseStep)

	mu    sync.Mutex // guards the rest
	nodes []*node
	boots uint64
	cuts  map[int]func(from, to *node) bool // by partition under way
	next  int                               // number of the next partition
}

// node is one identity and its disk through all lives.
type node struct {
	w    *world
	name string
	key  crypto.PrivKey
	id   peer.ID
	rate float64
	gone sync.WaitGroup // lives that end

	mu    sync.Mutex // guards the rest
	fs    *vfs.MemFS
	lost  bool   // its disk is gone or it was refused: it never comes back
	wiped bool   // it came back with an empty disk
	busy  bool   // a fault is being done to it
	dir   string // its files besides fs, through all its lives; "": none yet

	cur atomic.Pointer[life] // nil while it does not run
}

// life is one process of a node.
type life struct {
	n      *node
	boot   uint64
	began  time.Time
	clock  *clock
	end    *peers.Endpoint
	arb    *arbiter.Arbiter
	view   arbiter.Members
	oracle *oracle // nil where members are real
	rand   *lockedRand
	log    *slog.Logger
	cancel context.CancelFunc
	done   chan struct{} // closed when everything of it has ended
	runs   []func(ctx context.Context) error
	closes []func() // in reverse, after runs have ended
	dies   []func() // at once, when the process is killed
	ext    any      // what the kind keeps of it
	frozen atomic.Bool
	disk   *disk
}

// identities are made once: signing keys take a while.
var identities = sync.OnceValue(func() []crypto.PrivKey {
	var list []crypto.PrivKey
	for i := range 64 {
		k, _, err := crypto.GenerateEd25519Key(rand.NewChaCha8([32]byte{byte(i), 7}))
		if err != nil {
			panic(err)
		}
		list = append(list, k)
	}
	return list
})

func newWorld(s *schedule) *world {
	w := &world{schedule: s, net: peers.NewNet(s.draw()), cuts: map[int]func(from, to *node) bool{}}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	w.eyes = newObservers(w)
	return w
}

// add makes a node that has never run.
func (w *world) add() *node {
	w.mu.Lock()
	i := len(w.nodes)
	w.mu.Unlock()
	key := identities()[(int(w.seed)*7+i)%len(identities())]
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		panic(err)
	}
	n := &node{w: w, name: fmt.Sprintf("n%d", i+1), key: key, id: id, fs: vfs.NewCrashableMem()}
	n.rate = 1 - maxRate + 2*maxRate*float64(w.draw()%1001)/1000
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes = append(w.nodes, n)
	return n
}

func (w *world) all() []*node {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.nodes)
}

// live lists the nodes that run.
func (w *world) live() []*node {
	return slices.DeleteFunc(w.all(), func(n *node) bool { return n.cur.Load() == nil })
}

// back lists the nodes that run or will again.
func (w *world) back() []*node {
	return slices.DeleteFunc(w.all(), func(n *node) bool { return n.isLost() })
}

func (w *world) named(id peer.ID) string {
	if n := w.of(id); n != nil {
		return n.name
	}
	if id == "" {
		return "nobody"
	}
	return id.String()
}

func (w *world) of(id peer.ID) *node {
	for _, n := range w.all() {
		if n.id == id {
			return n
		}
	}
	return nil
}

func (w *world) names(ids []peer.ID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = w.named(id)
	}
	return out
}

func (n *node) isLost() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lost
}

// take reserves a node for a fault; false: something is being done to it already.
func (n *node) take() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.busy || n.lost {
		return false
	}
	n.busy = true
	return true
}

func (n *node) give() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.busy = false
}

// lockedRand are dice that several goroutines use.
type lockedRand struct {
	mu sync.Mutex
	r  *rand.Rand
}

func (l *lockedRand) Uint64() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.r.Uint64()
}

func logger(name string) *slog.Logger {
	if os.Getenv("COPPICE_LOG") == "" {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelDebug})).With("at", name)
}

var timings = arbiter.Timings{Settle: 2 * time.Second, Snapshot: 2 * time.Second, SnapshotAfter: 40}

// start begins a life.
func (n *node) start(bootstrap bool) *life {
	w := n.w
	w.mu.Lock()
	w.boots++
	boot := w.boots<<32 | w.draw()>>32
	w.mu.Unlock()
	r := &lockedRand{r: rand.New(rand.NewPCG(boot, w.seed))}
	ctx, cancel := context.WithCancel(context.Background())
	l := &life{
		disk: newDisk(n.fs), n: n, boot: boot, began: time.Now(), clock: newClock(n.rate), end: w.net.Join(n.id), rand: r, log: logger(n.name), cancel: cancel, done: make(chan struct{}),
	}
	w.partition()
	if err := l.assemble(bootstrap); err != nil {
		panic(fmt.Sprintf("%s: start %s: %v", w.id(), n.name, err))
	}
	n.cur.Store(l)
	if l.arb != nil {
		w.eyes.watch(l)
		l.runs = append(l.runs, func(ctx context.Context) error { l.ended(l.arb.Run(ctx)); return nil })
	}
	var runs sync.WaitGroup
	for _, run := range l.runs {
		runs.Go(func() { _ = run(ctx) }) // what matters of how they end is asked elsewhere
	}
	n.gone.Go(func() {
		defer close(l.done)
		runs.Wait()
		for _, f := range slices.Backward(l.closes) {
			f()
		}
	})
	return l
}

// assemble makes the parts of a node.
func (l *life) assemble(bootstrap bool) error {
	n, w := l.n, l.n.w
	if w.bare != nil {
		return w.bare(n, l)
	}
	cfg := arbiter.Config{
		Self: n.id, Boot: l.boot, Peers: l.end, Links: l.end, FS: l.disk, Dir: "raft", Timings: timings, Rand: l.rand.Uint64, Log: l.log, BootTime: l.clock.now, Leased: components.LeasedBody,
	}
	if w.audit != nil {
		cfg.AuditLeases = func(s arbiter.LeaseStep) { w.audit(l, s) }
	}
	if w.echoes {
		cfg.Peers = &echo{Peers: l.end, protocol: "/coppice/arbiter/1", ctx: w.ctx, goes: &w.goes, draw: func() (bool, time.Duration) {
			return l.rand.Uint64()%4 == 0, time.Duration(l.rand.Uint64() % uint64(800*time.Millisecond))
		}}
	}
	if w.hear != nil {
		l.oracle = newOracle(w, l)
		l.view = l.oracle
	}
	if w.build != nil {
		if err := w.build(n, l); err != nil {
			return err
		}
	}
	cfg.Members = l.view
	if m, ok := l.ext.(interface{ mirror([]arbiter.Register) }); ok {
		cfg.Mirror = m.mirror
	}
	a, err := arbiter.New(cfg)
	if err != nil {
		return err
	}
	l.arb = a
	if bootstrap {
		if _, err := a.Bootstrap(""); err != nil {
			return err
		}
	}
	if after, ok := l.ext.(interface{ withArbiter(*life) error }); ok {
		return after.withArbiter(l)
	}
	return nil
}

// ended is told how the arbiter's part ended.
func (l *life) ended(err error) {
	if err == nil {
		return
	}
	n, w := l.n, l.n.w
	if errors.Is(err, arbiter.ErrRolledBack) {
		w.logf("%s is refused: %v", n.name, err)
		n.mu.Lock()
		wiped := n.wiped
		n.lost = true
		n.mu.Unlock()
		if !wiped {
			w.failf("I7: %s was refused although its disk is what it was: %v", n.name, err)
		}
		l.leave()
		return
	}
	w.failf("%s: the arbiter ended: %v", n.name, err)
}

// folder is where a node's life keeps files that are not in fs: what is there when it dies survives.
func (n *node) folder() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dir == "" {
		n.dir = memoryDir(n.w.t)
	}
	return n.dir
}

// copyOf is a copy of a node's folder as it is now: the life that is being killed goes on for a moment, and must not write where the next one reads.
func (w *world) copyOf(dir string) string {
	if dir == "" {
		return ""
	}
	to := memoryDir(w.t)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it was renamed or removed meanwhile
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return errors.Join(err, os.WriteFile(filepath.Join(to, rel), data, 0o600))
	})
	if err != nil {
		w.failf("copy the folder of a node that dies: %v", err)
	}
	return to
}

// memoryDir is a folder that ends with the test, in memory where there is such a place: what is synced there costs no time of a disk.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "coppice-sim-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// kill ends the node's process at once. Its disk keeps what was synced.
func (n *node) kill() {
	l := n.cur.Load()
	if l == nil {
		return
	}
	// The life goes on for a moment. So it is silenced first, for nobody may be told what its disk then lacks; and its folder is copied before fs, for what it
	// writes there is about what is in fs already.
	n.w.net.Kill(n.id)
	n.mu.Lock()
	n.dir = n.w.copyOf(n.dir)
	n.fs = n.fs.CrashClone(vfs.CrashCloneCfg{})
	n.mu.Unlock()
	l.leave()
}

// leave ends what is left of a life.
func (l *life) leave() {
	if !l.n.cur.CompareAndSwap(l, nil) {
		return
	}
	for _, f := range l.dies {
		f()
	}
	l.disk.cont()
	l.clock.cont()
	l.cancel()
}

// stop ends a node in order.
func (n *node) stop() {
	if l := n.cur.Load(); l != nil {
		n.w.net.Thaw(n.id)
		l.leave()
		<-l.done
		n.w.net.Kill(n.id)
	}
}

// freeze is SIGSTOP of the node.
func (n *node) freeze() {
	if l := n.cur.Load(); l != nil {
		l.frozen.Store(true)
		l.clock.stop()
		n.w.net.Freeze(n.id)
	}
}

// thaw is SIGCONT.
func (n *node) thaw() {
	if l := n.cur.Load(); l != nil {
		l.clock.cont()
		n.w.net.Thaw(n.id)
		l.frozen.Store(false)
	}
}

// close ends everything.
func (w *world) close() {
	w.cancel()
	for _, n := range w.all() {
		n.thaw()
	}
	w.heal()
	for _, n := range w.all() {
		n.stop()
	}
	for _, n := range w.all() {
		n.gone.Wait()
	}
	w.net.Close()
	w.goes.Wait()
}

// ===== partitions =====

// cut begins a partition: what one node sends to another is lost where blocked says so, until the returned function ends it.
func (w *world) cut(blocked func(from, to *node) bool) (heal func()) {
	w.mu.Lock()
	w.next++
	number := w.next
	w.cuts[number] = blocked
	w.mu.Unlock()
	w.partition()
	return func() {
		w.mu.Lock()
		delete(w.cuts, number)
		w.mu.Unlock()
		w.partition()
	}
}

// heal ends all partitions.
func (w *world) heal() {
	w.mu.Lock()
	clear(w.cuts)
	w.mu.Unlock()
	w.partition()
}

// blocked says whether what from sends does not reach to.
func (w *world) blocked(from, to *node) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.cuts {
		if f(from, to) {
			return true
		}
	}
	return false
}

// partition has the network be as the partitions under way say.
func (w *world) partition() {
	byID := map[peer.ID]*node{}
	for _, n := range w.all() {
		byID[n.id] = n
	}
	w.mu.Lock()
	cuts := make([]func(from, to *node) bool, 0, len(w.cuts))
	for _, f := range w.cuts {
		cuts = append(cuts, f)
	}
	w.mu.Unlock()
	w.net.SetCuts(func(from, to peer.ID) bool {
		a, b := byID[from], byID[to]
		return a != nil && b != nil && slices.ContainsFunc(cuts, func(f func(from, to *node) bool) bool { return f(a, b) })
	})
}

// eventually waits for a condition, in virtual time, and says how long that took; false: it did not come.
func (w *world) eventually(within time.Duration, cond func() bool) (time.Duration, bool) {
	begun := time.Now()
	for !cond() {
		if time.Since(begun) > within {
			return within, false
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(begun), true
}

// statuses logs what every node holds of the group.
func (w *world) statuses() {
	for _, n := range w.live() {
		if l := n.cur.Load(); l != nil {
			s := l.arb.Status()
			w.logf("%s: %s, term %d, leader %s, voters %v, learners %v, index %d, age %s, keeper %q, last error %q", n.name, s.Role, s.Term, w.named(s.Leader),
				w.names(s.Voters), w.names(s.Learners), s.Index, s.FeedAge, s.Keeper, s.LastError)
		}
	}
}
