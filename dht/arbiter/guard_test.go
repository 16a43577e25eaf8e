package arbiter

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
)

// failing is a file system whose fsync fails on demand.
func failing(fs vfs.FS, fails *atomic.Bool) vfs.FS {
	return errorfs.Wrap(fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch op.Kind {
		case errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo:
			if fails.Load() {
				return syscall.EIO
			}
		default:
		}
		return nil
	}))
}

// Nothing is stored after an fsync has failed, also when the next would succeed, and nobody waits for ever.
func TestTheLogStoresNothingAfterAFailedFsync(t *testing.T) {
	var fails atomic.Bool
	d, err := openDisk(failing(vfs.NewMem(), &fails), "raft", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan error, 1)
	d.guard.onFailure(func(err error) { told <- err })
	entry := func(i uint64) *raft.Log { return &raft.Log{Index: i, Term: 1, Data: []byte("x")} }
	if err := d.StoreLog(entry(1)); err != nil {
		t.Fatal(err)
	}
	fails.Store(true)
	if err := d.StoreLog(entry(2)); !errors.Is(err, errDiskFailed) {
		t.Errorf("the entry whose fsync failed: %v", err)
	}
	if err := <-told; !errors.Is(err, errDiskFailed) {
		t.Errorf("told: %v", err)
	}
	fails.Store(false)
	if err := d.StoreLog(entry(2)); !errors.Is(err, errDiskFailed) {
		t.Errorf("the same again: %v", err)
	}
	if err := d.SetUint64(keyTerm, 7); !errors.Is(err, errDiskFailed) {
		t.Errorf("a term after it: %v", err)
	}
	if last, err := d.LastIndex(); err != nil || last != 1 {
		t.Errorf("the log ends at %d (%v), want 1", last, err)
	}
	// Raft would panic over a term that it cannot store: its goroutine ends instead.
	d.guard.raft.Store(true)
	ended := make(chan bool, 1)
	go func() {
		back := false
		defer func() { ended <- back }()
		if err := d.SetUint64(keyTerm, 8); err == nil {
			t.Error("it was stored")
		}
		back = true
	}()
	if <-ended {
		t.Error("raft's goroutine goes on")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// A database that cannot be opened, for its disk fails, costs an error and not the goroutine that opens it.
func TestOpeningOnAFailingDiskIsAnError(t *testing.T) {
	var fails atomic.Bool
	fails.Store(true)
	if _, err := openDisk(failing(vfs.NewMem(), &fails), "raft", slog.New(slog.DiscardHandler)); err == nil {
		t.Error("it was opened")
	}
}

// A voter whose disk fails, the leader first, votes no more and says so, and is told of to whoever has another one vote. Nothing that was answered
// is lost. (In real time: Pebble's goroutines outlive a database that failed.)
func TestAFailedFsyncEndsTheVote(t *testing.T) {
	c := newCluster(t, 41)
	defer c.close()
	fails := map[peer.ID]*atomic.Bool{}
	halted := make(chan peer.ID, 5)
	c.adjust = func(cfg *Config) {
		f := &atomic.Bool{}
		fails[cfg.Self] = f
		cfg.FS = failing(cfg.FS, f)
		cfg.Halted = func(error) { halted <- cfg.Self }
	}
	c.grow(4)
	c.settled(20*time.Second, 3, 0)
	want := map[string]string{}
	write := func(at *node) {
		t.Helper()
		for i := range 5 {
			key, body := fmt.Sprintf("%d", i), fmt.Sprintf("%d-%d", len(want), i)
			if err := put(at.arb(), key, body, 10*time.Second); err != nil {
				t.Fatal(err)
			}
			want[key] = body
		}
	}
	write(c.nodes[0])
	victim := c.leader()
	fails[victim.id].Store(true)
	for _, n := range c.live() { // also by who leads with a disk that has just failed
		write(n)
	}
	if id := <-halted; id != victim.id {
		t.Errorf("%s is told to have stopped, want %s", id, victim.id)
	}
	st := victim.arb().Status()
	if st.Role != "halted" || !strings.Contains(st.Halted, "raft database failed") {
		t.Errorf("its status: %s, %q", st.Role, st.Halted)
	}
	for _, n := range c.live() {
		n.view().change(victim.id, func(m *Member) { m.NoVoter = true }) // as a node does that is told
	}
	c.eventually(20*time.Second, "another one to vote in its place", func() bool {
		for _, n := range c.live() {
			for _, id := range n.arb().Status().Voters {
				if id == victim.id {
					return false
				}
			}
		}
		return true
	})
	write(c.nodes[1])
	for _, n := range c.live() {
		for key, body := range want {
			ctx, cancel := within(10 * time.Second)
			r, ok, err := n.arb().Read(ctx, key)
			cancel()
			if err != nil || !ok || string(r.Body) != body {
				t.Errorf("%s is %q at %s (%v), want %q", key, r.Body, n.id, err, body)
			}
		}
	}
}

// A call of another node may be answered while this one ends: what comes after the end is told so, and does not end the process by a panic.
func TestTheLogAnswersAfterItsEnd(t *testing.T) {
	d, err := openDisk(vfs.NewMem(), "raft", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.StoreLog(&raft.Log{Index: 1, Term: 1, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	d.cache = [cachedLogs]*raft.Log{} // as if it was long ago
	stop, read := make(chan struct{}), make(chan error)
	go func() {
		for {
			var l raft.Log
			select {
			case <-stop:
				read <- d.GetLog(1, &l)
				return
			default:
				if err := d.GetLog(1, &l); err != nil && !errors.Is(err, errDiskClosed) {
					read <- err
					return
				}
			}
		}
	}()
	for range 2 { // a second end is none
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	if err := <-read; !errors.Is(err, errDiskClosed) {
		t.Errorf("reading: %v", err)
	}
	if _, err := d.List(); !errors.Is(err, errDiskClosed) {
		t.Errorf("snapshots: %v", err)
	}
	if err := d.StoreLog(&raft.Log{Index: 2, Term: 1}); !errors.Is(err, errDiskClosed) {
		t.Errorf("storing: %v", err)
	}
	if err := d.SetUint64(keyTerm, 2); !errors.Is(err, errDiskClosed) {
		t.Errorf("a term: %v", err)
	}
}
