package supervisor

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

const (
	leaseTick = 50 * time.Millisecond
	// pausedFor: a node that did not run for so long may have been given up by the others (silence is 1.25 s): what it owned must be
	// looked up again before it serves.
	pausedFor = 800 * time.Millisecond
	// outOfTouch: a node that has not heard of the arbiter for so long stops serving what it owns; elsewhere it is taken over
	// (notes §5: about 3 s).
	outOfTouch = 3 * time.Second
)

// lease is a node's right to serve what it owns. It is asked on each call, on the way in and on the way out, so it costs two atomic
// reads and a look at CLOCK_BOOTTIME. It is lost at once when the process was suspended, and after outOfTouch without the arbiter;
// it comes back when the registers have been read through the log.
type lease struct {
	boot   func() time.Duration
	touch  func() time.Duration
	sync   func(ctx context.Context) error
	log    *slog.Logger
	ticked atomic.Int64 // boot time of the last tick
	lost   atomic.Bool
}

func newLease(cfg Config) *lease {
	l := &lease{boot: cfg.BootTime, touch: cfg.Touch, sync: cfg.Arbiter.Sync, log: cfg.Log}
	if l.boot == nil {
		start := time.Now()
		l.boot = func() time.Duration { return time.Since(start) }
	}
	if l.touch == nil {
		l.touch = func() time.Duration { return 0 }
	}
	l.ticked.Store(int64(l.boot()))
	return l
}

// holds says whether this node may serve what it owns right now.
func (l *lease) holds() bool {
	return !l.lost.Load() && l.boot()-time.Duration(l.ticked.Load()) < pausedFor
}

// doubt has the ownership confirmed before anything is served again: others have given this node up.
func (l *lease) doubt() { l.lost.Store(true) }

// run keeps the lease. When it was lost and the log has been read, judge marks what is not this node's any more, before anything is
// served again; wake has the rest follow.
func (l *lease) run(ctx context.Context, judge, wake func()) {
	tick := time.NewTicker(leaseTick)
	defer tick.Stop()
	for {
		now := l.boot()
		gap := now - time.Duration(l.ticked.Load())
		away := l.touch()
		switch {
		case gap >= pausedFor:
			l.log.Warn("this node did not run for a while: nothing is served before its ownership is confirmed", "gap", gap.Round(time.Millisecond))
			l.lost.Store(true)
		case away > outOfTouch && !l.lost.Load():
			l.log.Warn("the arbiter is out of reach: nothing is served until it is back", "since", away.Round(time.Millisecond))
			l.lost.Store(true)
		}
		l.ticked.Store(int64(now))
		if l.lost.Load() && l.confirm(ctx) {
			judge()
			l.lost.Store(false)
			l.ticked.Store(int64(l.boot()))
			l.log.Info("ownership is confirmed: serving again")
			wake()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// confirm has the local view catch up with the log.
func (l *lease) confirm(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return l.sync(ctx) == nil
}
