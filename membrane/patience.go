package membrane

import (
	"context"
	"fmt"
	"time"
)

const (
	// StateStall is how long a component may take to give or to take the next frame of its state. It bounds no transfer as a whole: a large state takes its
	// time, one that stands still is given up.
	StateStall = 10 * time.Second
	// StateTaken is how long a component may take to answer that it has taken a state, after the last frame: it may have to build what it holds in memory.
	StateTaken = time.Minute
)

// StalledError says that a component stood still.
type StalledError struct {
	What string // that it did not do
	For  time.Duration
}

func (e *StalledError) Error() string {
	return fmt.Sprintf("the component %s for %s: it stands still, and is not waited for any longer", e.What, e.For)
}

// Timeout says so to who asks for a time-out of any kind.
func (e *StalledError) Timeout() bool { return true }

// Patience bounds each step of an exchange with a component by itself. It is for one goroutine.
type Patience struct {
	ctx    context.Context //nolint:containedctx // it is what a Patience is: the context of the exchange that it ends
	cancel context.CancelCauseFunc
}

// NewPatience makes one whose context ends with ctx, with the step that takes too long, and with Close.
func NewPatience(ctx context.Context) *Patience {
	ctx, cancel := context.WithCancelCause(ctx)
	return &Patience{ctx: ctx, cancel: cancel}
}

// Context is that of the exchange.
func (p *Patience) Context() context.Context { return p.ctx }

// Close ends the exchange.
func (p *Patience) Close() { p.cancel(nil) }

// Step runs one step, which has to end when the context does. Where it takes too long its error is a *StalledError that says what was not done.
func (p *Patience) Step(limit time.Duration, what string, f func() error) error {
	timer := time.AfterFunc(limit, func() { p.cancel(&StalledError{What: what, For: limit}) })
	err := f()
	timer.Stop()
	if err == nil {
		return nil
	}
	if stalled, ok := context.Cause(p.ctx).(*StalledError); ok { //nolint:errorlint // the cause is given as it is
		return stalled
	}
	return err
}
