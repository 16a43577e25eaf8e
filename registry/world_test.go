package registry

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// registers are the arbiter's, seen by all nodes at once; views may be held back.
type registers struct {
	mu     sync.Mutex
	bodies map[string][]byte
	hidden bool  // local views show nothing
	broken error // of transactions
}

func (r *registers) Get(key string) (arbiter.Register, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b, ok := r.bodies[key]
	return arbiter.Register{Key: key, Body: b}, ok && !r.hidden
}

func (r *registers) List(prefix string) []arbiter.Register {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []arbiter.Register
	for _, k := range slices.Sorted(maps.Keys(r.bodies)) {
		if strings.HasPrefix(k, prefix) && !r.hidden {
			out = append(out, arbiter.Register{Key: k, Body: r.bodies[k]})
		}
	}
	return out
}

func (r *registers) Txn(_ context.Context, q arbiter.TxnRequest) (arbiter.TxnResult, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken != nil {
		return arbiter.TxnResult{}, r.broken
	}
	res := arbiter.TxnResult{Succeeded: true}
	for _, c := range q.Compares {
		b, ok := r.bodies[c.Key]
		if ok {
			res.Registers = append(res.Registers, arbiter.Register{Key: c.Key, Body: b})
		}
		if c.Field != "exists" || ok != (c.Equal == 1) {
			res.Succeeded = false
		}
	}
	if res.Succeeded {
		for _, op := range q.Then {
			r.bodies[op.Put.Key] = op.Put.Body
		}
	}
	return res, nil
}

// world is a few nodes' registries over a network in memory, in a synctest bubble. Files are real.
type world struct {
	t     *testing.T
	net   *peers.Net
	log   *registers
	nodes []*node
}

type node struct {
	*Registry
	w     *world
	id    peer.ID
	blobs *blobs.Store
	stop  func()

	mu       sync.Mutex // guards the fields below
	notices  []Notice
	describe Describer
}

func inWorld(t *testing.T, n int, f func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, net: peers.NewNet(7), log: &registers{bodies: map[string][]byte{}}}
		for i := range n {
			w.nodes = append(w.nodes, &node{w: w, id: peer.ID(fmt.Sprintf("node-%d", i))})
		}
		for _, nd := range w.nodes {
			nd.start(t.TempDir())
		}
		defer func() {
			for _, nd := range w.nodes {
				nd.stop()
			}
			w.net.Close()
		}()
		f(w)
	})
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) ids(n int) []peer.ID {
	var out []peer.ID
	for _, nd := range w.nodes[:min(n, len(w.nodes))] {
		out = append(out, nd.id)
	}
	return out
}

func (n *node) start(dir string) {
	w := n.w
	disk, err := store.Open(vfs.NewMem(), "db", store.Options{Log: slog.New(slog.DiscardHandler)})
	w.must(err)
	n.blobs, err = blobs.Open(blobs.Config{Self: n.id, DB: disk.DB(), Peers: w.net.Join(n.id), Log: slog.New(slog.DiscardHandler), Holders: func() []peer.ID { return w.ids(99) }})
	w.must(err)
	nonce := uint64(0)
	n.Registry, err = New(Config{
		Self: n.id, Cache: filepath.Join(dir, "cache"), Drop: filepath.Join(dir, "plugins"), Blobs: n.blobs, Arbiter: w.log,
		Holders: func(_ string, k int) []peer.ID { return w.ids(k) }, Alive: func() []peer.ID { return w.ids(99) },
		Describe: func(ctx context.Context, f *os.File) (*componentv1.Description, error) {
			n.mu.Lock()
			d := n.describe
			n.mu.Unlock()
			if d == nil {
				d = describeByName
			}
			return d(ctx, f)
		},
		Nonce:  func() uint64 { nonce++; return nonce },
		Notify: func(x Notice) { n.mu.Lock(); defer n.mu.Unlock(); n.notices = append(n.notices, x) },
		Log:    slog.New(slog.DiscardHandler),
	})
	w.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	var goes sync.WaitGroup
	goes.Go(func() { n.blobs.Run(ctx) }) //nolint:errcheck // ends with ctx
	n.stop = func() {
		cancel()
		goes.Wait()
		n.blobs.Close() //nolint:errcheck // of a test
		disk.Close()    //nolint:errcheck // of a test
	}
}

// describeByName: the file's body says "component NAME VERSION", or is none.
func describeByName(_ context.Context, f *os.File) (*componentv1.Description, error) {
	b, err := os.ReadFile(f.Name())
	if err != nil {
		return nil, err
	}
	_, rest, ok := strings.Cut(string(b), "component ")
	if !ok {
		return nil, ErrNoHandshake
	}
	words := strings.Fields(rest)
	return &componentv1.Description{Type: words[0], Version: words[1]}, nil
}

func (n *node) noticed(typ string) []Notice {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(n.notices), func(x Notice) bool { return x.Type != typ })
}

// machineHere is this machine in ELF.
func machineHere() elf.Machine {
	return map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "riscv64": elf.EM_RISCV}[runtime.GOARCH]
}

// component is an executable for a machine that says what it is, with so many bytes of ballast.
func component(machine elf.Machine, name, version string, ballast int) []byte {
	b := elfFile(machine)
	return append(append(b, []byte(" component "+name+" "+version+" ")...), make([]byte, ballast)...)
}

// file writes bytes to a file and opens it.
func (w *world) file(name string, b []byte) *os.File {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), name)
	w.must(os.WriteFile(path, b, 0o700))
	f, err := os.Open(path)
	w.must(err)
	w.t.Cleanup(func() { f.Close() })
	return f
}

func (w *world) eventually(within time.Duration, what string, cond func() bool) {
	w.t.Helper()
	for end := time.Now().Add(within); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			for _, n := range w.nodes {
				w.t.Logf("%s: %+v, notices %+v", n.id, n.Drops(), n.notices)
			}
			w.t.Fatalf("not within %s: %s", within, what)
		}
	}
}

func isPushError(err error) bool {
	var p *PushError
	return errors.As(err, &p)
}
