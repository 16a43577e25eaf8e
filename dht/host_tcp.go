package dht

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/metrics"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/host/autonat"
	basichost "github.com/libp2p/go-libp2p/p2p/host/basic"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/coppice-project/coppice/dht/peers"
)

// HostParams is what a host is made from, whatever network it runs over.
type HostParams struct {
	Identity  crypto.PrivKey
	UserAgent string // what identify tells
	Muxer     *yamux.Transport
	// Limits and Conns belong to the host: its Close closes them. When no host could be built, whoever made them does.
	Limits network.ResourceManager
	Conns  connmgr.ConnManager
	// Traffic counts what streams move; it may be left alone.
	Traffic metrics.Reporter
	// Announce turns the addresses listened on into those others are told.
	Announce func([]ma.Multiaddr) []ma.Multiaddr
	// DialTimeout bounds one attempt to connect, handshakes included; DialTimeoutLocal one to an address of a private network.
	DialTimeout, DialTimeoutLocal time.Duration
	// Unheard is how long sent bytes may stay unacknowledged before the kernel cuts the connection.
	Unheard time.Duration
}

// tcpHost builds a host over TCP, TLS 1.3 and yamux. It takes libp2p's parts one by one: libp2p's own constructor links every transport
// there is (QUIC, WebTransport, WebRTC), 7 MB of program.
func tcpHost(p HostParams) (host.Host, error) {
	store, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, fmt.Errorf("peer store: %w", err)
	}
	id, err := peer.IDFromPrivateKey(p.Identity)
	if err == nil {
		err = errors.Join(store.AddPrivKey(id, p.Identity), store.AddPubKey(id, p.Identity.GetPublic()))
	}
	if err != nil {
		return nil, fmt.Errorf("identity: %w", errors.Join(err, store.Close()))
	}
	bus := eventbus.NewBus()
	// No waiting between addresses, and no guesses that a kind of address is not worth a try: a cluster's addresses are meant.
	net, err := swarm.NewSwarm(id, store, bus, swarm.WithResourceManager(p.Limits), swarm.WithMetrics(p.Traffic),
		swarm.WithDialTimeout(p.DialTimeout), swarm.WithDialTimeoutLocal(p.DialTimeoutLocal), swarm.WithDialRanker(swarm.NoDelayDialRanker),
		swarm.WithUDPBlackHoleSuccessCounter(nil), swarm.WithIPv6BlackHoleSuccessCounter(nil))
	if err != nil {
		return nil, fmt.Errorf("network: %w", errors.Join(err, store.Close()))
	}
	if err := addTCP(net, p); err != nil {
		return nil, fmt.Errorf("transport: %w", errors.Join(err, net.Close(), store.Close()))
	}
	// No ping, relay, hole punching, port mapping or metrics, and no guesses at the own address from what peers observe.
	basic, err := basichost.NewHost(net, &basichost.HostOpts{EventBus: bus, ConnManager: p.Conns, AddrsFactory: p.Announce, UserAgent: p.UserAgent})
	if err != nil {
		return nil, errors.Join(err, net.Close(), store.Close())
	}
	h := &closingHost{basic}
	h.Start()
	// Nodes are meant to be reachable: nothing is probed, and nothing switches itself off for a guess that they are not.
	reachable, err := autonat.New(h, autonat.WithReachability(network.ReachabilityPublic))
	if err != nil {
		return nil, fmt.Errorf("reachability: %w", errors.Join(err, h.Close()))
	}
	h.SetAutoNat(reachable)
	return h, nil
}

// closingHost closes its connections before its services: peers see the end at once, and no service waits for a stream.
type closingHost struct{ *basichost.BasicHost }

// Close implements host.Host.
func (h *closingHost) Close() error {
	return errors.Join(h.Network().Close(), h.BasicHost.Close())
}

// addTCP lets the network dial and listen over TCP.
func addTCP(net *swarm.Swarm, p HostParams) error {
	muxers := []upgrader.StreamMuxer{{ID: yamux.ID, Muxer: p.Muxer}}
	tls, err := peers.NewTLS(p.Identity, muxers)
	if err != nil {
		return err
	}
	up, err := upgrader.New([]sec.SecureTransport{tls}, muxers, nil, p.Limits, nil)
	if err != nil {
		return err
	}
	t, err := newTCP(up, p.Limits, socketOptions{unheard: p.Unheard})
	if err != nil {
		return err
	}
	return net.AddTransport(t)
}

// socketOptions is what a member's socket is told: a low-water mark on unsent bytes, so that bulk waits in the streams, where it can be
// overtaken, and not in the kernel's buffer in front of a heartbeat; and for how long the kernel waits for an acknowledgement. That one costs
// no traffic, where asking each silent peer every second would cost more than all the rest that an idle node of a large cluster sends. For the
// same reason the kernel asks no idle peer whether it is there: the multiplexer does, less often.
type socketOptions struct{ unheard time.Duration }

// quietUpgrader takes back what libp2p tells the sockets that it dials: to ask the other side every 30 s.
type quietUpgrader struct{ transport.Upgrader }

// Upgrade implements transport.Upgrader. A connection that goes on asking works all the same.
func (u quietUpgrader) Upgrade(
	ctx context.Context, t transport.Transport, c manet.Conn, dir network.Direction, p peer.ID, scope network.ConnManagementScope,
) (transport.CapableConn, error) {
	if k, ok := c.(interface{ SetKeepAlive(on bool) error }); ok {
		_ = k.SetKeepAlive(false) //nolint:errcheck // see above
	}
	return u.Upgrader.Upgrade(ctx, t, c, dir, p, scope)
}

// tcpTransport is libp2p's TCP with these options.
type tcpTransport struct {
	*tcp.TcpTransport
	upgrader transport.Upgrader
	options  socketOptions
}

func newTCP(u transport.Upgrader, r network.ResourceManager, o socketOptions) (*tcpTransport, error) {
	dialer := func(ma.Multiaddr) (tcp.ContextDialer, error) { return &net.Dialer{Control: o.set}, nil }
	t, err := tcp.NewTCPTransport(quietUpgrader{u}, r, nil, tcp.DisableReuseport(), tcp.WithDialerForAddr(dialer))
	if err != nil {
		return nil, err
	}
	return &tcpTransport{t, u, o}, nil
}

// Listen implements transport.Transport.
func (t *tcpTransport) Listen(a ma.Multiaddr) (transport.Listener, error) {
	nw, addr, err := manet.DialArgs(a)
	if err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{KeepAlive: -1}).Listen(context.Background(), nw, addr)
	if err != nil {
		return nil, err
	}
	ml, err := manet.WrapNetListener(markingListener{l, t.options})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return t.upgrader.UpgradeGatedMaListener(t, t.upgrader.GateMaListener(ml)), nil
}

// markingListener marks what it accepts; not every kernel hands the options down from the listening socket.
type markingListener struct {
	net.Listener
	options socketOptions
}

// Accept implements net.Listener. A connection that cannot be marked works all the same.
func (l markingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if t, ok := c.(*net.TCPConn); ok && err == nil {
		if raw, err := t.SyscallConn(); err == nil {
			_ = l.options.set("", "", raw) //nolint:errcheck // see above
		}
	}
	return c, err
}
