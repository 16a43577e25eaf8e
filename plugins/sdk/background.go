package sdk

import (
	"context"
	"errors"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// background is one run of Component.Run.
type background struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error // valid after done
}

func (b *background) failure() error {
	select {
	case <-b.done:
		return b.err
	default:
		return nil
	}
}

// startRun starts Component.Run; in.lifecycle is held.
func (in *Instance) startRun() {
	if in.comp.Run == nil {
		return
	}
	ctx, cancel := context.WithCancel(in.context(context.Background()))
	b := &background{cancel: cancel, done: make(chan struct{})}
	in.mu.Lock()
	in.run = b
	in.mu.Unlock()
	go func() {
		defer close(b.done)
		err := in.comp.Run(ctx, in)
		if err != nil && ctx.Err() == nil {
			b.err = err
			in.log.Error("background work ended", "instance", in.Name(), "error", err)
		}
	}()
}

// cancelRun asks Component.Run to return; the result waits for it. in.lifecycle is held.
func (in *Instance) cancelRun() (wait func(context.Context) error) {
	in.mu.Lock()
	b := in.run
	in.mu.Unlock()
	if b == nil {
		return func(context.Context) error { return nil }
	}
	b.cancel()
	return func(ctx context.Context) error {
		select {
		case <-b.done:
		case <-ctx.Done():
			return errors.New("background work (Component.Run) did not return after its context was cancelled")
		}
		in.mu.Lock()
		in.run = nil
		in.mu.Unlock()
		return nil
	}
}

// reviveRun starts Component.Run again after a freeze that failed, as soon as the cancelled run has returned; in.lifecycle is held.
func (in *Instance) reviveRun() {
	in.mu.Lock()
	b := in.run
	in.mu.Unlock()
	if b == nil {
		in.startRun()
		return
	}
	go func() {
		<-b.done
		in.lifecycle.Lock()
		defer in.lifecycle.Unlock()
		in.mu.Lock()
		again := in.run == b && in.state == componentv1.State_STARTED
		in.mu.Unlock()
		if again {
			in.startRun()
		}
	}()
}
