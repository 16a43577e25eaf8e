package records_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	ds "github.com/ipfs/go-datastore"
	dssync "github.com/ipfs/go-datastore/sync"
	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	mocknet "github.com/libp2p/go-libp2p/p2p/net/mock"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/records"
)

// forest is many nodes of the real DHT (host's door, kad-dht, records) over libp2p's network in memory, in virtual time. What tells its
// nodes of deaths is the crowd, in place of gossip: each hears of the members in its capped view, and of no others.
type forest struct {
	t     *testing.T
	mn    mocknet.Mocknet
	rng   *rand.Rand
	crowd *crowd
	nodes []*tree
	at    map[peer.ID]*tree

	linking sync.Mutex // guards making links

	mu   sync.Mutex  // guards hops
	hops map[int]int // of records' lookups, how many took so many
}

// crowd is the view of everybody, as the member table is.
type crowd struct {
	mu    sync.Mutex // guards the rest
	alive []peer.ID
	up    map[peer.ID]bool
	subs  []func()
}

func (c *crowd) Alive() []peer.ID {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.alive)
}

func (c *crowd) Closest(key string, n int) ([]peer.ID, bool) {
	ids := keys.Sort(keys.Of(key), c.Alive())
	return ids[:min(n, len(ids))], true
}

func (c *crowd) OnChange(f func()) func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subs = append(c.subs, f)
	return func() {} // for as long as the test
}

func (c *crowd) isUp(id peer.ID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.up[id]
}

func (c *crowd) bury(dead ...peer.ID) {
	c.mu.Lock()
	c.alive = slices.DeleteFunc(slices.Clone(c.alive), func(id peer.ID) bool { return slices.Contains(dead, id) })
	for _, id := range dead {
		c.up[id] = false
	}
	subs := slices.Clone(c.subs)
	c.mu.Unlock()
	for _, f := range subs {
		f()
	}
}

// tree is one node.
type tree struct {
	*records.Records
	f      *forest
	id     peer.ID
	key    crypto.PrivKey
	addr   ma.Multiaddr
	dht    *dht.DHT
	host   *mockHost
	caller *peers.Caller
	view   records.View
	cancel context.CancelFunc
	done   sync.WaitGroup
	up     bool

	mu   sync.Mutex // guards knew
	knew map[peer.ID]bool
}

func plant(t *testing.T, n, most int, seed uint64) *forest {
	f := &forest{
		t: t, mn: mocknet.New(), rng: rand.New(rand.NewPCG(seed, 1)), at: map[peer.ID]*tree{}, hops: map[int]int{},
		crowd: &crowd{up: map[peer.ID]bool{}},
	}
	f.mn.SetLinkDefaults(mocknet.LinkOptions{Latency: 500 * time.Microsecond})
	var b [32]byte
	for i := range n {
		for j := range b {
			b[j] = byte(f.rng.Uint32())
		}
		k, _, err := crypto.GenerateEd25519Key(rand.NewChaCha8(b))
		if err != nil {
			t.Fatal(err)
		}
		id, err := peer.IDFromPrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		tr := &tree{f: f, id: id, key: k, addr: ma.StringCast(fmt.Sprintf("/ip4/10.0.%d.%d/tcp/7400", i/250, 1+i%250)), knew: map[peer.ID]bool{}}
		f.nodes, f.at[id] = append(f.nodes, tr), tr
		f.crowd.alive, f.crowd.up[id] = append(f.crowd.alive, id), true
	}
	for i, tr := range f.nodes {
		tr.grow(most, uint64(i))
	}
	for _, tr := range f.nodes {
		tr.look()
	}
	return f
}

// grow starts the node.
func (tr *tree) grow(most int, seed uint64) {
	f := tr.f
	store := dssync.MutexWrap(ds.NewMapDatastore())
	log := slog.New(slog.DiscardHandler)
	late := &lateStore{}
	validator := records.NewValidator(nil)
	tr.view = records.Cap(f.crowd, tr.id, most)
	var err error
	tr.dht, err = dht.New(dht.Config{
		Cluster: "forest", Identity: tr.key, Listen: []string{tr.addr.String()}, NewHost: tr.newHost, Datastore: late, Validator: validator,
		Member: func(peer.ID) bool { return true }, Alive: tr.usable, Members: tr.view.Alive, Addrs: tr.addrs, Log: log,
	})
	if err != nil {
		f.t.Fatal(err)
	}
	tr.caller = peers.NewCaller(tr.dht.Peers())
	tr.Records, err = records.Open(records.Config{
		Self: tr.id, Key: tr.key, Store: store, Peers: tr.dht.Peers(), Caller: tr.caller, View: tr.view, Route: tr.route,
		Rand: rand.New(rand.NewPCG(seed, 2)), Log: log,
	})
	if err != nil {
		f.t.Fatal(err)
	}
	late.Batching = tr.Datastore()
	if err := tr.dht.Start(); err != nil {
		f.t.Fatal(err)
	}
	tr.view.OnChange(tr.look)
	ctx, cancel := context.WithCancel(context.Background())
	tr.cancel, tr.up = cancel, true
	tr.done.Go(func() {
		if err := tr.Run(ctx); !errors.Is(err, context.Canceled) {
			f.t.Errorf("Run: %v", err)
		}
	})
}

// lateStore is kad-dht's datastore, which belongs to the records, which need the host that comes with kad-dht.
type lateStore struct{ ds.Batching }

// look brings the routing table after a change of the node's view, as a node does.
func (tr *tree) look() {
	known := tr.view.Alive()
	tr.mu.Lock()
	var gone []peer.ID
	for id, here := range tr.knew {
		if here && !tr.f.crowd.isUp(id) {
			gone = append(gone, id)
			tr.knew[id] = false
		}
	}
	for _, id := range known {
		tr.knew[id] = true
	}
	tr.mu.Unlock()
	if !tr.up {
		return
	}
	for _, id := range gone {
		tr.dht.Kad().Evict(id)
	}
	for _, id := range known {
		tr.dht.Kad().Include(id)
	}
}

// usable: a death is known of those only that were in the view.
func (tr *tree) usable(id peer.ID) bool {
	tr.mu.Lock()
	_, knew := tr.knew[id]
	tr.mu.Unlock()
	return !knew || tr.f.crowd.isUp(id)
}

// addrs: addresses are known of those only that were in the view; the others' come with the lookup.
func (tr *tree) addrs(id peer.ID) []ma.Multiaddr {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if _, knew := tr.knew[id]; knew {
		return []ma.Multiaddr{tr.f.at[id].addr}
	}
	return nil
}

func (tr *tree) route(ctx context.Context, key string, most int) ([]peer.ID, int, error) {
	ids, hops, err := tr.dht.Kad().Closest(ctx, key)
	if err == nil && len(ids) == 1 {
		err = errors.New("nobody answered")
	}
	if err != nil {
		return nil, 0, err
	}
	tr.f.mu.Lock()
	tr.f.hops[hops]++
	tr.f.mu.Unlock()
	return ids[:min(most, len(ids))], hops, nil
}

// mockHost is a host over libp2p's network in memory that dials whom it has an address of, and nobody dead.
type mockHost struct {
	host.Host
	f      *forest
	limits network.ResourceManager
	conns  connmgr.ConnManager
}

func (tr *tree) newHost(p dht.HostParams) (host.Host, error) {
	h, err := tr.f.mn.AddPeer(p.Identity, tr.addr)
	if err != nil {
		return nil, err
	}
	tr.host = &mockHost{Host: h, f: tr.f, limits: p.Limits, conns: p.Conns}
	h.Network().Notify(p.Conns.Notifee())
	return tr.host, nil
}

func (h *mockHost) ConnManager() connmgr.ConnManager { return h.conns }

func (h *mockHost) Connect(ctx context.Context, to peer.AddrInfo) error {
	h.Peerstore().AddAddrs(to.ID, to.Addrs, time.Minute)
	if len(h.Peerstore().Addrs(to.ID)) == 0 {
		return swarm.ErrNoAddresses
	}
	if err := h.f.link(h.ID(), to.ID); err != nil {
		return err
	}
	return h.Host.Connect(ctx, to)
}

func (h *mockHost) Close() error {
	return errors.Join(h.Host.Close(), h.conns.Close(), h.limits.Close())
}

// link makes a dial possible.
func (f *forest) link(a, b peer.ID) error {
	f.linking.Lock()
	defer f.linking.Unlock()
	if !f.at[a].up || !f.at[b].up {
		return errors.New("connection refused")
	}
	if len(f.mn.LinksBetweenPeers(a, b)) > 0 {
		return nil
	}
	_, err := f.mn.LinkPeers(a, b)
	return err
}

// fell ends a node's process without a word: its connections are reset, and dials of it are refused.
func (tr *tree) fell() {
	tr.f.linking.Lock()
	up := tr.up
	tr.up = false
	tr.f.linking.Unlock()
	if !up {
		return
	}
	for _, o := range tr.f.nodes {
		if len(tr.f.mn.LinksBetweenPeers(tr.id, o.id)) > 0 {
			if err := tr.f.mn.UnlinkPeers(tr.id, o.id); err != nil {
				tr.f.t.Error(err)
			}
		}
	}
	tr.cancel()
	if err := tr.dht.Close(); err != nil {
		tr.f.t.Error(err)
	}
	tr.caller.Close()
	tr.done.Wait()
	if err := tr.Records.Close(); err != nil {
		tr.f.t.Error(err)
	}
}

// fellAll ends all nodes.
func (f *forest) fellAll() {
	for _, tr := range f.nodes {
		tr.fell()
	}
	if err := f.mn.Close(); err != nil {
		f.t.Error(err)
	}
}

// someone returns a living node.
func (f *forest) someone() *tree {
	for {
		if tr := f.nodes[f.rng.IntN(len(f.nodes))]; tr.up {
			return tr
		}
	}
}

// copies returns how many of the closest living nodes hold a key with this value.
func (f *forest) copies(key, value string, of int) int {
	ids, _ := f.crowd.Closest(key, of)
	n := 0
	for _, id := range ids {
		recs := f.at[id].Local(key)
		if len(recs) > 0 && recs[0].Key == key && string(recs[0].Value) == value {
			n++
		}
	}
	return n
}
