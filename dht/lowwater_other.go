//go:build !linux

package dht

import "syscall"

// lowWater does nothing here: bulk transfers may delay heartbeats on the same connection.
func lowWater(string, string, syscall.RawConn) error { return nil }
