package registry

import (
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// dropped is a node that watches its drop folder.
func dropped(t *testing.T, f func(w *world, n *node)) {
	t.Helper()
	inWorld(t, 1, func(w *world) {
		n := w.nodes[0]
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); n.Run(ctx) }() //nolint:errcheck // ends with ctx
		defer func() { cancel(); <-done }()
		f(w, n)
	})
}

// drop puts a file into the drop folder.
func (n *node) drop(name string, b []byte) {
	n.w.t.Helper()
	n.w.must(os.WriteFile(filepath.Join(n.cfg.Drop, name), b, 0o600))
}

// of is what became of a file.
func (n *node) of(name string) Dropped {
	for _, d := range n.Drops() {
		if d.File == name {
			return d
		}
	}
	return Dropped{}
}

func (n *node) becomes(name, state string) Dropped {
	n.w.t.Helper()
	n.w.eventually(30*time.Second, name+" is "+state, func() bool { return n.of(name).State == state })
	return n.of(name)
}

func TestADroppedFileIsTakenIn(t *testing.T) {
	dropped(t, func(w *world, n *node) {
		n.drop("kv-1.0", component(machineHere(), "kv", "1.0.0", 1000))
		d := n.becomes("kv-1.0", "ready")
		if art, ok := n.Artifact(d.Digest); !ok || art.GetName() != "kv" {
			w.t.Errorf("%v: %v", d, art)
		}
		// The same bytes again, under another name.
		n.drop("kv-copy", component(machineHere(), "kv", "1.0.0", 1000))
		if other := n.becomes("kv-copy", "ready"); other.Digest != d.Digest || len(n.List()) != 1 {
			w.t.Errorf("%v", other)
		}
		// Another file in its place.
		n.drop("kv-1.0", component(machineHere(), "kv", "1.1.0", 2000))
		w.eventually(10*time.Second, "the new one is ready", func() bool { x := n.of("kv-1.0"); return x.State == "ready" && x.Digest != d.Digest })
		if len(n.List()) != 2 {
			w.t.Errorf("%v", n.List())
		}
		// Taken out of the folder it stays in the registry.
		w.must(os.Remove(filepath.Join(n.cfg.Drop, "kv-1.0")))
		w.eventually(5*time.Second, "the folder's book forgets it", func() bool { return n.of("kv-1.0").File == "" })
		if len(n.List()) != 2 {
			w.t.Errorf("%v", n.List())
		}
	})
}

func TestAFileThatIsBeingWrittenIsWaitedFor(t *testing.T) {
	dropped(t, func(w *world, n *node) {
		body := component(machineHere(), "kv", "1.0.0", 5000)
		binary.LittleEndian.PutUint64(body[64+32:], uint64(len(body)-120)) // the header's segment reaches to the file's end
		for at := 50; at < len(body); at += 500 {
			n.drop("kv", body[:at])
			time.Sleep(700 * time.Millisecond)
			if s := n.of("kv").State; s != "waiting" {
				w.t.Fatalf("%d of %d bytes: %s", at, len(body), s)
			}
		}
		n.drop("kv", body)
		n.becomes("kv", "ready")
		if len(n.noticed("incomplete"))+len(n.noticed("refused")) != 0 {
			w.t.Errorf("%v", n.notices)
		}
	})
}

func TestAFileThatStaysIncompleteIsCalledSo(t *testing.T) {
	dropped(t, func(w *world, n *node) {
		body := component(machineHere(), "kv", "1.0.0", 0)
		n.drop("kv", body[:200])
		n.becomes("kv", "incomplete")
		time.Sleep(time.Minute)
		if len(n.noticed("incomplete")) != 1 {
			w.t.Errorf("%v", n.notices)
		}
		n.drop("kv", body)
		n.becomes("kv", "ready")
	})
}

func TestWhatIsDroppedByMistakeIsRefusedOnce(t *testing.T) {
	dropped(t, func(w *world, n *node) {
		n.drop("README", []byte("hello, this is text"))
		n.drop("foreign", component(elf.EM_S390, "kv", "1.0.0", 0))
		n.drop("object.o", elfFile(machineHere(), func(h *elf.Header64, _ *elf.Prog64) { h.Type = uint16(elf.ET_REL) }))
		n.drop("hangs", component(machineHere(), "hangs", "1.0.0", 0))
		n.drop(".hidden", []byte("no"))
		n.drop("kv~", []byte("no"))
		n.drop("kv.part", []byte("no"))
		w.must(os.Mkdir(filepath.Join(n.cfg.Drop, "folder"), 0o700))
		w.must(syscall.Mkfifo(filepath.Join(n.cfg.Drop, "pipe"), 0o600))
		w.must(os.Symlink("nowhere", filepath.Join(n.cfg.Drop, "dangling")))
		n.mu.Lock()
		n.describe = func(ctx context.Context, f *os.File) (*componentv1.Description, error) {
			if filepath.Base(f.Name()) == "hangs" {
				time.Sleep(10 * time.Second)
				return nil, errors.New("it did not answer in time")
			}
			return describeByName(ctx, f)
		}
		n.mu.Unlock()
		for name, why := range map[string]string{"README": "not an executable", "foreign": "linux/s390x", "object.o": "ET_REL", "hangs": "in time", "pipe": "regular"} {
			if d := n.becomes(name, "refused"); !strings.Contains(d.Reason, why) {
				w.t.Errorf("%s: %q, want %q", name, d.Reason, why)
			}
		}
		time.Sleep(time.Minute)
		if got := len(n.noticed("refused")); got != 5 || len(n.Drops()) != 5 {
			w.t.Errorf("%d notices; %v", got, n.Drops())
		}
		// The node goes on.
		n.drop("kv", component(machineHere(), "kv", "1.0.0", 0))
		n.becomes("kv", "ready")
	})
}

func TestWhatTheClusterCannotTakeIsTriedAgainAtLeisure(t *testing.T) {
	dropped(t, func(w *world, n *node) {
		tries := 0
		n.mu.Lock()
		n.describe = func(ctx context.Context, f *os.File) (*componentv1.Description, error) {
			tries++
			return describeByName(ctx, f)
		}
		n.mu.Unlock()
		w.log.mu.Lock()
		w.log.broken = errors.New("no leader")
		w.log.mu.Unlock()
		n.drop("kv", component(machineHere(), "kv", "1.0.0", 0))
		time.Sleep(2 * time.Minute)
		if d := n.of("kv"); d.State != "waiting" || !strings.Contains(d.Reason, "no leader") || len(n.noticed("refused")) != 0 {
			w.t.Errorf("%+v", d)
		}
		if tries < 4 || tries > 12 {
			w.t.Errorf("%d tries in two minutes", tries)
		}
		w.log.mu.Lock()
		w.log.broken = nil
		w.log.mu.Unlock()
		w.eventually(2*time.Minute, "it is taken in", func() bool { return n.of("kv").State == "ready" })
	})
}
