package peers

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// Limits of the gate against strangers.
const (
	// gateWait is how long a stream of a peer that is not known as a member waits for its hello on a young connection. The dialer
	// says hello on each new connection (package dht) while its first streams are already on their way.
	gateWait = time.Second
	// youngConn is how old a connection may be for its streams to wait.
	youngConn = 2 * time.Second
	// maxWaiting bounds the streams that wait at a time; more are reset at once.
	maxWaiting = 64
	// maxTold bounds the strangers remembered as logged.
	maxTold = 1024
)

// Libp2p is Peers and Links over a libp2p host.
//
// Goroutines: none of its own. libp2p calls handlers in a goroutine per stream and Notify's functions from its notification
// goroutines, one at a time.
type Libp2p struct {
	h      host.Host
	member func(peer.ID) bool
	addrs  func(peer.ID) []ma.Multiaddr
	log    *slog.Logger
	bundle *network.NotifyBundle
	tls    func() (*TLS, error) // for probes; made once

	waiting atomic.Int32
	refused atomic.Uint64

	order sync.Mutex // keeps the calls of subs in order; held while they run, so they may use everything but block nothing

	mu     sync.Mutex // guards what follows; never held while calling out
	conns  map[peer.ID]int
	proven map[peer.ID]ma.Multiaddr // where the peer was last reached and proved its identity
	told   map[peer.ID]struct{}     // strangers already logged
	subs   []func(peer.ID, bool)
}

var (
	_ Peers = (*Libp2p)(nil)
	_ Links = (*Libp2p)(nil)
)

// NewLibp2p makes a host the node's Peers and Links. member decides whose streams are handled; addrs gives the addresses at which a
// member is dialled (those that libp2p learnt by itself are tried too). Both may be called at any time from any goroutine and must
// not block.
func NewLibp2p(h host.Host, member func(peer.ID) bool, addrs func(peer.ID) []ma.Multiaddr, log *slog.Logger) *Libp2p {
	if addrs == nil {
		addrs = func(peer.ID) []ma.Multiaddr { return nil }
	}
	if log == nil {
		log = slog.Default()
	}
	l := &Libp2p{
		h: h, member: member, addrs: addrs, log: log,
		conns: map[peer.ID]int{}, proven: map[peer.ID]ma.Multiaddr{}, told: map[peer.ID]struct{}{},
	}
	l.tls = sync.OnceValues(func() (*TLS, error) {
		return NewTLS(h.Peerstore().PrivKey(h.ID()), nil)
	})
	l.bundle = &network.NotifyBundle{ConnectedF: l.connected, DisconnectedF: l.disconnected}
	h.Network().Notify(l.bundle)
	return l
}

// Close stops the notifications. It does not close the host.
func (l *Libp2p) Close() { l.h.Network().StopNotify(l.bundle) }

// ID returns the node's own identity.
func (l *Libp2p) ID() peer.ID { return l.h.ID() }

// Refused returns how many streams of strangers were reset.
func (l *Libp2p) Refused() uint64 { return l.refused.Load() }

// Open implements Peers. It dials past libp2p's dial back-off, since a member that was restarted must be reached at once; whoever
// retries does so at its own pace.
func (l *Libp2p) Open(ctx context.Context, to peer.ID, proto protocol.ID) (Stream, error) {
	s, err := l.OpenAny(ctx, to, proto)
	if err != nil {
		return nil, err // not s, which would be a non-nil interface around nil
	}
	return s, nil
}

// OpenAny is Open for the first of several protocols that the peer speaks.
func (l *Libp2p) OpenAny(ctx context.Context, to peer.ID, protos ...protocol.ID) (network.Stream, error) {
	if to == l.h.ID() {
		return nil, fmt.Errorf("open %v: a node does not dial itself", protos)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DialTimeout)
		defer cancel()
	}
	if err := l.Connect(ctx, to); err != nil {
		return nil, err
	}
	s, err := l.h.NewStream(network.WithNoDial(ctx, "connected"), to, protos...)
	if err != nil {
		if ctx.Err() != nil || l.h.Network().Connectedness(to) != network.Connected {
			return nil, fmt.Errorf("open %v to %s: %w: %w", protos, to, ErrUnreachable, err)
		}
		return nil, fmt.Errorf("open %v to %s: %w", protos, to, err)
	}
	return s, nil
}

// Connect dials the peer unless there is a connection.
func (l *Libp2p) Connect(ctx context.Context, to peer.ID) error {
	if l.h.Network().Connectedness(to) == network.Connected {
		return nil
	}
	l.learn(to)
	if err := l.h.Connect(network.WithForceDirectDial(ctx, "member"), peer.AddrInfo{ID: to}); err != nil {
		if errors.Is(err, swarm.ErrNoAddresses) {
			return fmt.Errorf("dial %s: %w: no address of it is known", to, ErrUnreachable)
		}
		return fmt.Errorf("dial %s: %w: %w", to, ErrUnreachable, err)
	}
	return nil
}

// learn puts the member's announced addresses, and the one where it was last met, where libp2p dials from.
func (l *Libp2p) learn(id peer.ID) {
	known := l.addrs(id)
	l.mu.Lock()
	if a := l.proven[id]; a != nil {
		known = append(known[:len(known):len(known)], a)
	}
	l.mu.Unlock()
	if len(known) > 0 {
		l.h.Peerstore().AddAddrs(id, known, peerstore.TempAddrTTL)
	}
}

// Handle implements Peers: streams of peers that are not members are reset and logged once per peer.
func (l *Libp2p) Handle(proto protocol.ID, h Handler) {
	l.h.SetStreamHandler(proto, l.Gate(l.member, func(s network.Stream) { h(s.Conn().RemotePeer(), s) }))
}

// HandleOpen registers a handler that serves strangers as well: joining and saying hello.
func (l *Libp2p) HandleOpen(proto protocol.ID, h Handler) {
	l.h.SetStreamHandler(proto, func(s network.Stream) { h(s.Conn().RemotePeer(), s) })
}

// Gate wraps a stream handler so that only peers that allow approves get through. On a young connection a stream waits up to a
// second for the peer's hello.
func (l *Libp2p) Gate(allow func(peer.ID) bool, h network.StreamHandler) network.StreamHandler {
	return func(s network.Stream) {
		id := s.Conn().RemotePeer()
		if !allow(id) && !l.await(allow, s.Conn()) {
			l.refused.Add(1)
			l.tell(id, s)
			if err := s.ResetWithError(network.StreamGated); err != nil {
				l.log.Debug("reset a stranger's stream", "peer", id, "err", err)
			}
			return
		}
		h(s)
	}
}

// await waits for the peer of a young connection to become known. It polls: admission comes from several places (hello, gossip, the
// arbiter), and only a bounded few ever wait.
func (l *Libp2p) await(allow func(peer.ID) bool, c network.Conn) bool {
	if time.Since(c.Stat().Opened) > youngConn {
		return false
	}
	if l.waiting.Add(1) > maxWaiting {
		l.waiting.Add(-1)
		return false
	}
	defer l.waiting.Add(-1)
	const step = 5 * time.Millisecond
	for range gateWait / step {
		time.Sleep(step)
		if allow(c.RemotePeer()) {
			return true
		}
		if c.IsClosed() {
			return false
		}
	}
	return false
}

// tell logs a stranger once.
func (l *Libp2p) tell(id peer.ID, s network.Stream) {
	l.mu.Lock()
	_, told := l.told[id]
	if !told {
		if len(l.told) >= maxTold {
			clear(l.told)
		}
		l.told[id] = struct{}{}
	}
	l.mu.Unlock()
	if !told {
		l.log.Warn("refused a stream of a peer that is not a member", "peer", id, "protocol", s.Protocol(), "addr", s.Conn().RemoteMultiaddr(),
			"try", "join the cluster with a token of `coppice token`")
	}
}

// IsGated reports whether an error of a stream means that the other side does not know us as a member.
func IsGated(err error) bool {
	var se *network.StreamError
	return errors.As(err, &se) && se.Remote && se.ErrorCode == network.StreamGated
}

// Notify implements Links. f must not block and must not be registered from within another such function.
func (l *Libp2p) Notify(f func(peer.ID, bool)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.subs = append(l.subs[:len(l.subs):len(l.subs)], f)
}

func (l *Libp2p) connected(_ network.Network, c network.Conn) {
	id := c.RemotePeer()
	at := l.provenAddr(c)
	l.order.Lock()
	defer l.order.Unlock()
	l.mu.Lock()
	if at != nil {
		l.proven[id] = at
	}
	l.conns[id]++
	first, subs := l.conns[id] == 1, l.subs
	l.mu.Unlock()
	if first {
		for _, f := range subs {
			f(id, true)
		}
	}
}

func (l *Libp2p) disconnected(_ network.Network, c network.Conn) {
	id := c.RemotePeer()
	member := l.member(id)
	l.order.Lock()
	defer l.order.Unlock()
	l.mu.Lock()
	l.conns[id]--
	last, subs := l.conns[id] <= 0, l.subs
	if last {
		delete(l.conns, id)
		if !member {
			delete(l.proven, id)
		}
	}
	l.mu.Unlock()
	if last {
		for _, f := range subs {
			f(id, false)
		}
	}
}

// provenAddr is the dialable address that a connection proves: the one we dialled, or, of an incoming one, the announced address with
// the same IP. nil when there is none.
func (l *Libp2p) provenAddr(c network.Conn) ma.Multiaddr {
	if c.Stat().Direction == network.DirOutbound {
		return c.RemoteMultiaddr()
	}
	from, err := manet.ToIP(c.RemoteMultiaddr())
	if err != nil {
		return nil
	}
	for _, a := range l.addrs(c.RemotePeer()) {
		if ip, err := manet.ToIP(a); err == nil && ip.Equal(from) {
			return a
		}
	}
	return nil
}

// Disconnect closes all connections to a peer: it was expelled.
func (l *Libp2p) Disconnect(id peer.ID) error { return l.h.Network().ClosePeer(id) }

// Protect keeps the connections to a peer when the connection manager trims; tag names the reason. Unprotect takes one reason back.
func (l *Libp2p) Protect(id peer.ID, tag string) { l.h.ConnManager().Protect(id, tag) }

// Unprotect takes back one reason to keep a peer's connections.
func (l *Libp2p) Unprotect(id peer.ID, tag string) { l.h.ConnManager().Unprotect(id, tag) }
