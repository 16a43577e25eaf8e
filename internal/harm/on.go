//go:build harm

package harm

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
)

// look is the time between two looks at the file.
const look = 5 * time.Millisecond

var orders = obey(os.Getenv(Variable))

// obey reads the orders before anything else of the process runs, and goes on looking.
func obey(path string) *atomic.Pointer[Orders] {
	p := &atomic.Pointer[Orders]{}
	p.Store(&Orders{})
	if path == "" {
		return p
	}
	last := read(p, path, "")
	installClock()
	go func() {
		for {
			time.Sleep(look)
			last = read(p, path, last)
		}
	}()
	return p
}

// read takes the orders when they are others than last. No file: none.
func read(p *atomic.Pointer[Orders], path, last string) string {
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		fmt.Fprintf(os.Stderr, "harm: %v\n", err)
		return last
	}
	if string(raw) == last {
		return last
	}
	var o Orders
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &o); err != nil {
			fmt.Fprintf(os.Stderr, "harm: %s: %v\n", path, err)
			return last
		}
	}
	setClock(o.Clock)
	p.Store(&o)
	return string(raw)
}

// FS returns a file system whose fsync obeys the orders.
func FS(fs vfs.FS) vfs.FS {
	return harmed{errorfs.Wrap(fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch op.Kind {
		case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
		default:
			return nil
		}
		o := orders.Load()
		if in(op.Path, o.Slow) {
			time.Sleep(o.SlowFor)
		}
		if in(op.Path, orders.Load().Fail) {
			return fmt.Errorf("fsync %s: %w (ordered)", op.Path, syscall.EIO)
		}
		return nil
	}))}
}

// harmed is errorfs's file system but for one thing: of a file that is used again, as Pebble's logs are once a few megabytes are written, it would give the file
// as it is. Another one is as good.
type harmed struct{ *errorfs.FS }

// ReuseForWrite implements vfs.FS.
func (h harmed) ReuseForWrite(was, name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	if err := h.Remove(was); err != nil {
		return nil, err
	}
	return h.Create(name, category)
}

func in(path string, folders []string) bool {
	for _, f := range folders {
		if strings.Contains(path+"/", f) { // a folder is synced, too
			return true
		}
	}
	return false
}

// Format returns the format that the orders claim.
func Format(real uint32) uint32 {
	if f := orders.Load().Format; f > 0 {
		return f
	}
	return real
}
