package sim

import (
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/records"
)

// look asserts I3, I6 and I9 again and again.
func (w *whole) look() {
	type seen struct{ inc, epoch uint64 }
	last := map[*life]map[string]seen{}
	for round := 0; ; round++ {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-w.ctx.Done():
			return
		}
		w.lapses()
		if w.guarantee == components.ExactlyOne {
			w.alone()
		}
		if w.keeps() {
			w.ownNode()
		}
		if round%40 != 0 {
			continue
		}
		w.holders()
		for _, n := range w.live() {
			p := n.part()
			if p == nil || p.l.frozen.Load() {
				continue
			}
			before := last[p.l]
			last[p.l] = map[string]seen{} // what it handed over it may be given again by one who has been away
			for _, rec := range p.records.Local(ownPrefix) {
				was, now := before[rec.Key], seen{rec.Incarnation, rec.Epoch}
				last[p.l][rec.Key] = now
				if now.inc < was.inc || now.inc == was.inc && now.epoch < was.epoch {
					w.failf("I9: the mirror of %s at %s went back from %d/%d to %d/%d", rec.Key, n.name, was.inc, was.epoch, now.inc, now.epoch)
				}
				w.mirrorIsCommitted(n, rec)
			}
		}
	}
}

// lapses ends the processes of nodes that stand still: their lease is not granted.
func (w *whole) lapses() {
	w.hist.Lock()
	defer w.hist.Unlock()
	for _, n := range w.live() {
		p := n.part()
		if p == nil {
			continue
		}
		if !p.l.frozen.Load() {
			delete(w.frozen, p.l)
			continue
		}
		since, known := w.frozen[p.l]
		if !known {
			w.frozen[p.l] = time.Now()
		} else if time.Since(since) >= lapse {
			p.procs.killAll()
		}
	}
}

// mayServe says whether this life would serve an instance now: it has a process for it, and its lease. A node that stands still serves nothing.
func (p *part) mayServe(name string) bool {
	p.mu.Lock()
	serving := p.serving[name]
	p.mu.Unlock()
	if serving == nil || p.l.frozen.Load() || len(p.procs.begun(name)) == 0 {
		return false
	}
	if grantedLeases {
		return true
	}
	info, here := p.sup.Info(name)
	return here && (info.State == components.Running || info.State == components.Degraded) && serving()
}

// alone asserts that an instance that must be one is not served by two (I3).
func (w *whole) alone() {
	w.hist.Lock()
	defer w.hist.Unlock()
	for _, name := range w.instances {
		var at []string
		for _, n := range w.live() {
			if p := n.part(); p != nil && p.mayServe(name) {
				at = append(at, n.name)
			}
		}
		if len(at) < 2 {
			delete(w.beside, name)
			continue
		}
		since, known := w.beside[name]
		if !known {
			since, w.beside[name] = time.Now(), time.Now()
		}
		if grantedLeases || time.Since(since) > leadersDoubt {
			w.failf("I3: %s may be served by %s at the same time", name, strings.Join(at, " and "))
		}
	}
}

// holders asserts that who is named as a holder of a committed checkpoint has every node of it (I6).
func (w *whole) holders() {
	for _, name := range w.instances {
		reg, ok := w.register(name)
		if !ok || len(reg.Root) != len(blobs.Hash{}) {
			continue
		}
		for _, id := range reg.Holders {
			n := w.of(id)
			if n == nil || n.isLost() {
				continue
			}
			p := n.part()
			if p == nil || p.l.frozen.Load() {
				continue
			}
			if missing, err := lacks(p.blobs, blobs.Hash(reg.Root)); err == nil && missing > 0 && n.part() == p {
				own, _ := p.l.arb.Get(reg.Key)
				w.failf("I6: %s is named as a holder of checkpoint %d of %s and lacks %d nodes of it (%x; in its own view checkpoint %d, %.4x, told %s ago)",
					n.name, reg.Seq, name, missing, reg.Root[:4], own.Seq, own.Root, p.l.arb.Status().FeedAge)
			}
		}
	}
}

// lacks counts what a store lacks below a root, by walking all of it.
func lacks(s *blobs.Store, root blobs.Hash) (missing int, err error) {
	seen := map[blobs.Hash]bool{}
	for todo := []blobs.Hash{root}; len(todo) > 0; {
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[h] {
			continue
		}
		seen[h] = true
		node, err := s.Get(h)
		if _, lost := errors.AsType[*blobs.MissingError](err); lost {
			missing++
			continue
		}
		if err != nil {
			return 0, err
		}
		for _, l := range node.Links {
			todo = append(todo, l.Hash)
		}
	}
	return missing, nil
}

// mirrorIsCommitted asserts that a mirror says what was committed (I9).
func (w *whole) mirrorIsCommitted(n *node, rec records.Record) {
	var m mirrored
	if err := json.Unmarshal(rec.Value, &m); err != nil {
		w.failf("I9: the mirror %s at %s cannot be read: %v", rec.Key, n.name, err)
		return
	}
	key := components.InstanceRegister(strings.TrimPrefix(rec.Key, ownPrefix))
	if owner, known := w.eyes.ownerAt(rec.Incarnation, key, m.Epoch); !known || owner.String() != m.Owner {
		w.failf("I9: the mirror %s at %s says that %s owns epoch %d; committed is %s", rec.Key, n.name, m.Owner, m.Epoch, w.named(owner))
	}
}
