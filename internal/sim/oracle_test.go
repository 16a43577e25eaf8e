package sim

import (
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
)

const (
	hearEvery  = 100 * time.Millisecond
	silentFor  = 1600 * time.Millisecond // suspicion and agreement, as members take
	provenFrom = 2 * time.Millisecond    // a reset and a refused dial
	provenTo   = 25 * time.Millisecond
)

// hearing knows who could hear whom last. It stands in for members where those are not simulated: each node's view is told of deaths that can
// be proven at once, and of silence after a while; and of what is wrong, when a fault wants it so.
type hearing struct {
	w  *world
	mu sync.Mutex
	at map[[2]*node]time.Time // {who hears, whom}: when last
	// slander are nodes that everybody is to hold dead until then.
	slander map[*node]time.Time
}

func newHearing(w *world) *hearing {
	return &hearing{w: w, at: map[[2]*node]time.Time{}, slander: map[*node]time.Time{}}
}

// run looks until the world ends.
func (h *hearing) run() {
	tick := time.NewTicker(hearEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			h.look()
		case <-h.w.ctx.Done():
			return
		}
	}
}

func (h *hearing) look() {
	now := time.Now()
	nodes := h.w.all()
	for _, to := range nodes {
		l := to.cur.Load()
		if l == nil || l.frozen.Load() {
			continue
		}
		for _, from := range nodes {
			if from == to {
				continue
			}
			l.oracle.hold(from, h.hears(now, from, to))
		}
	}
}

// hears says whether a node's view should show another alive.
func (h *hearing) hears(now time.Time, from, to *node) bool {
	o := from.cur.Load()
	heard := o != nil && !o.frozen.Load() && !h.w.blocked(from, to)
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.Before(h.slander[from]) {
		return false
	}
	if heard {
		h.at[[2]*node{to, from}] = now
		return true
	}
	if o == nil {
		// The process is dead. Whoever reaches its host knows; the others wait.
		return !h.w.reached(to, from) && now.Sub(h.at[[2]*node{to, from}]) < silentFor
	}
	return now.Sub(h.at[[2]*node{to, from}]) < silentFor
}

// reached says whether a dial from one to the other's host is answered, if only with a refusal.
func (w *world) reached(from, to *node) bool { return !w.blocked(from, to) && !w.blocked(to, from) }

// died tells those who can reach the dead node's host.
func (h *hearing) died(dead *node) {
	w := h.w
	for _, n := range w.live() {
		if n == dead || !w.reached(n, dead) {
			continue
		}
		after := w.between(provenFrom, provenTo)
		w.goes.Go(func() {
			select {
			case <-time.After(after):
			case <-w.ctx.Done():
				return
			}
			if l := n.cur.Load(); l != nil && dead.cur.Load() == nil && !l.frozen.Load() {
				l.oracle.hold(dead, false)
			}
		})
	}
}

// oracle is a node's view of the members.
type oracle struct {
	w    *world
	self *node

	mu     sync.Mutex // guards the rest
	states map[peer.ID]*held
	subs   map[int]func(old, new arbiter.Member)
	next   int
}

type held struct {
	m     arbiter.Member
	since time.Time
}

func (h *held) now() arbiter.Member {
	m := h.m
	m.For = time.Since(h.since)
	return m
}

func newOracle(w *world, l *life) *oracle {
	o := &oracle{w: w, self: l.n, states: map[peer.ID]*held{}, subs: map[int]func(old, new arbiter.Member){}}
	o.states[l.n.id] = &held{m: arbiter.Member{ID: l.n.id, Boot: l.boot, Alive: true}, since: time.Now()}
	return o
}

// List implements arbiter.Members.
func (o *oracle) List() []arbiter.Member {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]arbiter.Member, 0, len(o.states))
	for _, h := range o.states {
		out = append(out, h.now())
	}
	return out
}

// Subscribe implements arbiter.Members.
func (o *oracle) Subscribe(f func(old, new arbiter.Member)) func() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.next++
	id := o.next
	o.subs[id] = f
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.subs, id)
	}
}

// hold sets what the view shows of a node.
func (o *oracle) hold(n *node, alive bool) {
	var boot uint64
	if l := n.cur.Load(); l != nil {
		boot = l.boot
	}
	o.mu.Lock()
	h := o.states[n.id]
	if h == nil {
		h = &held{m: arbiter.Member{ID: n.id, Dead: true}, since: time.Now()} // as members have it from their book
		o.states[n.id] = h
	}
	if boot == 0 || !alive {
		boot = h.m.Boot
	}
	if h.m.Alive == alive && h.m.Dead == !alive && h.m.Boot == boot {
		o.mu.Unlock()
		return
	}
	old := h.now()
	if h.m.Alive != alive || h.m.Dead == alive {
		h.since = time.Now()
	}
	h.m.Alive, h.m.Dead, h.m.Boot = alive, !alive, boot
	now := h.now()
	subs := make([]func(old, new arbiter.Member), 0, len(o.subs))
	for _, f := range o.subs {
		subs = append(subs, f)
	}
	o.mu.Unlock()
	for _, f := range subs {
		f(old, now)
	}
}

// drain marks a node as about to leave.
func (o *oracle) drain(n *node) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if h := o.states[n.id]; h != nil {
		h.m.Draining = true
	}
}
