package peers

import (
	"crypto/rand"
	"crypto/x509"
	"net"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
)

func newKey(t *testing.T) (crypto.PrivKey, peer.ID) {
	t.Helper()
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, id
}

// handshake has one side dial the other, and returns what each came to.
func handshake(t *testing.T, dials, listens sec.SecureTransport, to peer.ID) (out, in sec.SecureConn) {
	t.Helper()
	a, b := net.Pipe()
	t.Cleanup(func() { a.Close(); b.Close() })
	type end struct {
		c   sec.SecureConn
		err error
	}
	listened := make(chan end, 1)
	go func() {
		c, err := listens.SecureInbound(t.Context(), b, "")
		listened <- end{c, err}
	}()
	out, err := dials.SecureOutbound(t.Context(), a, to)
	if err != nil {
		t.Fatal(err)
	}
	there := <-listened
	if there.err != nil {
		t.Fatal(there.err)
	}
	return out, there.c
}

// Whatever the clocks of two machines say, they may speak with each other: the certificate has no date that a clock could miss.
func TestTheCertificateIsValidAtAnyTime(t *testing.T) {
	key, id := newKey(t)
	ours, err := NewTLS(key, []upgrader.StreamMuxer{{ID: yamux.ID}})
	if err != nil {
		t.Fatal(err)
	}
	otherKey, other := newKey(t)
	stock, err := libp2ptls.New(libp2ptls.ID, otherKey, []upgrader.StreamMuxer{{ID: yamux.ID}})
	if err != nil {
		t.Fatal(err)
	}
	out, in := handshake(t, stock, ours, id)
	if out.RemotePeer() != id || in.RemotePeer() != other || in.LocalPeer() != id {
		t.Errorf("%s saw %s, %s saw %s", other, out.RemotePeer(), in.LocalPeer(), in.RemotePeer())
	}
	for _, c := range []sec.SecureConn{out, in} {
		if st := c.ConnState(); st.StreamMultiplexer != yamux.ID || !st.UsedEarlyMuxerNegotiation {
			t.Errorf("the muxer was not agreed on in the handshake: %+v", st)
		}
	}
	out, in = handshake(t, ours, stock, other)
	if out.RemotePeer() != other || in.RemotePeer() != id {
		t.Errorf("%s saw %s, %s saw %s", id, out.RemotePeer(), other, in.RemotePeer())
	}
	config, _ := ours.identity.ConfigForPeer("")
	cert, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []time.Time{time.Unix(0, 0), time.Unix(3600, 0), time.Now(), time.Now().AddDate(200, 0, 0)} {
		if at.Before(cert.NotBefore) || at.After(cert.NotAfter) {
			t.Errorf("it is not valid in %d: from %s to %s", at.Year(), cert.NotBefore, cert.NotAfter)
		}
	}
}

// Another one than was dialled is refused.
func TestTLSRefusesAnotherThanWasDialled(t *testing.T) {
	key, _ := newKey(t)
	_, wanted := newKey(t)
	a, b := net.Pipe()
	ours, err := NewTLS(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if c, err := ours.SecureInbound(t.Context(), b, ""); err == nil {
			c.Close()
		}
	}()
	if _, err := ours.SecureOutbound(t.Context(), a, wanted); err == nil {
		t.Error("it was not refused")
	}
}
