package arbiter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// incarnation names one life of the group. Its number rises whenever a node goes on without the others' consent: as the last of two, or
// by Recover. The lineage, drawn at random, tells two of the same number apart: recoveries on both sides of a cut. Incarnations are
// ordered by both, and nothing of a lower one is accepted once a higher one was met (I8, consistency.md §3.8). The zero value means that
// there is no raft state.
type incarnation struct{ number, lineage uint64 }

func (i incarnation) none() bool { return i.number == 0 }

func (i incarnation) before(o incarnation) bool {
	return i.number < o.number || i.number == o.number && i.lineage < o.lineage
}

func (i incarnation) String() string {
	if i.lineage == 0 {
		return fmt.Sprint(i.number)
	}
	return fmt.Sprintf("%d/%016x", i.number, i.lineage)
}

func (i incarnation) wire() *wirev1.ArbiterIncarnation {
	if i.none() {
		return nil
	}
	return &wirev1.ArbiterIncarnation{Number: i.number, Lineage: i.lineage, Shard: thisShard}
}

func incarnationOf(w *wirev1.ArbiterIncarnation) incarnation {
	return incarnation{w.GetNumber(), w.GetLineage()}
}

func (m meta) incarnation() incarnation { return incarnation{m.Incarnation, m.Lineage} }

// errSuperseded is wrapped where what this node holds is of a lower incarnation than one that it has met.
var errSuperseded = errors.New("the group goes on in a higher incarnation")

// incarnations returns the incarnation of the raft state on disk and the highest that was ever met.
func (d *disk) incarnations() (group, seen incarnation) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return incarnationOf(d.label.GetGroup()), incarnationOf(d.label.GetSeen())
}

// setIncarnations writes what f makes of them, durable on return, and returns it. seen never falls below group.
func (d *disk) setIncarnations(f func(group, seen incarnation) (incarnation, incarnation)) (group, seen incarnation, err error) {
	d.labels <- struct{}{}
	defer func() { <-d.labels }()
	was, saw := d.incarnations()
	if d.gone.Load() { // calls of other nodes are answered until the last moment
		return was, saw, ErrClosed
	}
	group, seen = f(was, saw)
	if seen.before(group) {
		seen = group
	}
	if group == was && seen == saw {
		return group, seen, nil
	}
	d.mu.RLock()
	l := d.relabelled(group, seen)
	d.mu.RUnlock()
	if planted.Bug("incarnation-forgotten") && group == was {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.label = l
		return group, seen, nil
	}
	if err := d.writeLabel(l); err != nil {
		return was, saw, fmt.Errorf("label the raft database: %w", err)
	}
	return group, seen, nil
}

// relabelled returns the label with other incarnations. The caller holds mu.
func (d *disk) relabelled(group, seen incarnation) *wirev1.ArbiterDisk {
	return &wirev1.ArbiterDisk{
		Format: d.label.GetFormat(), Self: d.label.GetSelf(), Boots: d.label.GetBoots(), Boot: d.label.GetBoot(), Group: group.wire(), Seen: seen.wire(),
		Settled: d.label.GetSettled(),
	}
}

// meet takes notice of an incarnation that another node told of. A higher one than any before is written down first: from then on
// nothing of a lower one is accepted, and what this node holds of one is given up.
func (a *Arbiter) meet(in incarnation) {
	if _, seen := a.disk.incarnations(); !seen.before(in) {
		return
	}
	group, seen, err := a.disk.setIncarnations(func(group, seen incarnation) (incarnation, incarnation) {
		if seen.before(in) {
			seen = in
		}
		return group, seen
	})
	if err != nil {
		a.failures.note("write down incarnation "+in.String(), err)
		return
	}
	level := slog.LevelInfo
	if group.none() {
		level = slog.LevelDebug // the first that it hears of
	}
	a.log.Log(context.Background(), level, "arbiter: met a higher incarnation of the group", "incarnation", seen, "own", group)
	a.where.outrank(seen)
	a.view.outrank(seen)
	a.outranked.beat()
}

// superseded says whether the raft state of this node is of a lower incarnation than one that it has met.
func (a *Arbiter) superseded() bool {
	group, seen := a.disk.incarnations()
	return !group.none() && group.before(seen)
}

// hear takes another node's word about the group. What it knows of another group is not this one's business.
func (a *Arbiter) hear(w *wirev1.ArbiterWhere) {
	if ours(w.GetShard()) != nil {
		return
	}
	a.meet(incarnation{w.GetIncarnation(), w.GetLineage()})
	a.heedFormat(w.GetMeta().GetFormat())
	a.where.hint(w)
}

// greet answers the incarnation that an incoming raft stream announces: it must be the one that this node takes part in. A node without
// raft state joins the incarnation that calls it.
func (a *Arbiter) greet(in incarnation) (answer incarnation, admitted bool) {
	a.meet(in)
	group, seen, err := a.disk.setIncarnations(func(group, seen incarnation) (incarnation, incarnation) {
		if group.none() && in == seen {
			group = in
		}
		return group, seen
	})
	if err != nil {
		a.failures.note("join incarnation "+in.String(), err)
		return seen, false
	}
	return seen, !in.none() && (in == group && in == seen || planted.Bug("incarnation-unfenced"))
}

// speaks returns the incarnation under which this node may open raft streams.
func (a *Arbiter) speaks() (incarnation, error) {
	group, seen := a.disk.incarnations()
	switch {
	case group.none():
		return group, errors.New("this node holds nothing of the group yet")
	case group.before(seen):
		return group, fmt.Errorf("%w: %s, and this node holds %s", errSuperseded, seen, group)
	}
	return group, nil
}

// request stamps a call with the highest incarnation met.
func (a *Arbiter) request(r *wirev1.ArbiterRequest) *wirev1.ArbiterRequest {
	_, seen := a.disk.incarnations()
	r.Incarnation, r.Shard = seen.wire(), thisShard
	return r
}
