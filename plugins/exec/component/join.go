package component

import (
	"io"
	"net"
)

// join passes bytes between two connections until either ends. rest is what was read of b already, and what follows.
func join(a, b net.Conn, rest io.Reader) {
	done := make(chan struct{}, 2)
	pass := func(to net.Conn, from io.Reader) {
		_, _ = io.Copy(to, from) // its end is the end of the connection, whatever it was
		if half, ok := to.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
		done <- struct{}{}
	}
	go pass(a, rest)
	go pass(b, a)
	<-done
	<-done
}
