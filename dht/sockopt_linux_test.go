package dht

import (
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func optionOf(t *testing.T, c net.Conn, which int) (n int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var gerr error
	if err := raw.Control(func(fd uintptr) { n, gerr = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, which) }); err != nil {
		t.Fatal(err)
	}
	if gerr != nil {
		t.Fatal(gerr)
	}
	return n
}

// On either end of a connection bulk is not buffered in front of heartbeats, and what nobody acknowledges ends it.
func TestSocketOptions(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	options := socketOptions{unheard: 3 * time.Second}
	l := markingListener{tcp, options}
	defer l.Close() //nolint:errcheck // a test's
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	c, err := (&net.Dialer{Control: options.set}).Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // a test's
	s := <-accepted
	defer s.Close() //nolint:errcheck // a test's
	for _, end := range []net.Conn{c, s} {
		if got, want := optionOf(t, end, unix.TCP_NOTSENT_LOWAT), notSent; got != want {
			t.Errorf("%d bytes, want %d", got, want)
		}
		if got, want := optionOf(t, end, unix.TCP_USER_TIMEOUT), 3000; got != want {
			t.Errorf("waits %d ms for an acknowledgement, want %d", got, want)
		}
	}
}
