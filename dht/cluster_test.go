package dht

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// arbiter stands for the committed registers that Admit decides by.
type arbiter struct {
	mu      sync.Mutex
	tokens  map[string]*tokenRegister
	revoked map[peer.ID]bool
	members [][]byte
	index   uint64
}

type tokenRegister struct {
	expires time.Time
	uses    int
	revoked bool
	used    map[peer.ID]bool
}

func (a *arbiter) admit(req JoinRequest) (index uint64, members [][]byte, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tokens[SecretKey(req.Secret)]
	switch {
	case t == nil:
		return 0, nil, &Refusal{Reason: UnknownToken}
	case t.revoked || a.revoked[req.ID]:
		return 0, nil, &Refusal{Reason: Revoked}
	case t.used[req.ID]: // asks again: its answer was lost
	case time.Now().After(t.expires):
		return 0, nil, &Refusal{Reason: Expired, Message: "at " + t.expires.Format(time.TimeOnly)}
	case len(t.used) >= t.uses:
		return 0, nil, &Refusal{Reason: UsedUp, Message: fmt.Sprintf("%d of %d", len(t.used), t.uses)}
	}
	t.used[req.ID] = true
	a.index++
	members = a.members
	if !req.Client {
		a.members = append(a.members, append([]byte(req.ID), req.Info...))
	}
	return a.index, members, nil
}

// testNode is a DHT with the least view that a node needs.
type testNode struct {
	*DHT
	arb  *arbiter
	logs *lines

	mu    sync.Mutex
	view  map[peer.ID][]ma.Multiaddr
	dead  map[peer.ID]bool
	cert  []byte
	heard []Certificate

	signers map[peer.ID]bool // besides the view's
}

// lines collects a node's log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte(s))
}

func newKey(t testing.TB) crypto.PrivKey {
	t.Helper()
	k, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newArbiter() *arbiter {
	return &arbiter{tokens: map[string]*tokenRegister{}, revoked: map[peer.ID]bool{}}
}

func (a *arbiter) token(t testing.TB, n *testNode, uses int, ttl time.Duration) Token {
	t.Helper()
	secret, err := NewSecret()
	if err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	expires := time.Now().Add(ttl)
	a.tokens[SecretKey(secret)] = &tokenRegister{expires: expires, uses: uses, used: map[peer.ID]bool{}}
	return n.Token(secret, expires)
}

const testCluster = "test-cluster"

func startNode(t testing.TB, arb *arbiter, change func(*Config)) *testNode {
	t.Helper()
	n := &testNode{arb: arb, logs: &lines{}, view: map[peer.ID][]ma.Multiaddr{}, dead: map[peer.ID]bool{}}
	log := slog.New(slog.NewTextHandler(n.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	st, err := store.Open(vfs.NewMem(), "db", store.Options{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Cluster: testCluster, Identity: newKey(t), Profile: ProfileLocal, RPCTimeout: 3 * time.Second,
		Datastore: st.Datastore("kad"), Validator: anyRecord{}, Log: log,
		Member: n.member, Alive: func(id peer.ID) bool { n.mu.Lock(); defer n.mu.Unlock(); return !n.dead[id] },
		Addrs:       func(id peer.ID) []ma.Multiaddr { n.mu.Lock(); defer n.mu.Unlock(); return n.view[id] },
		Members:     n.members,
		Signer:      func(id peer.ID) bool { n.mu.Lock(); defer n.mu.Unlock(); return n.signers[id] || n.view[id] != nil },
		Certificate: func() []byte { n.mu.Lock(); defer n.mu.Unlock(); return n.cert },
		Info:        n.info,
		Admit:       n.admit,
		OnCertified: func(c Certificate, info []byte) error {
			arb.mu.Lock()
			revoked := arb.revoked[c.Member]
			arb.mu.Unlock()
			if revoked {
				return &Refusal{Reason: Revoked}
			}
			n.mu.Lock()
			n.heard = append(n.heard, c)
			n.mu.Unlock()
			if c.Client {
				return nil
			}
			return n.learn(append([]byte(c.Member), info...))
		},
	}
	if change != nil {
		change(&cfg)
	}
	n.DHT, err = New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(n.Close(), st.Close()); err != nil {
			t.Error(err)
		}
	})
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	return n
}

// startFounder starts the first node, which certifies itself.
func startFounder(t testing.TB, change func(*Config)) *testNode {
	t.Helper()
	n := startNode(t, newArbiter(), change)
	cert, err := n.Certify(Certificate{Member: n.ID(), Index: 1, Incarnation: 1, Issued: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	n.mu.Lock()
	n.cert = cert
	n.mu.Unlock()
	if err := n.learn(append([]byte(n.ID()), n.info()...)); err != nil {
		t.Fatal(err)
	}
	n.arb.mu.Lock()
	n.arb.members = append(n.arb.members, append([]byte(n.ID()), n.info()...))
	n.arb.mu.Unlock()
	return n
}

func (n *testNode) member(id peer.ID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.view[id]
	return ok
}

func (n *testNode) members() []peer.ID {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []peer.ID
	for id := range n.view {
		if !n.dead[id] {
			out = append(out, id)
		}
	}
	return out
}

// info is the addresses, one a line.
func (n *testNode) info() []byte {
	var b bytes.Buffer
	for _, a := range n.Addrs() {
		fmt.Fprintln(&b, a)
	}
	return b.Bytes()
}

// idLen is the length of an Ed25519 peer id.
const idLen = 38

// learn takes id ‖ info into the view.
func (n *testNode) learn(b []byte) error {
	if len(b) < idLen {
		return errors.New("short member information")
	}
	id := peer.ID(b[:idLen])
	var text []string
	for _, l := range bytes.Fields(b[idLen:]) {
		text = append(text, string(l))
	}
	addrs, err := ParseAddrs(text)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.view[id] = addrs
	n.mu.Unlock()
	if n.DHT != nil {
		n.Kad().Include(id)
	}
	return nil
}

func (n *testNode) admit(_ context.Context, req JoinRequest) (Welcome, error) {
	index, members, err := n.arb.admit(req)
	if err != nil {
		return Welcome{}, err
	}
	if !req.Client {
		if err := n.learn(append([]byte(req.ID), req.Info...)); err != nil {
			return Welcome{}, &Refusal{Reason: BadRequest, Message: err.Error()}
		}
	}
	cert, err := n.Certify(Certificate{Member: req.ID, Index: index, Incarnation: 1, Issued: time.Now(), Client: req.Client})
	return Welcome{Certificate: cert, Members: members, Arbiters: []peer.ID{n.ID()}}, err
}

// join does what a node does on `up --join`.
func (n *testNode) join(ctx context.Context, token Token) (Welcome, error) {
	w, err := n.Join(ctx, token, n.info())
	if err != nil {
		return w, err
	}
	for _, m := range w.Members {
		if err := n.learn(m); err != nil {
			return w, err
		}
	}
	n.mu.Lock()
	n.cert = w.Certificate
	n.mu.Unlock()
	n.Greet()
	return w, nil
}

func startJoined(t testing.TB, token Token, arb *arbiter) *testNode {
	t.Helper()
	n := startNode(t, arb, nil)
	if _, err := n.join(t.Context(), token); err != nil {
		t.Fatal(err)
	}
	return n
}

// startCluster starts n nodes that all know each other.
func startCluster(t testing.TB, n int) []*testNode {
	t.Helper()
	f := startFounder(t, nil)
	token := f.arb.token(t, f, n, time.Hour)
	nodes := []*testNode{f}
	for range n - 1 {
		nodes = append(nodes, startJoined(t, token, f.arb))
	}
	for _, a := range nodes {
		for _, b := range nodes {
			if err := a.learn(append([]byte(b.ID()), b.info()...)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return nodes
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("waited 20 s for: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// anyRecord takes every value; the longer one is better, then the larger.
type anyRecord struct{}

func (anyRecord) Validate(_ string, v []byte) error {
	if len(v) == 0 {
		return errors.New("empty")
	}
	return nil
}

func (anyRecord) Select(_ string, vs [][]byte) (int, error) {
	best := 0
	for i, v := range vs {
		if len(v) > len(vs[best]) || len(v) == len(vs[best]) && bytes.Compare(v, vs[best]) > 0 {
			best = i
		}
	}
	return best, nil
}
