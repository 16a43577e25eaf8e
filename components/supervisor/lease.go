package supervisor

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/internal/planted"
	"github.com/coppice-project/coppice/internal/unison"
)

const (
	leaseTick = 100 * time.Millisecond
	// pausedFor: a node that did not run for so long may have been given up by the others (silence is 1.25 s): what it owned must be
	// looked up again before it serves.
	pausedFor = 800 * time.Millisecond
	// outOfTouch: a node that has not heard of the arbiter for so long stops serving what it owns; elsewhere it is taken over
	// (notes §5: about 3 s). In profile wan see patienceOf, as for awayFor and confirmWithin.
	outOfTouch = 3 * time.Second
	// confirmWithin bounds one try to read the log. It is less than the silence after which others act.
	confirmWithin = time.Second
	// lateBy and lateFor: a node whose own ticks came so late within that time is starved; silence of a component says little then.
	lateBy  = 200 * time.Millisecond
	lateFor = 5 * time.Second
	// awayFor and steadyFor: a node that did not hear the arbiter for so long may itself be the one that is cut off, until it has been in touch
	// for a while again (members tell each other within a heartbeat): what it holds against others in silence counts for nothing.
	awayFor   = 1500 * time.Millisecond
	steadyFor = 300 * time.Millisecond
	// strangeFor: what a node found while it was away, and held for so long without the arbiter, needs more: others that it held dead as long must
	// first be met again (dht/members: connections, an exchange, a round of news).
	strangeFor  = 500 * time.Millisecond
	reunitedFor = 1500 * time.Millisecond
)

// patience is how long a node goes without a word of the arbiter.
type patience struct{ outOfTouch, away, confirm time.Duration }

// patienceOf a profile. What is healthy is never longer without a word than the arbiter's Timings have it: a voter hears the leader's heartbeat
// every half of Heartbeat, and tells followers what it knows every FeedKeepalive: 5 s in wan. Who is shorter than that doubts his leases all
// the time, and asks the leader, who asks all voters.
func patienceOf(profile string) patience {
	if profile == members.WAN.Name {
		return patience{7 * time.Second, 5500 * time.Millisecond, 2500 * time.Millisecond} // arbiter.Unheard is 5 s
	}
	return patience{outOfTouch, awayFor, confirmWithin}
}

// lease is a node's right to serve what it owns, by what it heard. It is no proof: a leader that was deposed and does not know it yet, or wakes from
// a suspension, is heard like any other, so a node cut off together with one may go on for longer than outOfTouch. That is enough where the
// epoch fences (safe). What is exactly-one needs a lease besides that the leader acknowledges for it (session.go).
// It is asked on each call, on the way in and on the way out, so it costs two atomic reads and a look at CLOCK_BOOTTIME. It is lost at once when the process was suspended, after outOfTouch without the arbiter, and when
// others have called this node dead; it comes back when the registers have been read through the log.
type lease struct {
	key    string // of its ticks: this node
	boot   func() time.Duration
	touch  func() time.Duration
	sync   func(ctx context.Context) error
	log    *slog.Logger
	bears  patience
	begun  time.Duration
	ticked atomic.Int64  // boot time of the last tick
	late   atomic.Int64  // boot time of the last tick that came late
	away   atomic.Int64  // boot time of the last tick that found the arbiter out of reach
	lost   atomic.Uint64 // how often it was lost
	valid  atomic.Uint64 // how many of those were before the last confirmation
}

func newLease(cfg Config) *lease {
	l := &lease{key: string(cfg.Self), boot: cfg.BootTime, touch: cfg.Touch, sync: cfg.Arbiter.Sync, log: cfg.Log, bears: patienceOf(cfg.Profile)}
	if l.boot == nil {
		start := time.Now()
		l.boot = func() time.Duration { return time.Since(start) }
	}
	if l.touch == nil {
		l.touch = func() time.Duration { return 0 }
	}
	l.begun = l.boot()
	l.ticked.Store(int64(l.begun))
	l.late.Store(int64(-2 * lateFor))
	l.away.Store(int64(-2 * lateFor))
	return l
}

// holds says whether this node may serve what it owns right now.
func (l *lease) holds() bool {
	if planted.Bug("lease-not-asked") {
		return true
	}
	return l.lost.Load() == l.valid.Load() && l.boot()-time.Duration(l.ticked.Load()) < pausedFor
}

// starved says whether this node itself ran late of late.
func (l *lease) starved() bool { return l.boot()-time.Duration(l.late.Load()) < lateFor }

// steady says whether this node has been in touch with the arbiter for long enough to act on a silence that it found at a time of its boot clock.
func (l *lease) steady(found time.Duration) bool {
	away, wait := time.Duration(l.away.Load()), steadyFor
	if away-found > strangeFor {
		wait = reunitedFor
	}
	return l.holds() && l.boot()-away > wait && l.touch() < l.bears.away
}

// doubt has the ownership confirmed before anything is served again: others have given this node up.
func (l *lease) doubt() { l.lost.Add(1) }

// run keeps the lease. When it was lost and the log has been read, judge marks what is not this node's any more, before anything is
// served again; wake has the rest follow.
func (l *lease) run(ctx context.Context, judge, wake func()) {
	tick := unison.New(leaseTick, l.key)
	defer tick.Stop()
	for {
		l.look(wake)
		if lost := l.lost.Load(); lost != l.valid.Load() {
			l.confirm(ctx, lost, judge, wake)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Next()
		}
	}
}

// look says whether the lease is lost now.
func (l *lease) look(wake func()) {
	now := l.boot()
	gap := now - time.Duration(l.ticked.Load())
	held := l.lost.Load() == l.valid.Load()
	if gap > leaseTick+lateBy {
		l.late.Store(int64(now))
	}
	away := l.touch()
	if away > l.bears.away {
		l.away.Store(int64(now))
	}
	switch {
	case gap >= pausedFor:
		l.log.Warn("this node did not run for a while: nothing is served before its ownership is confirmed", "gap", gap.Round(time.Millisecond))
		l.lost.Add(1)
	case away > l.bears.outOfTouch && held && !planted.Bug("serves-out-of-touch"):
		l.log.Warn("the arbiter is out of reach: nothing is served until it is back", "since", away.Round(time.Millisecond))
		l.lost.Add(1)
		wake()
	}
	l.ticked.Store(int64(now)) // after lost was raised: between the two the gap still shows
}

// confirm has the local view catch up with the log, and takes up serving again. What was lost meanwhile stays lost.
func (l *lease) confirm(ctx context.Context, lost uint64, judge, wake func()) {
	begun := l.boot()
	sctx, cancel := context.WithTimeout(ctx, l.bears.confirm)
	defer cancel()
	if l.sync(sctx) != nil {
		now := int64(l.boot())
		l.ticked.Store(now) // this try took its time; what is lost stays lost
		l.away.Store(now)
		return
	}
	judge()
	now := l.boot()
	if now-begun > l.bears.confirm+lateBy {
		return // it was suspended between the log's answer and now: who knows who owns what since
	}
	l.away.Store(int64(now))
	l.ticked.Store(int64(now))
	l.valid.Store(lost)
	if l.holds() {
		l.log.Info("ownership is confirmed: serving again")
	}
	wake()
}
