package blobs

import (
	"errors"
	"log/slog"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
)

// When an fsync of pages has failed nothing is promised any more, also when later ones succeed: the kernel tells of a failure once, and the pages
// may be gone.
func TestAFailedFsyncEndsAllPromises(t *testing.T) {
	var fails atomic.Bool
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch op.Kind {
		case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
			if fails.Load() {
				return syscall.EIO
			}
		default:
		}
		return nil
	}))
	quiet := slog.New(slog.DiscardHandler)
	died := make(chan error, 1)
	disk, err := store.Open(fs, "db", store.Options{Log: quiet, OnFatal: func(err error) { died <- err }})
	if err != nil {
		t.Fatal(err)
	}
	net := peers.NewNet(1)
	defer net.Close()
	s, err := Open(Config{Self: "n1", DB: disk.DB(), Peers: net.Join("n1"), Log: quiet, Failed: disk.Fail})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(Node{Data: []byte("kept")}); err != nil {
		t.Fatal(err)
	}
	fails.Store(true)
	if _, err := s.Put(Node{Data: []byte("lost")}); !errors.Is(err, errNotDurable) {
		t.Errorf("a page whose fsync failed: %v", err)
	}
	if err := <-died; !errors.Is(err, syscall.EIO) {
		t.Errorf("the node is told: %v", err)
	}
	fails.Store(false)
	if _, err := s.Put(Node{Data: []byte("later")}); !errors.Is(err, errNotDurable) {
		t.Errorf("a page after that: %v", err)
	}
	if _, err := s.Put(Node{Data: []byte("lost")}); !errors.Is(err, errNotDurable) {
		t.Errorf("the same page again: %v", err)
	}
	if err := s.durable(s.wal.now()); !errors.Is(err, errNotDurable) {
		t.Errorf("all that was applied: %v", err)
	}
	if err := errors.Join(s.Close(), disk.Close()); !errors.Is(err, store.ErrFailed) {
		t.Errorf("close: %v", err)
	}
}
