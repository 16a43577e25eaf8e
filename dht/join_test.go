package dht

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

const echoProtocol = "/coppice/test-echo/1"

func echo(n *testNode) {
	n.Peers().Handle(echoProtocol, func(from peer.ID, s peers.Stream) {
		if _, err := io.Copy(s, s); err == nil {
			_ = s.CloseWrite()
		}
		_ = s.Reset()
	})
}

func shout(ctx context.Context, n *testNode, to peer.ID) error {
	s, err := n.Peers().Open(ctx, to, echoProtocol)
	if err != nil {
		return err
	}
	defer s.Reset() //nolint:errcheck // a test's stream
	if dl, ok := ctx.Deadline(); ok {
		if err := s.SetDeadline(dl); err != nil {
			return err
		}
	}
	if _, err := s.Write([]byte("hello")); err != nil {
		return err
	}
	_, err = io.ReadFull(s, make([]byte, 5))
	return err
}

// stranger is an ordinary libp2p host that is nobody here.
func stranger(t testing.TB) host.Host {
	t.Helper()
	h, err := libp2p.New(libp2p.NoListenAddrs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func addrInfo(n *testNode) peer.AddrInfo {
	return peer.AddrInfo{ID: n.ID(), Addrs: n.Host().Addrs()}
}

// A newcomer joins by token, knows the members and is known; another member that never heard of it lets it in by its certificate.
func TestJoin(t *testing.T) {
	f := startFounder(t, nil)
	token := f.arb.token(t, f, 2, time.Hour)
	text, err := token.Encode()
	if err != nil {
		t.Fatal(err)
	}
	token, err = DecodeToken(text)
	if err != nil {
		t.Fatal(err)
	}
	a := startJoined(t, token, f.arb)
	b := startJoined(t, token, f.arb)
	if !f.member(a.ID()) || !b.member(a.ID()) || !b.member(f.ID()) {
		t.Fatal("the views lack members")
	}
	if a.member(b.ID()) {
		t.Fatal("a cannot have heard of b yet")
	}
	echo(a)
	echo(f)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, to := range []*testNode{f, a} {
		if err := shout(ctx, b, to.ID()); err != nil {
			t.Fatalf("b to %s: %v", to.ID(), err)
		}
	}
	if !a.member(b.ID()) {
		t.Fatal("a let b in without knowing it")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.heard[0]; c.Member != b.ID() || c.Signer != f.ID() || c.Index != 2 || c.Incarnation != 1 || c.Client {
		t.Fatalf("the certificate says %+v", c)
	}
}

// A member that lost its view learns who its peers are from their hellos, whoever dials; but only by signatures that it knows.
func TestHelloIsMutual(t *testing.T) {
	f := startFounder(t, nil)
	a := startJoined(t, f.arb.token(t, f, 1, time.Hour), f.arb)
	forget := func() {
		t.Helper()
		if err := a.Host().Network().ClosePeer(f.ID()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the link to be gone", func() bool { return f.Host().Network().Connectedness(a.ID()) != network.Connected })
		a.mu.Lock()
		clear(a.view)
		a.mu.Unlock()
	}
	forget()
	if err := f.Peers().Connect(t.Context(), a.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the founder to be refused for want of a known signer", func() bool {
		return f.logs.count("a peer does not accept this node") == 1
	})
	if a.member(f.ID()) {
		t.Fatal("an unknown signer was believed")
	}
	a.mu.Lock()
	a.signers = map[peer.ID]bool{f.ID(): true}
	a.mu.Unlock()
	forget()
	if err := f.Peers().Connect(t.Context(), a.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the dialer to be known", func() bool { return a.member(f.ID()) })
	forget()
	if err := a.Host().Connect(t.Context(), addrInfo(f)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the dialled to be known", func() bool { return a.member(f.ID()) })
}

func TestJoinIsRefusedWithTheReasonAtBothEnds(t *testing.T) {
	t.Parallel()
	f := startFounder(t, nil)
	ok := f.arb.token(t, f, 1, time.Hour)
	usedUp := f.arb.token(t, f, 1, time.Hour)
	startJoined(t, usedUp, f.arb)
	revoked := f.arb.token(t, f, 1, time.Hour)
	f.arb.tokens[SecretKey(revoked.Secret)].revoked = true
	unknown := ok
	unknown.Secret[3] ^= 1
	foreign := ok
	foreign.ClusterID = "another"
	var refused []peer.ID
	for name, c := range map[string]struct {
		token  Token
		reason Reason
	}{
		"expired":    {f.arb.token(t, f, 1, -time.Minute), Expired},
		"used up":    {usedUp, UsedUp},
		"revoked":    {revoked, Revoked},
		"unknown":    {unknown, UnknownToken},
		"of another": {foreign, ForeignCluster},
	} {
		h := stranger(t)
		refused = append(refused, h.ID())
		_, err := JoinCluster(t.Context(), h, c.token, nil, false)
		var r *Refusal
		if !errors.As(err, &r) || r.Reason != c.reason || r.By != f.ID() {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !strings.Contains(err.Error(), c.reason.String()) || !strings.Contains(err.Error(), "try") && !strings.Contains(err.Error(), "ask") {
			t.Errorf("%s: the error does not help: %v", name, err)
		}
		eventually(t, name+" in the node's log", func() bool { return f.logs.count("reason=\""+c.reason.String()) >= 1 })
	}
	for _, id := range refused {
		eventually(t, "the refused to be shown out", func() bool { return f.Host().Network().Connectedness(id) != network.Connected })
	}
	if _, err := startNode(t, f.arb, nil).Join(t.Context(), foreign, nil); err == nil || !strings.Contains(err.Error(), "another") {
		t.Errorf("a node that joins with a foreign token: %v", err)
	}
}

// The answer was lost and the newcomer asks again: it is the same admission.
func TestJoinTwiceByTheSameNodeIsOneUse(t *testing.T) {
	f := startFounder(t, nil)
	token := f.arb.token(t, f, 1, time.Hour)
	a := startNode(t, f.arb, nil)
	for range 2 {
		if _, err := a.join(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	}
}

// The first address of the token is dead, the second one's node is not able to admit now, the third admits.
func TestJoinTriesAllNodesOfTheToken(t *testing.T) {
	f := startFounder(t, nil)
	busy := startNode(t, f.arb, func(c *Config) {
		c.Admit = func(context.Context, JoinRequest) (Welcome, error) {
			return Welcome{}, errors.New("no leader at the moment")
		}
	})
	gone := startNode(t, f.arb, nil)
	token := f.arb.token(t, f, 1, time.Hour)
	token.Addrs = append(append(gone.Token(token.Secret, token.Expires).Addrs, busy.Token(token.Secret, token.Expires).Addrs...), token.Addrs...)
	if err := gone.Host().Close(); err != nil {
		t.Fatal(err)
	}
	w, err := startNode(t, f.arb, nil).join(t.Context(), token)
	if err != nil || w.By != f.ID() {
		t.Fatalf("%v, by %s", err, w.By)
	}
	token.Addrs = token.Addrs[:len(token.Addrs)-1]
	_, err = startNode(t, f.arb, nil).join(t.Context(), token)
	var r *Refusal
	if !errors.As(err, &r) || r.Reason != Unavailable || !strings.Contains(err.Error(), "no leader at the moment") || !strings.Contains(err.Error(), "cannot reach") {
		t.Fatalf("with nobody to admit: %v", err)
	}
}

// A node that takes the stream and hangs up is reported as a refusal with what to try.
func TestSilenceIsARefusal(t *testing.T) {
	h, err := libp2p.New(libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close() //nolint:errcheck // a test's host
	h.SetStreamHandler(JoinProtocol, func(s network.Stream) { _ = s.Conn().Close() })
	token := Token{ClusterID: testCluster, Addrs: []string{h.Addrs()[0].String() + "/p2p/" + h.ID().String()}, Expires: time.Now()}
	_, err = JoinCluster(t.Context(), stranger(t), token, nil, false)
	if err == nil || !strings.Contains(err.Error(), "counts as a refusal") || !strings.Contains(err.Error(), "try again") {
		t.Fatalf("got %v", err)
	}
}

func TestGarbageOnTheJoinStreamIsAnswered(t *testing.T) {
	f := startFounder(t, nil)
	h := stranger(t)
	if err := h.Connect(t.Context(), addrInfo(f)); err != nil {
		t.Fatal(err)
	}
	for _, garbage := range []string{"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "\x05hello", "\xff\xff\xff\xff\x7f", "\x03\x0a\x01"} {
		s, err := h.NewStream(t.Context(), f.ID(), JoinProtocol)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write([]byte(garbage)); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		var reply wirev1.JoinReply
		if err := readMessage(s, maxWelcome, &reply); err != nil {
			t.Fatalf("%q: %v", garbage, err)
		}
		if r := reply.GetRefusal(); r == nil || r.Reason != wirev1.Refusal_BAD_REQUEST && r.Reason != wirev1.Refusal_FOREIGN_CLUSTER {
			t.Fatalf("%q: %v", garbage, &reply)
		}
	}
}

// A stranger gets no stream, is logged once, and is shown out after two seconds; a false certificate does not help.
func TestStrangersAreKeptOut(t *testing.T) {
	t.Parallel()
	f := startFounder(t, nil)
	echo(f)
	h := stranger(t)
	if err := h.Connect(t.Context(), addrInfo(f)); err != nil {
		t.Fatal(err)
	}
	opened := time.Now()
	forged, err := SignCertificate(Certificate{Cluster: testCluster, Member: h.ID(), Issued: time.Now()}, h.Peerstore().PrivKey(h.ID()))
	if err != nil {
		t.Fatal(err)
	}
	var r *Refusal
	if err := SayHello(t.Context(), h, f.ID(), testCluster, forged, nil); !errors.As(err, &r) || r.Reason != BadCertificate {
		t.Fatalf("a certificate signed by a stranger: %v", err)
	}
	for _, p := range []string{echoProtocol, string(KadPrefix(testCluster)) + "/kad/1.0.0"} {
		for range 2 {
			s, err := h.NewStream(t.Context(), f.ID(), protocolOf(p))
			if err == nil {
				_, err = io.Copy(io.Discard, s)
			}
			if err == nil {
				t.Fatalf("%s: a stranger's stream ended in order", p)
			}
			if !peers.IsGated(err) {
				t.Logf("%s: %v", p, err) // after two seconds the connection itself is gone
			}
		}
	}
	eventually(t, "the stranger to be shown out", func() bool { return f.Host().Network().Connectedness(h.ID()) != network.Connected })
	if stay := time.Since(opened); stay < strangerStay-100*time.Millisecond {
		t.Errorf("shown out after %v already", stay)
	}
	if n := f.logs.count("refused a stream of a peer"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	if f.Peers().Refused() == 0 {
		t.Error("no refused stream was counted")
	}
}

// Another member's certificate, one of another cluster and a revoked one open nothing.
func TestCertificatesAreBound(t *testing.T) {
	f := startFounder(t, nil)
	h := stranger(t)
	mine := func(change func(*Certificate)) []byte {
		c := Certificate{Cluster: testCluster, Member: h.ID(), Index: 1, Issued: time.Now()}
		change(&c)
		b, err := SignCertificate(c, f.cfg.Identity)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, c := range map[string]struct {
		cluster string
		cert    []byte
		want    Reason
	}{
		"foreign cluster":     {"another", mine(func(c *Certificate) { c.Cluster = "another" }), ForeignCluster},
		"foreign certificate": {testCluster, mine(func(c *Certificate) { c.Cluster = "another" }), BadCertificate},
		"another's":           {testCluster, mine(func(c *Certificate) { c.Member = f.ID() }), BadCertificate},
		"flipped":             {testCluster, flip(mine(func(*Certificate) {})), BadCertificate},
		"empty":               {testCluster, nil, BadCertificate},
	} {
		if err := h.Connect(t.Context(), addrInfo(f)); err != nil {
			t.Fatal(err)
		}
		var r *Refusal
		if err := SayHello(t.Context(), h, f.ID(), c.cluster, c.cert, nil); !errors.As(err, &r) || r.Reason != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	f.arb.mu.Lock()
	f.arb.revoked[h.ID()] = true
	f.arb.mu.Unlock()
	var r *Refusal
	if err := SayHello(t.Context(), h, f.ID(), testCluster, mine(func(*Certificate) {}), nil); !errors.As(err, &r) || r.Reason != Revoked {
		t.Errorf("revoked: %v", err)
	}
	proof, err := signProof(testCluster, []byte("info"), false, f.cfg.Identity)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyCertificate(proof, testCluster, f.ID(), func(peer.ID) bool { return true }); !errors.Is(err, ErrBadCertificate) {
		t.Errorf("a join proof passed as a certificate: %v", err)
	}
	if err := VerifyProof(proof, testCluster, f.ID(), []byte("info"), false); err != nil {
		t.Error(err)
	}
	if err := VerifyProof(proof, testCluster, f.ID(), []byte("other"), false); err == nil {
		t.Error("a proof holds for other information")
	}
}

func flip(b []byte) []byte {
	b[len(b)-1] ^= 1
	return b
}

// An expelled member loses its connections and gets no stream any more.
func TestExpel(t *testing.T) {
	t.Parallel()
	nodes := startCluster(t, 2)
	f, a := nodes[0], nodes[1]
	echo(f)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := shout(ctx, a, f.ID()); err != nil {
		t.Fatal(err)
	}
	f.arb.mu.Lock()
	f.arb.revoked[a.ID()] = true
	f.arb.mu.Unlock()
	f.mu.Lock()
	delete(f.view, a.ID())
	f.mu.Unlock()
	if err := f.Expel(a.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the link to be gone", func() bool { return a.Host().Network().Connectedness(f.ID()) != network.Connected })
	if err := shout(ctx, a, f.ID()); err == nil {
		t.Fatal("an expelled node was served")
	}
	eventually(t, "the expelled to hear why", func() bool { return a.logs.count("it was revoked") > 0 })
}

// Anything may arrive at an open port.
func TestGarbageOnThePortDoesNoHarm(t *testing.T) {
	nodes := startCluster(t, 2)
	f, a := nodes[0], nodes[1]
	echo(f)
	_, addr, err := manet.DialArgs(f.Host().Addrs()[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, garbage := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x13/multistream/1.0.0\n\x0b/tls/1.0.0\n\x16\x03\x01\xff\xff" + strings.Repeat("x", 5000),
		"\x13/multistream/1.0.0\n\xff\xff\xff\xff\xff\x7f", "\x00", "SSH-2.0-x\r\n", "",
	} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte(garbage)); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := shout(ctx, a, f.ID()); err != nil {
		t.Fatal(err)
	}
}

func TestDHTRefusesBadConfigurations(t *testing.T) {
	base := startFounder(t, nil).cfg
	for what, change := range map[string]func(*Config){
		"cluster id":  func(c *Config) { c.Cluster = "a/b" },
		"profile":     func(c *Config) { c.Profile = "moon" },
		"address":     func(c *Config) { c.Listen = []string{"0.0.0.0:7400"} },
		"advertise":   func(c *Config) { c.Advertise = []string{"host:99999"} },
		"no identity": func(c *Config) { c.Identity = nil },
	} {
		cfg := base
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), strings.Fields(what)[0]) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestPortInUseIsSaid(t *testing.T) {
	f := startFounder(t, nil)
	cfg := f.cfg
	cfg.Identity, cfg.Listen = newKey(t), f.Addrs()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close() //nolint:errcheck // a test's
	if err := d.Start(); err == nil || !strings.Contains(err.Error(), "--listen") {
		t.Fatalf("got %v", err)
	}
}

func TestAdvertisedAddresses(t *testing.T) {
	own := []ma.Multiaddr{ma.StringCast("/ip4/127.0.0.1/tcp/7400"), ma.StringCast("/ip4/10.0.0.7/tcp/7400")}
	seen := ma.StringCast("/ip4/192.0.2.9/tcp/55555")
	for _, c := range []struct {
		fixed    []string
		observed ma.Multiaddr
		own      []ma.Multiaddr
		want     string
	}{
		{nil, nil, own, "/ip4/10.0.0.7/tcp/7400"},
		{nil, nil, own[:1], "/ip4/127.0.0.1/tcp/7400"},
		{nil, seen, own, "/ip4/10.0.0.7/tcp/7400, /ip4/192.0.2.9/tcp/7400"},
		{nil, ma.StringCast("/ip4/127.0.0.1/tcp/5"), own, "/ip4/10.0.0.7/tcp/7400"},
		{[]string{"n1.example", "192.0.2.1:9", "::1", "/ip4/1.2.3.4/tcp/5"}, seen, own, "/dns/n1.example/tcp/7400, /ip4/192.0.2.1/tcp/9, /ip6/::1/tcp/7400, /ip4/1.2.3.4/tcp/5"},
	} {
		v := &advertiser{fixed: c.fixed}
		v.observe(c.observed)
		if got := addrList(v.addrs(c.own)); got != c.want {
			t.Errorf("%v seen as %v: got %s, want %s", c.fixed, c.observed, got, c.want)
		}
	}
}
