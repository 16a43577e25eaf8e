package dht

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// notSent is how many bytes may wait unsent in a socket's buffer.
const notSent = 128 << 10

// set marks a socket before it is used.
func (o socketOptions) set(_, _ string, c syscall.RawConn) error {
	var serr error
	if err := c.Control(func(fd uintptr) {
		serr = errors.Join(
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSent),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(o.unheard.Milliseconds())),
		)
	}); err != nil {
		return err
	}
	return serr
}
