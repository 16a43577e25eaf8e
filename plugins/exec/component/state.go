package component

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// folder is the state of the program: its state_dir. It is a sdk.Opaque.
type folder struct{ a *adapter }

// Checkpoint takes a snapshot of the folder and sends it.
func (f *folder) Checkpoint(ctx context.Context, since uint64, send func(*componentv1.StateFrame) error) error {
	if err := f.a.open(); err != nil {
		return err
	}
	if _, err := f.a.tree.Snapshot(ctx, &holding{a: f.a}); err != nil {
		return fmt.Errorf("snapshot of the folder %s: %w", f.a.cfg.StateDir, err)
	}
	return f.a.tree.Send(ctx, since, send)
}

// Restore makes the folder what the frames say, before the program is started.
func (f *folder) Restore(ctx context.Context, recv func() (*componentv1.StateFrame, error)) (bytes, mark uint64, err error) {
	if err := f.a.open(); err != nil {
		return 0, 0, err
	}
	return f.a.tree.Restore(ctx, recv)
}

// holding keeps the program still for one snapshot.
type holding struct {
	a      *adapter
	hooked bool
	froze  bool
}

// Mapped, Needed and Hold: see dirstate.Still.
func (h *holding) Mapped() (inodes map[uint64]bool, known bool) { return mappedFiles() }

// Needed says that a hook may make the program write.
func (h *holding) Needed() bool { return h.a.cfg.Quiesce != "" }

// Hold is the moment of a snapshot.
func (h *holding) Hold(ctx context.Context) (err error) {
	h.a.ops.Lock()
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Release())
		}
	}()
	if h.a.rests() {
		return nil
	}
	h.hooked = true // from here on it has to be taken back, whatever it did
	if err := h.a.hook(ctx, "quiesce", h.a.cfg.Quiesce); err != nil {
		return err
	}
	h.froze = true
	ctx, cancel := context.WithTimeout(ctx, freezeWithin)
	defer cancel()
	return freeze(ctx)
}

// Release lets the program go on.
func (h *holding) Release() error {
	defer h.a.ops.Unlock()
	var err error
	if h.froze {
		err = signalAll(unix.SIGCONT)
	}
	if h.hooked && !h.a.rests() {
		err = errors.Join(err, h.a.hook(context.Background(), "resume", h.a.cfg.Resume))
	}
	return err
}

// rests says that nothing of the program runs: it is frozen or stopped on purpose, or it has ended, or was never started.
func (a *adapter) rests() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.prog == nil || a.quiet || a.prog.over()
}

// Quiesce has the state rest until Resume. Before a swap or a move the program ends: another one is about to use its port.
func (f *folder) Quiesce(ctx context.Context, reason componentv1.QuiesceRequest_Reason) error {
	return f.a.quiesce(ctx, reason)
}

// Resume has the program go on, or starts it again.
func (f *folder) Resume(ctx context.Context) error { return f.a.resume(ctx) }

func (a *adapter) quiesce(ctx context.Context, reason componentv1.QuiesceRequest_Reason) error {
	a.ops.Lock()
	defer a.ops.Unlock()
	if a.rests() {
		a.setQuiet(false)
		return nil
	}
	if reason == componentv1.QuiesceRequest_SWAP || reason == componentv1.QuiesceRequest_MIGRATE {
		if err := a.endProgram(ctx); err != nil {
			return err
		}
		a.setQuiet(false)
		return nil
	}
	if err := a.hook(ctx, "quiesce", a.cfg.Quiesce); err != nil {
		return errors.Join(err, a.hook(ctx, "resume", a.cfg.Resume))
	}
	fctx, cancel := context.WithTimeout(ctx, freezeWithin)
	defer cancel()
	if err := freeze(fctx); err != nil {
		return errors.Join(err, signalAll(unix.SIGCONT), a.hook(ctx, "resume", a.cfg.Resume))
	}
	a.setQuiet(true)
	return nil
}

func (a *adapter) setQuiet(frozen bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.quiet, a.frozen = true, frozen
}

func (a *adapter) resume(ctx context.Context) error {
	a.ops.Lock()
	defer a.ops.Unlock()
	a.mu.Lock()
	frozen, gone := a.frozen, a.prog == nil
	a.mu.Unlock()
	if gone {
		return a.launch(ctx)
	}
	if frozen {
		if err := signalAll(unix.SIGCONT); err != nil {
			return err
		}
		if err := a.hook(ctx, "resume", a.cfg.Resume); err != nil {
			return err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.quiet, a.frozen, a.health = false, false, nil
	return nil
}
