package dht

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// notSent is how many bytes may wait unsent in a socket's buffer.
const notSent = 128 << 10

func lowWater(_, _ string, c syscall.RawConn) error {
	var serr error
	if err := c.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSent)
	}); err != nil {
		return err
	}
	return serr
}
