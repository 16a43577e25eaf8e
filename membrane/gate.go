package membrane

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/coppice-project/coppice/internal/planted"
)

// Limits of a gate. Zero values mean the defaults that are named.
const (
	defaultMaxHeld   = 10_000           // calls that wait at one gate; each costs a goroutine and a stream, about 10 KiB
	defaultHoldLimit = 10 * time.Second // how long a call without a deadline waits
)

type gateMode uint8

const (
	gateHeld gateMode = iota
	gateOpen
	gateClosed
)

// phase is what the gate does from one change to the next. It is immutable; changed is closed when the next one begins.
type phase struct {
	mode    gateMode
	backend *Backend // who gets the calls; nil before the first Switch
	token   Token
	why     string     // held: what for
	refusal *callError // closed: what callers are told
	since   time.Time
	changed chan struct{}
}

// gateConfig is what a gate needs of its surroundings.
type gateConfig struct {
	maxHeld   int64
	holdLimit time.Duration
	serving   func() bool // nil: always
	onStale   func(Token) // nil: nobody cares; must not block
}

// gate is what every call of an instance passes, whatever its way: it holds calls back, counts those inside, and lets an answer out
// only when its effects are safe and the instance is still ours.
type gate struct {
	cfg   gateConfig
	stats stats
	cur   atomic.Pointer[phase]
	held  atomic.Int64
	// durable: answers wait for their mark (durability each-call).
	durable atomic.Bool
	seen    atomic.Pointer[Token] // the newest token that a caller has shown us

	mu sync.Mutex // guards changes of cur
}

func newGate(cfg gateConfig) *gate {
	if cfg.maxHeld <= 0 {
		cfg.maxHeld = defaultMaxHeld
	}
	if cfg.holdLimit <= 0 {
		cfg.holdLimit = defaultHoldLimit
	}
	g := &gate{cfg: cfg}
	g.cur.Store(&phase{mode: gateHeld, why: "it has not started", since: time.Now(), changed: make(chan struct{})})
	g.seen.Store(&Token{})
	return g
}

// change begins a new phase, which edit makes from a copy of the present one. It reports what edit reports.
func (g *gate) change(edit func(p *phase) error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.cur.Load()
	next := *old
	next.changed, next.since = make(chan struct{}), time.Now()
	if err := edit(&next); err != nil {
		return err
	}
	g.cur.Store(&next)
	close(old.changed)
	return nil
}

// hold makes calls wait from now on. Those inside go on.
func (g *gate) hold(why string) error {
	return g.change(func(p *phase) error {
		if p.mode == gateClosed {
			return fmt.Errorf("hold: the gate is closed: %s", p.refusal)
		}
		p.mode, p.why = gateHeld, why
		return nil
	})
}

// release lets the held calls in.
func (g *gate) release() error {
	return g.change(func(p *phase) error {
		switch {
		case p.mode == gateClosed:
			return fmt.Errorf("release: the gate is closed: %s", p.refusal)
		case p.backend == nil:
			return fmt.Errorf("release: no process serves it")
		case p.backend.dead():
			return fmt.Errorf("release: its process has ended (%s)", p.backend.proc.Exit())
		}
		p.mode, p.why = gateOpen, ""
		return nil
	})
}

// swap puts another process and another token behind a held gate. Answers that still wait for marks of the process before are
// discarded: after a drain there are none.
func (g *gate) swap(b *Backend, t Token) error {
	var old *Backend
	err := g.change(func(p *phase) error {
		if p.mode != gateHeld {
			return fmt.Errorf("switch: the gate is not held")
		}
		if t.Compare(p.token) < 0 {
			return fmt.Errorf("switch: token %s is older than %s", t, p.token)
		}
		if p.backend != b {
			old = p.backend
		}
		p.backend, p.token = b, t
		return nil
	})
	if err == nil && old != nil {
		old.retired.Store(old.inflight.Load() == 0) // drained: what it still streams is good
		old.marks.discard()
	}
	return err
}

// setToken continues with the same process in another epoch.
func (g *gate) setToken(t Token) error {
	return g.change(func(p *phase) error {
		if t.Compare(p.token) < 0 {
			return fmt.Errorf("token %s is older than %s", t, p.token)
		}
		p.token = t
		return nil
	})
}

// close refuses every call from now on, those that are held included, and discards the answers that still wait. moved, when known,
// tells callers where to go.
func (g *gate) close(why string, moved *Redirect) {
	ce := refuse(untouched, codes.Unavailable, "%s", why)
	ce.moved = moved
	var b *Backend
	_ = g.change(func(p *phase) error { // edit never fails
		p.mode, p.refusal, b = gateClosed, ce, p.backend
		return nil
	})
	if b != nil {
		b.marks.discard()
	}
}

// reopen makes a closed gate a held one: the instance is ours again.
func (g *gate) reopen(why string) {
	_ = g.change(func(p *phase) error { // edit never fails
		if p.mode == gateClosed {
			p.mode, p.refusal, p.why = gateHeld, nil, why
		}
		return nil
	})
}

// drain waits until nothing is inside the process any more, answers that wait for their mark included. The gate has to be held.
func (g *gate) drain(ctx context.Context) error {
	p := g.cur.Load()
	if p.mode == gateOpen {
		return fmt.Errorf("drain: the gate is open")
	}
	b := p.backend
	if b == nil {
		return nil
	}
	b.draining.Store(true)
	defer b.draining.Store(false)
	for {
		n := b.inflight.Load()
		if n == 0 {
			return nil
		}
		select {
		case <-b.zero:
		case <-ctx.Done():
			return fmt.Errorf("drain: %d calls are still inside (%s): %w", n, g.inside(), ctx.Err())
		}
	}
}

// inside names the methods of the calls that are inside.
func (g *gate) inside() string {
	var names []string
	for _, m := range g.stats.snapshot().Methods {
		if m.InFlight > 0 {
			names = append(names, fmt.Sprintf("%s %d", m.Method, m.InFlight))
		}
	}
	if len(names) == 0 {
		return "streams of unknown methods"
	}
	return strings.Join(names, ", ")
}

// enter admits one call, at once or when the gate opens. The caller calls leave with the phase's backend when the call is over.
func (g *gate) enter(ctx context.Context) (*phase, error) {
	for {
		p := g.cur.Load()
		switch p.mode {
		case gateOpen:
			p.backend.inflight.Add(1)
			if g.cur.Load() != p {
				// The gate changed between the look and the count: a drain may have seen zero. Step back and look again.
				g.leave(p.backend)
				continue
			}
			if err := p.backend.takeSlot(ctx); err != nil {
				g.leave(p.backend)
				return nil, err
			}
			if err := g.mayServe(); err != nil {
				p.backend.giveSlot()
				g.leave(p.backend)
				return nil, err
			}
			return p, nil
		case gateClosed:
			g.stats.refused.Add(1)
			return nil, p.refusal
		}
		if err := g.wait(ctx, p); err != nil {
			g.stats.refused.Add(1)
			return nil, err
		}
	}
}

func (g *gate) mayServe() error {
	if g.cfg.serving != nil && !g.cfg.serving() {
		g.stats.refused.Add(1)
		return refuse(untouched, codes.Unavailable, "this node does not hold the instance's lease now")
	}
	return nil
}

// wait queues a call until the phase is over.
func (g *gate) wait(ctx context.Context, p *phase) error {
	defer g.held.Add(-1)
	if g.held.Add(1) > g.cfg.maxHeld {
		return refuse(final, codes.ResourceExhausted, "%d calls wait already (%s)", g.cfg.maxHeld, p.why)
	}
	var limit <-chan time.Time
	if _, ok := ctx.Deadline(); !ok {
		t := time.NewTimer(g.cfg.holdLimit)
		defer t.Stop()
		limit = t.C
	}
	select {
	case <-p.changed:
		return nil
	case <-limit:
		return refuse(final, codes.DeadlineExceeded, "held for %s: %s", g.cfg.holdLimit, p.why)
	case <-ctx.Done():
		code := codes.DeadlineExceeded
		if ctx.Err() == context.Canceled { //nolint:errorlint // ctx.Err returns it bare
			code = codes.Canceled
		}
		return refuse(final, code, "held since %s: %s", time.Since(p.since).Round(time.Millisecond), p.why)
	}
}

// exit is leave for a call that enter admitted.
func (g *gate) exit(p *phase) {
	p.backend.giveSlot()
	g.leave(p.backend)
}

func (g *gate) leave(b *Backend) {
	if b.inflight.Add(-1) == 0 && b.draining.Load() {
		select {
		case b.zero <- struct{}{}:
		default:
		}
	}
}

// checkToken refuses a call that was meant for a newer epoch than ours: then we are stale, whatever we believe. A call stamped with an
// older one is served: it found the owner.
func (g *gate) checkToken(p *phase, t *Token) error {
	if t == nil || t.Compare(p.token) <= 0 || planted.Bug("token-not-checked") {
		return nil
	}
	if cur := g.cur.Load(); t.Compare(cur.token) <= 0 {
		return nil // the token was raised while we looked
	}
	for {
		old := g.seen.Load()
		if t.Compare(*old) <= 0 {
			break
		}
		if g.seen.CompareAndSwap(old, t) {
			if g.cfg.onStale != nil {
				g.cfg.onStale(*t)
			}
			break
		}
	}
	g.stats.refused.Add(1)
	return refuse(untouched, codes.Unavailable, "stale: this node serves epoch %s, the caller knows of %s", p.token, *t)
}

// mayAnswer is asked on the way out: the answer of an instance that is not ours any more is not given.
func (g *gate) mayAnswer(p *phase) error {
	if planted.Bug("stale-reply") {
		return nil
	}
	cur := g.cur.Load()
	switch {
	case cur.mode == gateClosed:
		return refuse(doubt, codes.Unavailable, "the answer is discarded: %s", cur.refusal)
	case g.cfg.serving != nil && !g.cfg.serving():
		return refuse(doubt, codes.Unavailable, "the answer is discarded: this node lost the instance's lease")
	case cur.backend != p.backend && !p.backend.retired.Load():
		return refuse(doubt, codes.Unavailable, "the answer is discarded: %s", errDiscarded)
	}
	if seen := g.seen.Load(); seen.Compare(cur.token) > 0 {
		return refuse(doubt, codes.Unavailable, "the answer is discarded: epoch %s is over, a caller knows of %s", cur.token, *seen)
	}
	return nil
}
