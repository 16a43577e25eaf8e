package records

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
)

// simKeys are made once: the same nodes in every test.
var simKeys = sync.OnceValue(func() []crypto.PrivKey {
	var list []crypto.PrivKey
	for i := range 40 {
		k, _, err := crypto.GenerateEd25519Key(rand.NewChaCha8([32]byte{byte(i), 1}))
		if err != nil {
			panic(err)
		}
		list = append(list, k)
	}
	return list
})

func simID(i int) peer.ID {
	id, err := peer.IDFromPrivateKey(simKeys()[i])
	if err != nil {
		panic(err)
	}
	return id
}

// simView is one view that all nodes share, as if gossip were instant.
type simView struct {
	mu    sync.Mutex
	alive []peer.ID
	subs  []func()
}

func (v *simView) Alive() []peer.ID {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.alive)
}

func (v *simView) Closest(key string, n int) ([]peer.ID, bool) {
	ids := keys.Sort(keys.Of(key), v.Alive())
	return ids[:min(n, len(ids))], true
}

func (v *simView) OnChange(f func()) func() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.subs = append(v.subs, f)
	return func() {}
}

func (v *simView) set(id peer.ID, up bool) {
	v.mu.Lock()
	v.alive = slices.DeleteFunc(v.alive, func(p peer.ID) bool { return p == id })
	if up {
		v.alive = append(v.alive, id)
	}
	subs := slices.Clone(v.subs)
	v.mu.Unlock()
	for _, f := range subs {
		f()
	}
}

type grove struct {
	t     *testing.T
	net   *peers.Net
	view  *simView
	nodes []*simNode
}

type simNode struct {
	*Records
	t      *testing.T
	i      int
	id     peer.ID
	fs     *vfs.MemFS
	disk   *store.Store
	end    *peers.Endpoint
	caller *peers.Caller
	cancel context.CancelFunc
	done   sync.WaitGroup
	up     bool
	tune   func(*Config)
}

func inGrove(t *testing.T, n int, f func(t *testing.T, g *grove), tune ...func(*Config)) {
	synctest.Test(t, func(t *testing.T) {
		g := &grove{t: t, net: peers.NewNet(11), view: &simView{}}
		for i := range n {
			nd := &simNode{t: t, i: i, id: simID(i), fs: vfs.NewCrashableMem(), tune: func(c *Config) {
				for _, f := range tune {
					f(c)
				}
			}}
			g.nodes = append(g.nodes, nd)
			nd.start(g)
			g.view.set(nd.id, true)
		}
		defer func() {
			for _, nd := range g.nodes {
				nd.stop()
			}
			g.net.Close()
		}()
		f(t, g)
	})
}

func (nd *simNode) start(g *grove) {
	disk, err := store.Open(nd.fs, "db", store.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		nd.t.Fatal(err)
	}
	nd.disk, nd.end = disk, g.net.Join(nd.id)
	nd.caller = peers.NewCaller(nd.end)
	cfg := Config{
		Self: nd.id, Key: simKeys()[nd.i], Store: disk.Datastore("dht", store.NoSync()), Peers: nd.end, Caller: nd.caller,
		View: g.view, Rand: rand.New(rand.NewPCG(uint64(nd.i), 3)),
		Member: func(id peer.ID) bool {
			return slices.ContainsFunc(g.nodes, func(o *simNode) bool { return o.id == id })
		},
		Route: func(context.Context, string, int) ([]peer.ID, int, error) {
			nd.t.Error("a lookup on a whole view")
			return nil, 0, errors.New("not here")
		},
	}
	nd.tune(&cfg)
	r, err := Open(cfg)
	if err != nil {
		nd.t.Fatal(err)
	}
	nd.Records, nd.up = r, true
	ctx, cancel := context.WithCancel(context.Background())
	nd.cancel = cancel
	nd.done.Go(func() {
		if err := r.Run(ctx); !errors.Is(err, context.Canceled) {
			nd.t.Errorf("Run: %v", err)
		}
	})
}

func (nd *simNode) stop() {
	if !nd.up {
		return
	}
	nd.up = false
	nd.cancel()
	nd.done.Wait()
	if err := nd.Records.Close(); err != nil {
		nd.t.Error(err)
	}
	nd.caller.Close()
	if err := nd.disk.Close(); err != nil {
		nd.t.Error(err)
	}
}

// kill ends the node's process without a word and, as watchers would, tells the view after a while.
func (g *grove) kill(i int, noticed bool) {
	g.net.Kill(g.nodes[i].id)
	g.nodes[i].stop()
	if noticed {
		g.view.set(g.nodes[i].id, false)
	}
}

// holders returns the nodes that have a version of the key.
func (g *grove) holders(key string, revision uint64) []int {
	var have []int
	for i, nd := range g.nodes {
		if !nd.up {
			continue
		}
		if e, ok := nd.local.get(key); ok && e.version.Revision == revision {
			have = append(have, i)
		}
	}
	return have
}

// closest returns the indexes of the nodes closest to a key.
func (g *grove) closest(key string, n int) []int {
	var list []int
	ids, _ := g.view.Closest(key, n)
	for _, id := range ids {
		list = append(list, slices.IndexFunc(g.nodes, func(o *simNode) bool { return o.id == id }))
	}
	return list
}

func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}
