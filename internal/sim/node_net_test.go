package sim

import (
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/x/simlibp2p"
	"github.com/marcopolo/simnet"

	"github.com/coppice-project/coppice/dht"
)

// lostFor is when a lost packet arrives: after the schedule. libp2p's simulated network cannot lose one, but deliver it as late as it is told.
const lostFor = 1000 * time.Hour

// air is the network of whole nodes: libp2p's, in memory, which carries QUIC. It has delay, loss, and cuts by direction.
type air struct {
	sim  *simnet.Simnet
	link simnet.NodeBiDiLinkSettings

	mu    sync.Mutex // guards the rest
	dice  func() uint64
	delay time.Duration // at most, one way
	loss  uint64        // of a thousand packets
	dark  map[string]bool
	cuts  map[int]func(from, to string) bool // by cut under way
	next  int
}

func newAir(dice func() uint64) *air {
	link := simnet.LinkSettings{BitsPerSecond: 1000 * simlibp2p.OneMbps}
	a := &air{link: simnet.NodeBiDiLinkSettings{Downlink: link, Uplink: link}, dice: dice, delay: 2 * time.Millisecond, dark: map[string]bool{}, cuts: map[int]func(from, to string) bool{}}
	a.sim = &simnet.Simnet{LatencyFunc: a.latency, Logger: slog.New(slog.DiscardHandler)}
	a.sim.Start()
	return a
}

// latency says when a packet arrives.
func (a *air) latency(p *simnet.Packet) time.Duration {
	from, to := ipOf(p.From), ipOf(p.To)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.dark[from] || a.dark[to] || a.dice()%1000 < a.loss {
		return lostFor
	}
	for _, cut := range a.cuts {
		if cut(from, to) {
			return lostFor
		}
	}
	return 100*time.Microsecond + time.Duration(a.dice()%uint64(a.delay))
}

func ipOf(a net.Addr) string {
	if u, ok := a.(*net.UDPAddr); ok {
		return u.IP.String()
	}
	return a.String()
}

// cut loses what blocked says, until the returned function ends it.
func (a *air) cut(blocked func(from, to string) bool) (heal func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.next++
	number := a.next
	a.cuts[number] = blocked
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.cuts, number)
	}
}

// weather sets delay and loss.
func (a *air) weather(delay time.Duration, loss uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.delay, a.loss = delay, loss
}

// setDark takes a machine off the net, or puts it back.
func (a *air) setDark(ip string, dark bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dark[ip] = dark
}

func (a *air) clear() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.cuts)
	a.loss = 0
}

// host builds libp2p's host as package dht builds it, but over this network.
func (a *air) host(p dht.HostParams) (host.Host, error) {
	return libp2p.New(simlibp2p.QUICSimnet(a.sim, a.link), libp2p.NoListenAddrs, libp2p.Identity(p.Identity), libp2p.UserAgent(p.UserAgent),
		libp2p.ResourceManager(p.Limits), libp2p.ConnectionManager(p.Conns), libp2p.AddrsFactory(p.Announce), libp2p.BandwidthReporter(p.Traffic),
		libp2p.SwarmOpts(swarm.WithDialTimeout(p.DialTimeout), swarm.WithDialTimeoutLocal(p.DialTimeoutLocal), swarm.WithDialRanker(swarm.NoDelayDialRanker)),
		libp2p.UDPBlackHoleSuccessCounter(nil), libp2p.IPv6BlackHoleSuccessCounter(nil),
		libp2p.DisableRelay(), libp2p.DisableMetrics(), libp2p.DisableIdentifyAddressDiscovery(), libp2p.ForceReachabilityPublic(), libp2p.Ping(false))
}
