package blobs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
)

// grove is a few stores over one network in memory, in a synctest bubble.
type grove struct {
	t     *testing.T
	net   *peers.Net
	nodes []*simNode
}

type simNode struct {
	*Store
	t      *testing.T
	id     peer.ID
	fs     *vfs.MemFS
	disk   *store.Store
	db     *pebble.DB
	end    *peers.Endpoint
	cancel context.CancelFunc
	done   sync.WaitGroup
	low    atomic.Bool
	cfg    func(*Config)

	mu   sync.Mutex // guards late
	late []peer.ID
}

func simID(i int) peer.ID { return peer.ID(fmt.Sprintf("node-%d", i)) }

// inGrove runs f with n nodes.
func inGrove(t *testing.T, n int, f func(t *testing.T, g *grove), tune ...func(*Config)) {
	synctest.Test(t, func(t *testing.T) {
		const seed = 7
		g := &grove{t: t, net: peers.NewNet(seed)}
		for i := range n {
			nd := &simNode{t: t, id: simID(i), fs: vfs.NewCrashableMem()}
			nd.cfg = func(c *Config) {
				for _, f := range tune {
					f(c)
				}
			}
			g.nodes = append(g.nodes, nd)
			nd.start(g)
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
	db := disk.DB()
	nd.end = g.net.Join(nd.id)
	cfg := Config{
		Self: nd.id, DB: db, Peers: nd.end, Low: nd.low.Load, Log: slog.New(slog.DiscardHandler),
		Holders: func() []peer.ID {
			var ids []peer.ID
			for _, o := range g.nodes {
				ids = append(ids, o.id)
			}
			return ids
		},
	}
	nd.cfg(&cfg)
	s, err := Open(cfg)
	if err != nil {
		nd.t.Fatal(err)
	}
	s.SetOnAcked(func(_ Hash, id peer.ID) {
		nd.mu.Lock()
		defer nd.mu.Unlock()
		nd.late = append(nd.late, id)
	})
	nd.disk, nd.db, nd.Store = disk, db, s
	ctx, cancel := context.WithCancel(context.Background())
	nd.cancel = cancel
	nd.done.Go(func() {
		if err := s.Run(ctx); !errors.Is(err, context.Canceled) {
			nd.t.Errorf("Run: %v", err)
		}
	})
}

func (nd *simNode) stop() {
	if nd.db == nil {
		return
	}
	nd.cancel()
	nd.done.Wait()
	if err := nd.Store.Close(); err != nil {
		nd.t.Error(err)
	}
	if err := nd.disk.Close(); err != nil {
		nd.t.Error(err)
	}
	nd.db = nil
}

// crash loses everything that was not synced, and starts again from what was.
func (nd *simNode) crash(g *grove) {
	after := nd.fs.CrashClone(vfs.CrashCloneCfg{})
	g.net.Kill(nd.id)
	nd.stop()
	nd.fs = after
	nd.start(g)
}

func (nd *simNode) lateAcks() []peer.ID {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	return append([]peer.ID(nil), nd.late...)
}

func (g *grove) ids(nodes ...int) []peer.ID {
	var ids []peer.ID
	for _, i := range nodes {
		ids = append(ids, simID(i))
	}
	return ids
}

func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	// ChaCha8.Read never fails.
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1}).Read(b)
	return b
}

func (nd *simNode) write(b []byte) Link {
	nd.t.Helper()
	l, err := nd.WriteStream(context.Background(), bytes.NewReader(b))
	if err != nil {
		nd.t.Fatal(err)
	}
	return l
}

func (nd *simNode) put(n Node) Link {
	nd.t.Helper()
	l, err := nd.Put(n)
	if err != nil {
		nd.t.Fatal(err)
	}
	return l
}

func (nd *simNode) mustRead(root Hash, want []byte) {
	nd.t.Helper()
	r, err := nd.OpenStream(root)
	if err != nil {
		nd.t.Fatalf("%s: %v", nd.id, err)
	}
	got, err := io.ReadAll(r)
	if err != nil {
		nd.t.Fatalf("%s: %v", nd.id, err)
	}
	if !bytes.Equal(got, want) {
		nd.t.Fatalf("%s: the stream differs", nd.id)
	}
	if err := r.Close(); err != nil {
		nd.t.Fatal(err)
	}
}

// eventually waits in virtual time for a condition.
func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}
