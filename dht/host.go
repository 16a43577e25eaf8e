package dht

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/x/rate"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// DefaultPort is where a node listens unless told otherwise.
const DefaultPort = 7400

// Profiles: how patient a node is.
const (
	ProfileLAN   = "lan"
	ProfileWAN   = "wan"
	ProfileLocal = "local" // lan's times, but for idle connections, of which it has few; listens on a free port of the loopback interface
)

// timing is a profile's patience. A connection is cut when something sent over it stays unacknowledged for unheard, and when a question
// after keepAlive without a byte is not answered within writeTimeout: backstops behind the watchers. unheard is not shorter, since a busy
// machine cuts healthy connections at 250/500 ms (23 % of them in a measurement); keepAlive is not, since each idle connection pays for it.
type timing struct {
	keepAlive, writeTimeout, unheard, dial, dialLocal time.Duration
	rpc                                               time.Duration // one kad-dht request on a warm connection
}

var timings = map[string]timing{
	ProfileLAN:   {time.Minute, 2 * time.Second, 3 * time.Second, 2 * time.Second, time.Second, 300 * time.Millisecond},
	ProfileLocal: {10 * time.Second, 2 * time.Second, 3 * time.Second, 2 * time.Second, time.Second, 300 * time.Millisecond},
	ProfileWAN:   {5 * time.Minute, 10 * time.Second, 20 * time.Second, 5 * time.Second, time.Second, 1500 * time.Millisecond},
}

// KeepAlive is how long an idle connection goes without a question in a profile.
func KeepAlive(profile string) time.Duration { return timings[profile].keepAlive }

// MaxConns is how many connections a node keeps at most for longer than a moment.
const MaxConns = connsHigh

// Connection limits: the manager trims unprotected connections above the high mark down to the low one.
const (
	connsLow, connsHigh = 128, 256
	connGrace           = 20 * time.Second
)

// newHost builds the host without listening yet.
func newHost(cfg *Config, adv *advertiser, count *traffic) (host.Host, error) {
	t := timings[cfg.Profile]
	limits, err := newLimits()
	if err != nil {
		return nil, err
	}
	cm, err := connmgr.NewConnManager(connsLow, connsHigh, connmgr.WithGracePeriod(connGrace))
	if err != nil {
		return nil, fmt.Errorf("connection manager: %w", errors.Join(err, limits.Close()))
	}
	mux := *yamux.DefaultTransport
	mux.KeepAliveInterval, mux.ConnectionWriteTimeout = t.keepAlive, t.writeTimeout
	mux.MeasureRTTInterval = max(mux.MeasureRTTInterval, 6*t.keepAlive) // it sizes windows only, and is one more question on each idle connection
	build := cfg.NewHost
	if build == nil {
		build = tcpHost
	}
	h, err := build(HostParams{
		Identity: cfg.Identity, UserAgent: "coppice", Muxer: &mux, Limits: limits, Conns: cm, Traffic: count,
		Announce: adv.addrs, DialTimeout: t.dial, DialTimeoutLocal: t.dialLocal, Unheard: t.unheard,
	})
	if err != nil {
		return nil, fmt.Errorf("build host: %w", errors.Join(err, cm.Close(), limits.Close()))
	}
	return h, nil
}

// newLimits sets what strangers and single peers may take. The library's defaults are below what a cluster needs (64 inbound
// connections, 8 per IP, and one new connection in 5 s per IP, dials included: a peer that was dead for a moment could not be reached any
// more), and "infinite" still means 8 per IP.
func newLimits() (network.ResourceManager, error) {
	strangers := rcmgr.ResourceLimits{Streams: 4, StreamsInbound: 4, StreamsOutbound: 4}
	limits := rcmgr.PartialLimitConfig{
		System: rcmgr.ResourceLimits{
			Conns: 8192, ConnsInbound: 4096, ConnsOutbound: 8192, FD: 8192,
			Streams: 65536, StreamsInbound: 65536, StreamsOutbound: 65536, Memory: 2 << 30,
		},
		// Connections and streams that have not said yet who or what they are.
		Transient: rcmgr.ResourceLimits{
			Conns: 512, ConnsInbound: 256, ConnsOutbound: 512, FD: 512,
			Streams: 4096, StreamsInbound: 2048, StreamsOutbound: 4096, Memory: 1 << 30,
		},
		PeerDefault: rcmgr.ResourceLimits{
			Conns: 16, ConnsInbound: 16, ConnsOutbound: 16, FD: 16,
			Streams: 4096, StreamsInbound: 4096, StreamsOutbound: 4096, Memory: 1 << 30,
		},
		ProtocolPeer: map[protocol.ID]rcmgr.ResourceLimits{JoinProtocol: strangers, HelloProtocol: strangers},
	}.Build(rcmgr.InfiniteLimits)
	const perAddress = 1024 // many nodes behind one address, or on one machine
	perSecond := rate.Limit{RPS: 256, Burst: perAddress}
	m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(limits), rcmgr.WithMetricsDisabled(), rcmgr.WithLimitPerSubnet(
		[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: perAddress}},
		[]rcmgr.ConnLimitPerSubnet{{PrefixLength: 64, ConnCount: perAddress}},
	), rcmgr.WithConnRateLimiters(&rate.Limiter{SubnetRateLimiter: rate.SubnetLimiter{
		IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: 32, Limit: perSecond}},
		IPv6SubnetLimits: []rate.SubnetLimit{{PrefixLength: 64, Limit: perSecond}},
		GracePeriod:      time.Minute,
	}}))
	if err != nil {
		return nil, fmt.Errorf("resource manager: %w", err)
	}
	return m, nil
}

// defaultListen is where a node listens that was not told.
func defaultListen(profile string) []string {
	if profile == ProfileLocal {
		return []string{"/ip4/127.0.0.1/tcp/0"}
	}
	return []string{fmt.Sprintf("/ip4/0.0.0.0/tcp/%d", DefaultPort), fmt.Sprintf("/ip6/::/tcp/%d", DefaultPort)}
}

// listen opens the ports one by one, so that one that is taken is an error even if another is free. A machine without IPv6 is none.
func listen(h host.Host, addrs []ma.Multiaddr, wanted bool) error {
	for _, a := range addrs {
		err := h.Network().Listen(a)
		if err == nil {
			continue
		}
		noFamily := errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EPROTONOSUPPORT)
		if _, e := a.ValueForProtocol(ma.P_IP6); e == nil && noFamily && !wanted {
			continue
		}
		return fmt.Errorf("listen on %s: %w (is another node running here? try: --listen /ip4/0.0.0.0/tcp/0 for a free port)", a, err)
	}
	if len(h.Network().ListenAddresses()) == 0 {
		return errors.New("listen: no address could be opened")
	}
	return nil
}

// advertiser decides which of the host's addresses others are told.
type advertiser struct {
	fixed    []string // from the configuration; host, host:port or a multiaddr
	observed atomic.Pointer[net.IP]
}

// addrs is the host's AddrsFactory. With --advertise it is those, with the port filled in. Else all addresses except loopback ones
// (unless there are no others), and the one a member saw this node come from, if it is not among them.
func (v *advertiser) addrs(own []ma.Multiaddr) []ma.Multiaddr {
	port := portOf(own)
	if len(v.fixed) > 0 {
		var out []ma.Multiaddr
		for _, s := range v.fixed {
			if a, err := parseAdvertise(s, port); err == nil { // checked by New
				out = append(out, a)
			}
		}
		return out
	}
	out := slices.DeleteFunc(slices.Clone(own), manet.IsIPLoopback)
	if len(out) == 0 {
		out = own
	}
	ip := v.observed.Load()
	if ip == nil || port == 0 || slices.ContainsFunc(out, func(a ma.Multiaddr) bool {
		have, err := manet.ToIP(a)
		return err == nil && have.Equal(*ip)
	}) {
		return out
	}
	if a, err := manet.FromNetAddr(&net.TCPAddr{IP: *ip, Port: port}); err == nil {
		out = append(out, a)
	}
	return out
}

// observe notes where a member saw this node come from. A loopback address says nothing.
func (v *advertiser) observe(a ma.Multiaddr) {
	if a == nil {
		return
	}
	if ip, err := manet.ToIP(a); err == nil && !ip.IsLoopback() && !ip.IsUnspecified() {
		v.observed.Store(&ip)
	}
}

func portOf(addrs []ma.Multiaddr) int {
	for _, a := range addrs {
		if s, err := a.ValueForProtocol(ma.P_TCP); err == nil {
			if p, err := strconv.Atoi(s); err == nil {
				return p
			}
		}
	}
	return 0
}

// parseAdvertise reads an address to announce: a multiaddr, or host or host:port, where the port defaults to the one listened on.
func parseAdvertise(s string, port int) (ma.Multiaddr, error) {
	if strings.HasPrefix(s, "/") {
		a, err := ma.NewMultiaddr(s)
		if err != nil {
			return nil, fmt.Errorf("advertise %q: %w", s, err)
		}
		return a, nil
	}
	name := s
	if h, p, err := net.SplitHostPort(s); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("advertise %q: the port must be 1 to 65535", s)
		}
		name, port = h, int(n)
	}
	name = strings.Trim(name, "[]")
	proto := "dns"
	if ip := net.ParseIP(name); ip != nil {
		proto = "ip6"
		if ip.To4() != nil {
			proto = "ip4"
		}
	}
	if name == "" || strings.ContainsAny(name, "/ ") {
		return nil, fmt.Errorf("advertise %q: want host, host:port or a multiaddr such as /ip4/192.0.2.1/tcp/7400", s)
	}
	a, err := ma.NewMultiaddr(fmt.Sprintf("/%s/%s/tcp/%d", proto, name, port))
	if err != nil {
		return nil, fmt.Errorf("advertise %q: %w", s, err)
	}
	return a, nil
}

// ParseAddrs reads multiaddrs, such as those in a member's information; the first bad one is an error.
func ParseAddrs(addrs []string) ([]ma.Multiaddr, error) {
	out := make([]ma.Multiaddr, 0, len(addrs))
	for _, s := range addrs {
		a, err := ma.NewMultiaddr(s)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w (want one such as /ip4/0.0.0.0/tcp/7400)", s, err)
		}
		out = append(out, a)
	}
	return out, nil
}
