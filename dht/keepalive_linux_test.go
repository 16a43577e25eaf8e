package dht

import (
	"crypto/rand"
	"os"
	"strconv"
	"testing"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"golang.org/x/sys/unix"
)

// The kernel asks no idle peer whether it is there, on either end: each question and each answer is 66 bytes, on each of hundreds of
// connections.
func TestTheKernelAsksNobody(t *testing.T) {
	start := func() host.Host {
		key, _, err := crypto.GenerateEd25519Key(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		h, err := newHost(&Config{Identity: key, Profile: ProfileLocal}, &advertiser{}, newTraffic())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
		if err := h.Network().Listen(ma.StringCast("/ip4/127.0.0.1/tcp/0")); err != nil {
			t.Fatal(err)
		}
		return h
	}
	a, b := start(), start()
	if err := a.Connect(t.Context(), peer.AddrInfo{ID: b.ID(), Addrs: b.Addrs()}); err != nil {
		t.Fatal(err)
	}
	port := portOf(b.Network().ListenAddresses())
	ends := 0
	for _, fd := range openFiles(t) {
		from, err := unix.Getsockname(fd)
		if err != nil {
			continue // no socket
		}
		to, err := unix.Getpeername(fd)
		if err != nil || portAt(from) != port && portAt(to) != port {
			continue
		}
		ends++
		if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE); err != nil || on != 0 {
			t.Errorf("an end of the connection asks: %d, %v", on, err)
		}
	}
	if ends != 2 {
		t.Errorf("%d ends found, want 2", ends)
	}
}

func portAt(a unix.Sockaddr) int {
	if v4, ok := a.(*unix.SockaddrInet4); ok {
		return v4.Port
	}
	return 0
}

func openFiles(t *testing.T) (fds []int) {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		if fd, err := strconv.Atoi(f.Name()); err == nil {
			fds = append(fds, fd)
		}
	}
	return fds
}
