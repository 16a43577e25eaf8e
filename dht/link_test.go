package dht

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// tap is a TCP relay whose traffic can be held: a cable pulled, with no reset and no end.
func tap(t *testing.T, to ma.Multiaddr) (through ma.Multiaddr, hold *atomic.Bool) {
	t.Helper()
	_, addr, err := manet.DialArgs(to)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended); _ = l.Close() })
	hold = &atomic.Bool{}
	pump := func(dst, src net.Conn) {
		defer dst.Close() //nolint:errcheck // a test's
		buf := make([]byte, 32<<10)
		for {
			n, err := src.Read(buf)
			if hold.Load() {
				<-ended
				return
			}
			if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d, err := net.Dial("tcp", addr)
			if err != nil {
				_ = c.Close()
				continue
			}
			go pump(d, c)
			go pump(c, d)
		}
	}()
	through, err = manet.FromNetAddr(l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	return through, hold
}

// The backstop behind the watchers: a link that falls silent is cut after keep-alive and write time-out, 3 s, at both ends.
func TestSilentLinkIsCut(t *testing.T) {
	t.Parallel()
	f := startFounder(t, nil)
	through, hold := tap(t, f.Host().Addrs()[0])
	token := f.arb.token(t, f, 1, time.Hour)
	token.Addrs = []string{through.String() + "/p2p/" + f.ID().String()}
	a := startJoined(t, token, f.arb)
	down := make(chan peer.ID, 2)
	for _, n := range []*testNode{f, a} {
		n.Peers().Notify(func(id peer.ID, up bool) {
			if !up {
				down <- id
			}
		})
	}
	cut := time.Now()
	hold.Store(true)
	for range 2 {
		select {
		case <-down:
		case <-time.After(20 * time.Second):
			t.Fatal("the silent link is still up")
		}
	}
	if d := time.Since(cut); d < 1500*time.Millisecond || d > 15*time.Second {
		t.Errorf("cut after %v, want about 3 s", d)
	}
}

// A member that closes is seen to be gone at once, and its links are told in order.
func TestCloseIsSeenAtOnce(t *testing.T) {
	nodes := startCluster(t, 2)
	f, a := nodes[0], nodes[1]
	echo(f)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := shout(ctx, a, f.ID()); err != nil {
		t.Fatal(err)
	}
	down := make(chan time.Time, 1)
	a.Peers().Notify(func(id peer.ID, up bool) {
		if id == f.ID() && !up {
			down <- time.Now()
		}
	})
	closed := time.Now()
	if err := f.Host().Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case at := <-down:
		t.Logf("seen after %v", at.Sub(closed))
	case <-ctx.Done():
		t.Fatal("not seen")
	}
	if a.Host().Network().Connectedness(f.ID()) == network.Connected {
		t.Fatal("still connected")
	}
}
