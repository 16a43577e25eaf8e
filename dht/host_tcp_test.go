package dht

import (
	"crypto/rand"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	ma "github.com/multiformats/go-multiaddr"
)

// account is all that another host comes to know of one, and what it says of itself.
type account struct {
	Reachability        network.Reachability
	Agent, Version      any
	Protocols           []protocol.ID
	Addresses           int
	Signed              bool
	Security            protocol.ID
	Muxer               protocol.ID
	Transport           string
	TCP, QUIC, Listened bool
}

// A host built by hand from libp2p's parts is what libp2p's own constructor makes of the same options. (This holds the parts to
// account when libp2p is upgraded.)
func TestHostIsAsLibp2pBuildsIt(t *testing.T) {
	whole := func(p HostParams) (host.Host, error) {
		build := func(u transport.Upgrader, r network.ResourceManager) (*tcpTransport, error) {
			return newTCP(u, r, socketOptions{unheard: p.Unheard})
		}
		return quicHost(libp2p.ChainOptions(libp2p.Transport(build), libp2p.Security(libp2ptls.ID, libp2ptls.New), libp2p.Muxer(yamux.ID, p.Muxer)))(p)
	}
	ours, theirs := accountOf(t, nil), accountOf(t, whole)
	if !reflect.DeepEqual(ours, theirs) {
		t.Errorf("by hand:\n%+v\nby libp2p:\n%+v", ours, theirs)
	}
	if ours.Agent != "coppice" || ours.Security != libp2ptls.ID || ours.Muxer != yamux.ID || !ours.TCP || ours.QUIC || ours.Listened || ours.Addresses != 1 {
		t.Errorf("%+v", ours)
	}
}

func accountOf(t *testing.T, build func(HostParams) (host.Host, error)) (a account) {
	t.Helper()
	start := func(build func(HostParams) (host.Host, error)) host.Host {
		key, _, err := crypto.GenerateEd25519Key(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		h, err := newHost(&Config{Identity: key, Profile: ProfileLocal, NewHost: build}, &advertiser{}, newTraffic())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
		a.Listened = len(h.Network().ListenAddresses()) > 0
		if err := h.Network().Listen(ma.StringCast("/ip4/127.0.0.1/tcp/0")); err != nil {
			t.Fatal(err)
		}
		return h
	}
	seen, by := start(build), start(nil)
	if err := by.Connect(t.Context(), peer.AddrInfo{ID: seen.ID(), Addrs: seen.Addrs()}); err != nil {
		t.Fatal(err)
	}
	type reachable interface{ Reachability() network.Reachability }
	for end := time.Now().Add(5 * time.Second); seen.(reachable).Reachability() != network.ReachabilityPublic && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // told by an event
	}
	a.Reachability = seen.(reachable).Reachability()
	state := by.Network().ConnsToPeer(seen.ID())[0].ConnState()
	a.Security, a.Muxer, a.Transport = state.Security, state.StreamMultiplexer, state.Transport
	var err error
	store := by.Peerstore()
	if a.Agent, err = store.Get(seen.ID(), "AgentVersion"); err != nil {
		t.Fatal(err)
	}
	if a.Version, err = store.Get(seen.ID(), "ProtocolVersion"); err != nil {
		t.Fatal(err)
	}
	if a.Protocols, err = store.GetProtocols(seen.ID()); err != nil {
		t.Fatal(err)
	}
	slices.Sort(a.Protocols)
	for end := time.Now().Add(5 * time.Second); len(store.Addrs(seen.ID())) == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond) // a host pushes addresses that it did not know yet when it was asked
	}
	a.Addresses = len(store.Addrs(seen.ID()))
	book, ok := peerstore.GetCertifiedAddrBook(store)
	a.Signed = ok && book.GetPeerRecord(seen.ID()) != nil
	type dialer interface {
		CanDial(peer.ID, ma.Multiaddr) bool
	}
	can := func(addr string) bool { return seen.Network().(dialer).CanDial(by.ID(), ma.StringCast(addr)) }
	a.TCP, a.QUIC = can("/ip4/192.0.2.1/tcp/1"), can("/ip4/192.0.2.1/udp/1/quic-v1")
	return a
}
