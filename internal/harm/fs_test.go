//go:build harm

package harm

import (
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// A file that is used again, as Pebble uses its logs, is harmed like a new one.
func TestAFileThatIsUsedAgainIsHarmed(t *testing.T) {
	defer orders.Store(&Orders{})
	mem := vfs.NewMem()
	if err := mem.MkdirAll("n1/raft", 0o755); err != nil {
		t.Fatal(err)
	}
	fs := FS(mem)
	f, err := fs.Create("n1/raft/1.log", vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if f, err = fs.ReuseForWrite("n1/raft/1.log", "n1/raft/2.log", vfs.WriteCategoryUnspecified); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	orders.Store(&Orders{Fail: []string{"/raft/"}})
	if err := f.Sync(); err == nil {
		t.Error("its fsync succeeds")
	}
	if _, err := fs.Stat("n1/raft/1.log"); err == nil {
		t.Error("it is there under its old name, too")
	}
}
