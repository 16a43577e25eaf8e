package supervisor

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/membrane"
)

// testShell is an instance's membrane, reachable through the node's router.
type testShell struct {
	n      *simNode
	m      *membrane.Membrane
	router *membrane.Router // of its node's life, which may have begun another one when it is closed

	mu    sync.Mutex
	creds map[string]bool // true: allowed
}

func (n *simNode) newShell(instance string, _ *components.Effective, hooks Hooks) (Shell, error) {
	m := membrane.New(membrane.Config{Instance: instance, Serving: hooks.Serving, OnStale: func(membrane.Token) { hooks.Stale() }, OnHung: hooks.Hung})
	n.router.Add(m)
	return &testShell{n: n, m: m, router: n.router, creds: map[string]bool{}}, nil
}

func (s *testShell) Membrane() *membrane.Membrane         { return s.m }
func (s *testShell) NodeSocket() string                   { return "" }
func (s *testShell) Bind(eff *components.Effective) error { return s.bind(eff) }
func (s *testShell) Close()                               { s.router.Remove(s.m) }

func (s *testShell) Credential() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := fmt.Sprint(len(s.creds) + 1)
	s.creds[c] = true
	return c
}

func (s *testShell) Forbid(c string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.creds[c] = false
}

func (s *testShell) allowed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, ok := range s.creds {
		if ok {
			n++
		}
	}
	return n
}

// directory routes by the registers, as a node does.
type directory struct {
	shelf   *shelf
	sup     atomic.Pointer[Supervisor] // nil while the node is gone
	mu      sync.Mutex
	changed chan struct{}
}

func (d *directory) tell() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *directory) Changed(string) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

func (d *directory) Resolve(target, _ string) (membrane.Route, error) {
	sup := d.sup.Load()
	if sup == nil {
		return membrane.Route{}, membrane.ErrNoOwner
	}
	if !strings.Contains(target, "-") {
		target += "-0"
	}
	reg, ok := sup.Register(components.InstanceRegister(target))
	if !ok || reg.Owner == "" {
		return membrane.Route{}, membrane.ErrNoOwner
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		return membrane.Route{}, err
	}
	b, err := d.shelf.get(body.GetDigest())
	if err != nil {
		return membrane.Route{}, err
	}
	return membrane.Route{Instance: target, Node: reg.Owner.String(), Token: tokenOf(tokenIn(reg)), Methods: membrane.NewMethods(b.desc)}, nil
}

// links are a node's connections to other nodes' gates.
type links struct {
	ep    *peers.Endpoint
	mu    sync.Mutex
	conns map[string]*grpc.ClientConn
}

func (l *links) Conn(_ context.Context, node string) (grpc.ClientConnInterface, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c := l.conns[node]; c != nil {
		return c, nil
	}
	c, err := grpc.NewClient("passthrough:///"+node, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(peers.Dialer(l.ep, protoGate)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: grpcbackoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, MaxDelay: time.Second}, MinConnectTimeout: 2 * time.Second}))
	if err == nil {
		l.conns[node] = c
	}
	return c, err
}

func (l *links) HTTP(context.Context, string) (http.RoundTripper, error) {
	return nil, fmt.Errorf("no http here")
}

func (l *links) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.Close()
	}
}
