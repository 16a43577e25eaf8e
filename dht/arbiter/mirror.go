package arbiter

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// mirror tells Config.Mirror what was committed, at the leader. Every voter gathers, so that a new leader tells what the old one may
// not have come to.
type mirror struct {
	a     *Arbiter
	pulse pulse

	mu    sync.Mutex // guards recent
	order []mirrored // recent changes, oldest first
}

type mirrored struct {
	reg Register
	at  time.Time
}

const (
	mirrorKeep = 10 * time.Second // what a new leader tells again
	mirrorMost = 1 << 15
)

func newMirror(a *Arbiter) *mirror {
	m := &mirror{a: a}
	if a.cfg.Mirror != nil {
		a.view.watch.add(m.changed)
	}
	return m
}

func (m *mirror) beat() { m.pulse.beat() }

// changed implements a view's watcher.
func (m *mirror) changed(old, now *Register) {
	if old != nil && now != nil && old.Revision == now.Revision && old.Epoch == now.Epoch && old.Incarnation == now.Incarnation {
		return // a checkpoint
	}
	var r Register
	if now != nil {
		r = *now
	} else {
		r = *old
		r.Deleted = true
		r.Index = max(old.Index, m.a.fsm.applied.Load())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if x := m.a.raft.Load(); x == nil || x.State() != raft.Leader {
		m.trim()
	}
	m.order = append(m.order, mirrored{r, time.Now()})
	if len(m.order) > mirrorMost {
		m.order = slices.Clone(m.order[len(m.order)-mirrorMost:])
	}
}

// trim drops what a new leader need not tell any more. The caller holds mu. A leader drops nothing before it told it, but for
// mirrorMost.
func (m *mirror) trim() {
	i := 0
	for i < len(m.order) && time.Since(m.order[i].at) > mirrorKeep {
		m.order[i] = mirrored{}
		i++
	}
	m.order = m.order[i:]
}

// take returns the newest state of each register changed, ordered by (incarnation, index), and drops them; without all it only trims.
func (m *mirror) take(all bool) []Register {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !all {
		m.trim()
		return nil
	}
	newest := map[string]Register{}
	for _, c := range m.order {
		newest[c.reg.Key] = c.reg
	}
	m.order = nil
	out := make([]Register, 0, len(newest))
	for _, r := range newest {
		out = append(out, r)
	}
	slices.SortFunc(out, func(x, y Register) int {
		a, b := point{x.Incarnation, x.Index}, point{y.Incarnation, y.Index}
		switch {
		case a.before(b):
			return -1
		case b.before(a):
			return 1
		case x.Key < y.Key:
			return -1
		}
		return 1
	})
	return out
}

func (m *mirror) run(ctx context.Context, r *raft.Raft) {
	if m.a.cfg.Mirror == nil {
		return
	}
	for {
		next := m.pulse.next()
		leads := r.State() == raft.Leader
		if out := m.take(leads); len(out) > 0 {
			m.a.cfg.Mirror(out)
		}
		if !sleep(ctx, m.a.t.Mirror) {
			return
		}
		select {
		case <-next:
		case <-m.a.where.pulse.next(): // this node may lead now
		case <-ctx.Done():
			return
		}
	}
}
