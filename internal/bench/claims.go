package bench

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	ds "github.com/ipfs/go-datastore"
	dssync "github.com/ipfs/go-datastore/sync"
	record "github.com/libp2p/go-libp2p-record"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/arbiter"
)

const (
	// claimCount is how many instances a mass failure leaves behind.
	claimCount  = 10_000
	claimNodes  = 5
	claimWithin = 2 * time.Minute
	// claimBody is about what an instance's register holds: its component, artifact, successors.
	claimBody = 300
)

// claims has five arbiters, with TCP and disks of this machine between them, take over what two nodes owned that die, the arbiter's leader among them:
// the survivors claim all of it at once, each register by a call of its own, as neighbours do. The clock starts with the deaths. Each run is a group of
// its own.
func claims(ctx context.Context, cfg Config, count int) (_ Result, err error) {
	var took []float64
	for run := range cfg.Runs {
		one, err := massFailure(ctx, count)
		if err != nil {
			return Result{}, err
		}
		took = append(took, ms(one))
		cfg.say("run %d of %d: %d claims committed %.0f ms after the deaths of the leader and another node", run+1, cfg.Runs, count, took[run])
	}
	return summary(fmt.Sprintf("leader and another of %d nodes die → %d claims by the others committed", claimNodes, count), "ms", took), nil
}

// massFailure is one run of claims.
func massFailure(ctx context.Context, count int) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimWithin)
	defer cancel()
	g, err := newGroup(claimNodes)
	if g != nil {
		defer func() { err = errors.Join(err, g.close()) }()
	}
	if err != nil {
		return 0, err
	}
	if err := g.settle(ctx); err != nil {
		return 0, err
	}
	lost, left, err := g.doomed()
	if err != nil {
		return 0, err
	}
	keys := make([]string, count)
	for i := range keys {
		keys[i] = fmt.Sprintf("inst/app/c-%d", i)
	}
	body := bytes.Repeat([]byte{'b'}, claimBody)
	epochs := make([]uint64, count)
	if err := g.each(keys, lost, func(n *claimer, i int) error {
		reg, err := n.arb.Claim(ctx, arbiter.ClaimRequest{Key: keys[i], Owner: n.dht.ID(), Boot: 1, Body: body})
		epochs[i] = reg.Epoch
		return err
	}); err != nil {
		return 0, fmt.Errorf("first owners: %w", err)
	}
	begun := time.Now()
	g.kill(lost)
	if err := g.each(keys, left, func(n *claimer, i int) error {
		_, err := n.arb.Claim(ctx, arbiter.ClaimRequest{Key: keys[i], Expect: epochs[i], Owner: n.dht.ID(), Boot: 1, Body: body})
		return err
	}); err != nil {
		return 0, fmt.Errorf("claims: %w", err)
	}
	return time.Since(begun), nil
}

// claimer is a node as far as claims need one.
type claimer struct {
	dht   *dht.DHT
	arb   *arbiter.Arbiter
	end   context.CancelFunc // of its arbiter
	since time.Time          // it lives, or is dead
	dead  bool
}

// claimGroup is some of them in this process.
type claimGroup struct {
	dir    string
	nodes  []*claimer
	cancel context.CancelFunc
	goes   sync.WaitGroup

	mu    sync.Mutex // guards the rest, and what lives
	addrs map[peer.ID][]ma.Multiaddr
	subs  []func(old, now arbiter.Member)
}

func newGroup(n int) (*claimGroup, error) {
	dir, err := os.MkdirTemp("", "cop")
	if err != nil {
		return nil, fmt.Errorf("a folder for the arbiters: %w", err)
	}
	run, cancel := context.WithCancel(context.Background())
	g := &claimGroup{dir: dir, cancel: cancel, addrs: map[peer.ID][]ma.Multiaddr{}}
	for i := range n {
		if err := g.add(run, i); err != nil {
			return g, err
		}
	}
	return g, nil
}

func (g *claimGroup) add(run context.Context, i int) error {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return fmt.Errorf("an identity: %w", err)
	}
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	n := &claimer{since: time.Now()}
	run, n.end = context.WithCancel(run)
	n.dht, err = dht.New(dht.Config{
		Cluster: "bench", Identity: key, Profile: dht.ProfileLocal, Listen: []string{"/ip4/127.0.0.1/tcp/0"}, Log: quiet,
		Datastore: dssync.MutexWrap(ds.NewMapDatastore()), Validator: record.NamespacedValidator{},
		Member: func(id peer.ID) bool { return g.at(id) != nil }, Addrs: g.at,
		Certificate: func() []byte { return nil }, Info: func() []byte { return nil },
	})
	if err != nil {
		return err
	}
	g.mu.Lock()
	g.nodes = append(g.nodes, n)
	g.mu.Unlock()
	if err := n.dht.Start(); err != nil {
		return err
	}
	g.mu.Lock()
	g.addrs[n.dht.ID()] = n.dht.Host().Addrs()
	g.mu.Unlock()
	var mu sync.Mutex
	nonces := mrand.New(mrand.NewPCG(7, uint64(i)))
	n.arb, err = arbiter.New(arbiter.Config{
		Self: n.dht.ID(), Boot: 1, Peers: n.dht.Peers(), Links: n.dht.Peers(), Members: g, FS: vfs.Default, Dir: fmt.Sprintf("%s/%d", g.dir, i), Log: quiet,
		Rand: func() uint64 { mu.Lock(); defer mu.Unlock(); return nonces.Uint64() },
	})
	if err != nil {
		return err
	}
	if i == 0 {
		if _, err := n.arb.Bootstrap(""); err != nil {
			return err
		}
	}
	g.goes.Go(func() { n.arb.Run(run) }) //nolint:errcheck // ends with run
	return nil
}

func (g *claimGroup) at(id peer.ID) []ma.Multiaddr {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.addrs[id]
}

// List implements arbiter.Members: all know at once who is dead, as they do of a process whose connections are reset.
func (g *claimGroup) List() []arbiter.Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []arbiter.Member
	for _, n := range g.nodes {
		if g.addrs[n.dht.ID()] != nil {
			out = append(out, n.member())
		}
	}
	return out
}

// member is a node as its members see it. It is old enough to vote.
func (n *claimer) member() arbiter.Member {
	m := arbiter.Member{ID: n.dht.ID(), Boot: 1, Alive: !n.dead, Dead: n.dead, For: time.Since(n.since)}
	if m.Alive {
		m.For += time.Hour
	}
	return m
}

// Subscribe implements arbiter.Members.
func (g *claimGroup) Subscribe(f func(old, now arbiter.Member)) (cancel func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.subs = append(g.subs, f)
	return func() {} // it ends with the group
}

// doomed are the two that are to die: the leader, and another one.
func (g *claimGroup) doomed() (lost, left []*claimer, err error) {
	for _, n := range g.nodes {
		if n.arb.Status().Role == "leader" {
			lost = append(lost, n)
		} else {
			left = append(left, n)
		}
	}
	if len(lost) != 1 {
		return nil, nil, fmt.Errorf("%d of the arbiters lead", len(lost))
	}
	return append(lost, left[0]), left[1:], nil
}

// kill takes nodes off the network, all at once: their connections break and their ports refuse. What goes on in them hears of it, and ends.
func (g *claimGroup) kill(lost []*claimer) {
	for _, n := range lost {
		g.goes.Go(func() {
			defer n.end()
			_ = n.dht.Host().Network().Close() // of a node that is dead; close ends it in order
		})
	}
	g.mu.Lock()
	var told []func()
	for _, n := range lost {
		was := n.member()
		n.dead, n.since = true, time.Now()
		for _, f := range g.subs {
			told = append(told, func() { f(was, n.member()) })
		}
	}
	g.mu.Unlock()
	for _, f := range told {
		f()
	}
}

// settle waits until all of them vote.
func (g *claimGroup) settle(ctx context.Context) error {
	for {
		ready := true
		for _, n := range g.nodes {
			st := n.arb.Status()
			ready = ready && st.HasLeader && len(st.Voters) == len(g.nodes)
		}
		if ready {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the arbiters do not all vote: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// each runs f for every key, all at once, at these nodes in turn.
func (g *claimGroup) each(keys []string, at []*claimer, f func(n *claimer, i int) error) error {
	var failed atomic.Pointer[error]
	var wait sync.WaitGroup
	for i := range keys {
		wait.Go(func() {
			if err := f(at[i%len(at)], i); err != nil {
				failed.CompareAndSwap(nil, &err)
			}
		})
	}
	wait.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

func (g *claimGroup) close() error {
	g.cancel()
	g.goes.Wait()
	var errs []error
	for _, n := range g.nodes {
		if n.arb != nil {
			errs = append(errs, n.arb.Close())
		}
		errs = append(errs, n.dht.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(g.dir))...)
}
