//go:build !linux

package dht

import "syscall"

// set does nothing here: bulk transfers may delay heartbeats on the same connection, and a silent peer's connection is noticed by the
// multiplexer's own questions only.
func (o socketOptions) set(string, string, syscall.RawConn) error { return nil }
