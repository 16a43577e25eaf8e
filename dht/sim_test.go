package dht

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/x/simlibp2p"
	"github.com/marcopolo/simnet"
)

// quicHost builds hosts as tcpHost does, over another network: libp2p's simulation speaks QUIC only.
func quicHost(network libp2p.Option) func(HostParams) (host.Host, error) {
	return func(p HostParams) (host.Host, error) {
		return libp2p.New(network, libp2p.NoListenAddrs, libp2p.Identity(p.Identity), libp2p.UserAgent(p.UserAgent),
			libp2p.ResourceManager(p.Limits), libp2p.ConnectionManager(p.Conns), libp2p.AddrsFactory(p.Announce),
			libp2p.SwarmOpts(swarm.WithDialTimeout(p.DialTimeout), swarm.WithDialTimeoutLocal(p.DialTimeoutLocal), swarm.WithDialRanker(swarm.NoDelayDialRanker)),
			libp2p.UDPBlackHoleSuccessCounter(nil), libp2p.IPv6BlackHoleSuccessCounter(nil),
			libp2p.DisableRelay(), libp2p.DisableMetrics(), libp2p.DisableIdentifyAddressDiscovery(), libp2p.ForceReachabilityPublic(), libp2p.Ping(false))
	}
}

// The whole of it in virtual time over a simulated network: join, hello, lookups, probes, and an end without a goroutine left behind
// (the bubble checks that).
func TestInVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rtt = 40 * time.Millisecond
		sim := &simnet.Simnet{LatencyFunc: simnet.StaticLatency(rtt / 2)}
		link := simnet.LinkSettings{BitsPerSecond: 100 * simlibp2p.OneMbps}
		settings := simnet.NodeBiDiLinkSettings{Downlink: link, Uplink: link}
		n := 0
		over := func(c *Config) {
			n++
			c.Listen = []string{fmt.Sprintf("/ip4/1.0.0.%d/udp/8000/quic-v1", n)}
			c.NewHost = quicHost(simlibp2p.QUICSimnet(sim, settings))
		}
		sim.Start()
		t.Cleanup(sim.Close)
		f := startFounder(t, over)
		token := f.arb.token(t, f, 9, time.Hour)
		nodes := []*testNode{f}
		for range 4 {
			a := startNode(t, f.arb, over)
			if _, err := a.join(t.Context(), token); err != nil {
				t.Fatal(err)
			}
			nodes = append(nodes, a)
		}
		first, last := nodes[1], nodes[4] // the first has never heard of the last
		echo(first)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := shout(ctx, last, first.ID()); err != nil {
			t.Fatal(err)
		}
		if ids, _, err := last.Kad().Closest(ctx, "/kb/x"); err != nil || len(ids) != 5 {
			t.Fatal(ids, err)
		}
		if o := last.Peers().Probe(ctx, first.ID()); o != peers.Reached {
			t.Fatal(o)
		}
		if err := first.Host().Close(); err != nil {
			t.Fatal(err)
		}
		if o := last.Peers().Probe(ctx, first.ID()); o != peers.Silent { // QUIC has no refusals
			t.Fatal(o)
		}
		h, err := libp2p.New(libp2p.NoListenAddrs, libp2p.DisableIdentifyAddressDiscovery(), libp2p.ResourceManager(&network.NullResourceManager{}),
			simlibp2p.QUICSimnet(sim, settings), libp2p.ListenAddrStrings("/ip4/1.0.0.99/udp/8000/quic-v1"))
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close() //nolint:errcheck // a test's
		if err := h.Connect(ctx, addrInfo(f)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(strangerStay + rtt)
		if f.Host().Network().Connectedness(h.ID()) == network.Connected {
			t.Fatal("the stranger is still there")
		}
	})
}
