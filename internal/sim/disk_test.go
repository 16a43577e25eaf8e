package sim

import (
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// disk is the disk of one life. Its fsync can hang: nothing else of the process does, as with a real one.
type disk struct {
	vfs.FS

	mu   sync.Mutex    // guards hung
	hung chan struct{} // closed when fsync goes on; nil: it does not hang
}

func newDisk(fs vfs.FS) *disk {
	d := &disk{}
	d.FS = errorfs.Wrap(fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch op.Kind {
		case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
			d.wait()
		default:
		}
		return nil
	}))
	return d
}

func (d *disk) wait() {
	for {
		d.mu.Lock()
		hung := d.hung
		d.mu.Unlock()
		if hung == nil {
			return
		}
		<-hung
	}
}

// hang has every fsync wait from now on.
func (d *disk) hang() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hung == nil {
		d.hung = make(chan struct{})
	}
}

// cont lets them go on.
func (d *disk) cont() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hung != nil {
		close(d.hung)
		d.hung = nil
	}
}
