package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
)

// What nodes say to each other above the overlay: calls (gRPC), http interfaces, and forwarded control commands. All of it goes over the
// one authenticated and encrypted connection of each pair of members.
const (
	protoCall protocol.ID = "/coppice/call/1"
	protoHTTP protocol.ID = "/coppice/http/1"
	protoAPI  protocol.ID = "/coppice/api/1"

	// idleConns per member, for http.
	idleConns = 64
)

// links are the connections to other nodes' gates, one per node and kind, dropped when the node dies.
type links struct {
	peers peers.Peers

	mu    sync.Mutex // guards the maps
	grpc  map[string]*grpc.ClientConn
	http  map[string]*http.Transport
	apis  map[string]*http.Transport
	ended bool
}

func newLinks(p peers.Peers) *links {
	return &links{peers: p, grpc: map[string]*grpc.ClientConn{}, http: map[string]*http.Transport{}, apis: map[string]*http.Transport{}}
}

var errLinksClosed = errors.New("this node is stopping")

// Conn implements membrane.Peers.
func (l *links) Conn(_ context.Context, node string) (grpc.ClientConnInterface, error) {
	if _, err := peer.Decode(node); err != nil {
		return nil, fmt.Errorf("node %q: %w", node, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return nil, errLinksClosed
	}
	if c := l.grpc[node]; c != nil {
		return c, nil
	}
	c, err := grpc.NewClient("passthrough:///"+node,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the stream below is authenticated and encrypted
		grpc.WithContextDialer(peers.Dialer(l.peers, protoCall)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}, MinConnectTimeout: 2 * time.Second}),
		grpc.WithIdleTimeout(0))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", node, err)
	}
	l.grpc[node] = c
	return c, nil
}

// HTTP implements membrane.Peers.
func (l *links) HTTP(_ context.Context, node string) (http.RoundTripper, error) {
	return l.transport(l.http, node, protoHTTP)
}

// Transport implements api.Peers.
func (n *Node) Transport(node string) http.RoundTripper {
	t, err := n.links.transport(n.links.apis, node, protoAPI)
	if err != nil {
		return failing{err}
	}
	return t
}

func (l *links) transport(of map[string]*http.Transport, node string, proto protocol.ID) (http.RoundTripper, error) {
	if _, err := peer.Decode(node); err != nil {
		return nil, fmt.Errorf("node %q: %w", node, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return nil, errLinksClosed
	}
	if t := of[node]; t != nil {
		return t, nil
	}
	dial := peers.Dialer(l.peers, proto)
	t := &http.Transport{
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, node) },
		MaxIdleConnsPerHost: idleConns, IdleConnTimeout: 30 * time.Second, DisableCompression: true,
	}
	of[node] = t
	return t, nil
}

// drop forgets the connections to a node that has died or come back as another process.
func (l *links) drop(node string) {
	l.mu.Lock()
	c, h, a := l.grpc[node], l.http[node], l.apis[node]
	delete(l.grpc, node)
	delete(l.http, node)
	delete(l.apis, node)
	l.mu.Unlock()
	closeLinks(c, h, a)
}

func closeLinks(c *grpc.ClientConn, ts ...*http.Transport) {
	if c != nil {
		c.Close() // the only error says that it is closed already
	}
	for _, t := range ts {
		if t != nil {
			t.CloseIdleConnections()
		}
	}
}

func (l *links) close() {
	l.mu.Lock()
	l.ended = true
	var nodes []string
	for node := range l.grpc {
		nodes = append(nodes, node)
	}
	for node := range l.http {
		nodes = append(nodes, node)
	}
	for node := range l.apis {
		nodes = append(nodes, node)
	}
	l.mu.Unlock()
	for _, node := range nodes {
		l.drop(node)
	}
}

// memberChanged drops the links of processes that are gone.
func (l *links) memberChanged(c members.Change) {
	if c.New.State == members.Dead || c.New.State == members.Left || (c.Old.Boot != 0 && c.Old.Boot != c.New.Boot) {
		l.drop(c.New.ID.String())
	}
}

type failing struct{ err error }

func (f failing) RoundTrip(*http.Request) (*http.Response, error) { return nil, f.err }

// runBase is the folder of all runtime folders of this user: $XDG_RUNTIME_DIR/coppice-run, or one below the system's temporary folder.
func runBase() string {
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" && len(d) <= 24 {
		return filepath.Join(d, "cop")
	}
	return filepath.Join("/tmp", "coppice-"+strconv.Itoa(os.Getuid()), "r")
}
