package store

import (
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// A store that fails while it is opened, or says of itself that it failed, ends nobody's goroutine and does not hang.
func TestAFailingDiskIsAnErrorOfOpen(t *testing.T) {
	mem := vfs.NewMem()
	s := open(t, mem, Options{})
	for range 100 { // for the next start to replay
		if err := s.DB().Set([]byte("k"), make([]byte, 1000), pebble.Sync); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var told atomic.Int32
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch op.Kind {
		case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
			return syscall.EIO
		default:
			return nil
		}
	}))
	again, err := Open(fs, "data/db", Options{OnFatal: func(error) { told.Add(1) }})
	if err == nil {
		t.Fatalf("it was opened: %+v", again.Status())
	}
}

func TestFailEndsTheStore(t *testing.T) {
	died := make(chan error, 1)
	s, err := Open(vfs.NewMem(), "db", Options{OnFatal: func(err error) { died <- err }})
	if err != nil {
		t.Fatal(err)
	}
	s.Fail(errors.New("pages: an fsync failed"))
	s.Fail(errors.New("again"))
	if err := <-died; !strings.Contains(err.Error(), "pages") {
		t.Errorf("told of %v", err)
	}
	if err := s.Close(); !errors.Is(err, ErrFailed) {
		t.Errorf("close: %v", err)
	}
	select {
	case err := <-died:
		t.Errorf("told twice: %v", err)
	default:
	}
}

// What else a node writes to the disk gets the room of the ballast, too.
func TestTheStoresFileSystemGivesTheBallastUp(t *testing.T) {
	var full atomic.Bool
	mem := vfs.NewMem()
	s := open(t, errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpCreate && strings.HasSuffix(op.Path, "other") && full.Load() {
			full.Store(false) // the ballast makes room
			return syscall.ENOSPC
		}
		return nil
	})), Options{})
	full.Store(true)
	f, err := s.FS().Create("other", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatalf("the write was not tried again: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if !s.Low() {
		t.Error("the store does not know that its disk was full")
	}
}
