//go:build !harm

package harm

import "github.com/cockroachdb/pebble/v2/vfs"

// FS returns the file system as it is.
func FS(fs vfs.FS) vfs.FS { return fs }

// Format returns the format as it is.
func Format(real uint32) uint32 { return real }
