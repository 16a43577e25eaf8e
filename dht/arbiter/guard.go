package arbiter

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// errDiskFailed is wrapped by what is written after the database has failed. It was not carried out, or nobody can say that it was.
var errDiskFailed = errors.New("the raft database failed; check the disk, then start the node again")

// guard stands between raft and its database. Pebble cannot go on after a failed write or fsync: it calls Fatalf, which must not return, for its
// caller would take what was to be written for durable. So each write runs on a goroutine of its own, which Fatalf ends; whoever waits for it is
// told that it failed, and so is everybody who comes later. A second fsync that succeeded would prove nothing: the kernel reports the failure
// once and forgets the pages.
type guard struct {
	log    *slog.Logger
	failed chan struct{} // closed when the database has failed
	once   sync.Once
	why    error // before failed is closed

	// raft is set while raft uses the database. It panics where it cannot store its term, so its goroutine ends instead: what it was about to
	// do it does no more, and the rest of raft is shut down by told.
	raft atomic.Bool
	told atomic.Pointer[func(error)]
}

func newGuard(log *slog.Logger) *guard { return &guard{log: log, failed: make(chan struct{})} }

// onFailure has f told once, on a goroutine of its own, also when it has failed already.
func (g *guard) onFailure(f func(error)) {
	g.told.Store(&f)
	if err := g.failure(); err != nil {
		go f(err)
	}
}

func (g *guard) failure() error {
	select {
	case <-g.failed:
		return g.why
	default:
		return nil
	}
}

func (g *guard) fail(what string) {
	g.once.Do(func() {
		g.why = fmt.Errorf("%w: %s", errDiskFailed, what)
		close(g.failed)
		g.log.Error("the raft database failed: this node votes no more", "err", what, "try", "check the disk and its free space, then start the node again")
		if f := g.told.Load(); f != nil {
			go (*f)(g.why)
		}
	})
}

// do runs a write. It returns as soon as the write has ended or the database has failed, whichever is first.
func (g *guard) do(write func() error) error {
	if err := g.failure(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		err := errDiskFailed
		defer func() { done <- err }() // also when Fatalf ends this goroutine
		err = write()
	}()
	select {
	case err := <-done:
		return errors.Join(err, g.failure())
	case <-g.failed:
		return g.why
	}
}

// promise is do for what raft relies on without asking: it does not return to raft after a failure.
func (g *guard) promise(write func() error) error {
	err := g.do(write)
	if g.failure() != nil && g.raft.Load() {
		runtime.Goexit()
	}
	return err
}

// walCreated is told by Pebble, which panics next when it could not make a log to go on with: with locks in its hands that not even a recovered
// panic gives back. Its goroutine stays here until the process ends; nobody waits for it.
func (g *guard) walCreated(i pebble.WALCreateInfo) {
	if i.Err != nil {
		g.fail(fmt.Sprintf("create WAL: %v", i.Err))
		select {}
	}
}

// Infof, Errorf and Fatalf implement pebble.Logger.
func (g *guard) Infof(f string, args ...any) {
	g.log.Debug("raft database: " + fmt.Sprintf(f, args...))
}

func (g *guard) Errorf(f string, args ...any) {
	g.log.Error("raft database: " + fmt.Sprintf(f, args...))
}

func (g *guard) Fatalf(f string, args ...any) {
	g.fail(fmt.Sprintf(f, args...))
	runtime.Goexit()
}
