package dht

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/coppice-project/coppice/dht/keys"
	kaddht "github.com/libp2p/go-libp2p-kad-dht"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	kadrecords "github.com/libp2p/go-libp2p-kad-dht/records"
	record "github.com/libp2p/go-libp2p-record"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

func protocolOf(s string) protocol.ID { return protocol.ID(s) }

// put stores a record on one node as package records does: through the value store over the shared datastore.
func put(t testing.TB, n *testNode, key, value string) {
	t.Helper()
	vs := kadrecords.NewValueStore(n.cfg.Datastore, record.NamespacedValidator{Namespace: anyRecord{}}, 0)
	if err := vs.Put(t.Context(), key, record.MakePutRecord(key, []byte(value))); err != nil {
		t.Fatal(err)
	}
}

// A lookup through the network names the same nodes in the same order as arithmetic over the member list, on every node and for every
// key.
func TestClosestAgreesWithTheMetric(t *testing.T) {
	nodes := startCluster(t, 10)
	var ids []peer.ID
	for _, n := range nodes {
		ids = append(ids, n.ID())
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range 20 {
		key := fmt.Sprintf("/kb/key-%d", rng.Uint64())
		n := nodes[i%len(nodes)]
		got, hops, err := n.Kad().Closest(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		want := keys.Sort(keys.Of(key), slices.Clone(ids))[:BucketSize]
		if !slices.Equal(got, want) {
			t.Fatalf("%s from %s:\n got %v\nwant %v", key, n.ID(), got, want)
		}
		if self := got[0] == n.ID(); self != (hops == 0) {
			t.Fatalf("%d hops to the closest, which is self: %v", hops, self)
		}
	}
}

// With routing tables that hold a few neighbours only, lookups still find the closest of all, over several hops.
func TestClosestThroughCappedTables(t *testing.T) {
	const n, near = 16, 2
	f := startFounder(t, nil)
	nodes := []*testNode{f}
	for range n - 1 {
		nodes = append(nodes, startNode(t, f.arb, nil))
	}
	var ids []peer.ID
	for _, a := range nodes {
		ids = append(ids, a.ID())
		a.mu.Lock()
		for _, b := range nodes {
			a.view[b.ID()] = b.Host().Addrs()
		}
		a.mu.Unlock()
	}
	for i, a := range nodes {
		for j := range near {
			a.Kad().Include(nodes[(i+j+1)%n].ID())
		}
	}
	for _, a := range nodes {
		if err := a.Kad().Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range n {
		key := fmt.Sprintf("/kb/key-%d", rng.Uint64())
		want := keys.Sort(keys.Of(key), slices.Clone(ids))[:5]  // as many as hold a record
		eventually(t, "the five closest to "+key, func() bool { // tables take peers in after the lookup that met them
			got, _, err := nodes[i].Kad().Closest(t.Context(), key)
			return err == nil && slices.Equal(got[:5], want)
		})
	}
}

func TestKadAlone(t *testing.T) {
	f := startFounder(t, nil)
	ids, hops, err := f.Kad().Closest(t.Context(), "/kb/x")
	if err != nil || hops != 0 || !slices.Equal(ids, []peer.ID{f.ID()}) {
		t.Fatal(ids, hops, err)
	}
	if _, _, _, err := f.Kad().GetValue(t.Context(), "/kb/x"); !errors.Is(err, ErrNoRecord) {
		t.Fatal(err)
	}
	put(t, f, "/kb/x", "here")
	v, hops, copies, err := f.Kad().GetValue(t.Context(), "/kb/x")
	if err != nil || string(v) != "here" || hops != 0 || copies != 1 {
		t.Fatalf("%q %d %d %v", v, hops, copies, err)
	}
}

// GetValue finds the best of the copies and counts those that are equal to it; it writes nothing.
func TestGetValueCountsCopies(t *testing.T) {
	nodes := startCluster(t, 5)
	put(t, nodes[1], "/kb/k", "newest")
	put(t, nodes[2], "/kb/k", "newest")
	put(t, nodes[3], "/kb/k", "old")
	for range 2 { // the first did not spread copies
		v, hops, copies, err := nodes[0].Kad().GetValue(t.Context(), "/kb/k")
		if err != nil || string(v) != "newest" || hops != 1 || copies != 2 {
			t.Fatalf("%q, %d hops, %d copies, %v", v, hops, copies, err)
		}
	}
	v, hops, copies, err := nodes[1].Kad().GetValue(t.Context(), "/kb/k")
	if err != nil || string(v) != "newest" || hops != 0 || copies != 2 {
		t.Fatalf("%q, %d hops, %d copies, %v", v, hops, copies, err)
	}
	if _, _, _, err := nodes[0].Kad().GetValue(t.Context(), "/kb/none"); !errors.Is(err, ErrNoRecord) {
		t.Fatal(err)
	}
}

// The dead are not asked and not named, also when others still name them; alive again, they are back.
func TestEvict(t *testing.T) {
	nodes := startCluster(t, 5)
	f, gone := nodes[0], nodes[4]
	if err := gone.Host().Close(); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	f.dead[gone.ID()] = true
	f.mu.Unlock()
	f.Kad().Evict(gone.ID())
	for i := range 5 {
		ids, _, err := f.Kad().Closest(t.Context(), fmt.Sprint("/kb/", i))
		if err != nil || slices.Contains(ids, gone.ID()) || len(ids) != 4 {
			t.Fatal(ids, err)
		}
	}
	if slices.Contains(f.Kad().Known(), gone.ID()) {
		t.Fatal("still in the routing table")
	}
	f.mu.Lock()
	f.dead[gone.ID()] = false
	f.mu.Unlock()
	f.Kad().Include(gone.ID())
	if !slices.Contains(f.Kad().Known(), gone.ID()) {
		t.Fatal("not back")
	}
}

// What package doc promises to programs outside: a token, a certificate, and kad-dht as it comes.
func TestStockClientReadsARecord(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 5)
	f := nodes[0]
	put(t, nodes[2], "/kb/nodes/x", "a fact")
	put(t, nodes[3], "/kb/nodes/x", "a fact")
	token := f.arb.token(t, f, 1, time.Hour)

	h := stranger(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	w, err := JoinCluster(ctx, h, token, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	stop := GreetEveryone(h, w.Cluster, w.Certificate, func(err error) { t.Log(err) })
	defer stop()
	kad, err := kaddht.New(h, kaddht.Mode(kaddht.ModeClient), kaddht.ProtocolPrefix(KadPrefix(w.Cluster)),
		kaddht.NamespacedValidator(Namespace, anyRecord{}))
	if err != nil {
		t.Fatal(err)
	}
	defer kad.Close() //nolint:errcheck // a test's
	eventually(t, "the client to know a server", func() bool { return kad.RoutingTable().Size() > 0 })
	v, err := kad.GetValue(ctx, "/kb/nodes/x")
	if err != nil || string(v) != "a fact" {
		t.Fatalf("%q, %v", v, err)
	}
	for _, n := range nodes {
		if n.member(h.ID()) {
			t.Fatal("the client got into a view")
		}
	}
	// A client's certificate opens kad-dht and nothing else.
	echo(f)
	s, err := h.NewStream(ctx, f.ID(), echoProtocol)
	if err == nil {
		_, err = s.Read(make([]byte, 1))
	}
	if err == nil {
		t.Fatal("a client was served as a member")
	}
}

// Without a certificate a stock client finds nothing.
func TestStockClientWithoutCertificateFindsNothing(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 2)
	put(t, nodes[0], "/kb/nodes/x", "a fact")
	h := stranger(t)
	if err := h.Connect(t.Context(), addrInfo(nodes[0])); err != nil {
		t.Fatal(err)
	}
	kad, err := kaddht.New(h, kaddht.Mode(kaddht.ModeClient), kaddht.ProtocolPrefix(KadPrefix(testCluster)), kaddht.NamespacedValidator(Namespace, anyRecord{}))
	if err != nil {
		t.Fatal(err)
	}
	defer kad.Close() //nolint:errcheck // a test's
	pm, err := kadpb.NewProtocolMessenger(kad.MessageSender())
	if err != nil {
		t.Fatal(err)
	}
	if rec, _, err := pm.GetValue(t.Context(), nodes[0].ID(), "/kb/nodes/x"); err == nil {
		t.Fatalf("a stranger read %v", rec)
	}
}

// AcceptPut decides which records kad-dht's own PUT_VALUE may bring.
func TestAcceptPut(t *testing.T) {
	f := startFounder(t, func(c *Config) {
		c.AcceptPut = func(_ peer.ID, key string, _ []byte) bool { return key == "/kb/yes" }
	})
	token := f.arb.token(t, f, 1, time.Hour)
	h := stranger(t)
	w, err := JoinCluster(t.Context(), h, token, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	stop := GreetEveryone(h, w.Cluster, w.Certificate, nil)
	defer stop()
	kad, err := kaddht.New(h, kaddht.Mode(kaddht.ModeClient), kaddht.ProtocolPrefix(KadPrefix(w.Cluster)), kaddht.NamespacedValidator(Namespace, anyRecord{}))
	if err != nil {
		t.Fatal(err)
	}
	defer kad.Close() //nolint:errcheck // a test's
	eventually(t, "the client to know the server", func() bool { return kad.RoutingTable().Size() > 0 })
	for _, k := range []string{"/kb/yes", "/kb/no"} {
		if err := kad.PutValue(t.Context(), k, []byte("v")); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, _, err := f.Kad().GetValue(t.Context(), "/kb/yes"); err != nil {
		t.Errorf("an accepted record: %v", err)
	}
	if _, _, _, err := f.Kad().GetValue(t.Context(), "/kb/no"); !errors.Is(err, ErrNoRecord) {
		t.Errorf("a refused record: %v", err)
	}
}
