package dht

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

func lowWaterOf(t *testing.T, c net.Conn) (n int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var gerr error
	if err := raw.Control(func(fd uintptr) { n, gerr = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT) }); err != nil {
		t.Fatal(err)
	}
	if gerr != nil {
		t.Fatal(gerr)
	}
	return n
}

// Bulk is not buffered in front of heartbeats, on either end of a connection.
func TestLowWaterMark(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := lowWaterListener{tcp}
	defer l.Close() //nolint:errcheck // a test's
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	c, err := (&net.Dialer{Control: lowWater}).Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // a test's
	s := <-accepted
	defer s.Close() //nolint:errcheck // a test's
	for _, end := range []net.Conn{c, s} {
		if got, want := lowWaterOf(t, end), notSent; got != want {
			t.Errorf("%d bytes, want %d", got, want)
		}
	}
}
