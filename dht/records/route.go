package records

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
)

const (
	// routeWithin bounds one lookup: a few dials of dead members among its requests.
	routeWithin = 5 * time.Second
	// routeLanes is how many lookups one call, or the keeper, has under way.
	routeLanes = 8
	// locateMost is how many keys the keeper looks up at a time, locateWithin for how long; the others' turn is the next time.
	locateMost   = 256
	locateWithin = 10 * time.Second
	// foreignRounds is after how many rounds of anti-entropy the holders of a key are looked up again that this node wrote and does not
	// hold: those who hold it see to it themselves.
	foreignRounds = 10
)

var errNoRoute = errors.New("the view is not whole, and no way to look up members is configured")

// closest returns the n members closest to a key: by arithmetic where the view is sure of them, by a lookup among the members where
// it is not.
func (r *Records) closest(ctx context.Context, key string, n int) ([]peer.ID, error) {
	if ids, sure := r.cfg.View.Closest(key, n); sure {
		return ids, nil
	}
	return r.lookup(ctx, key, n)
}

// lookup asks Route, and remembers what it said for a key that is here.
func (r *Records) lookup(ctx context.Context, key string, n int) ([]peer.ID, error) {
	if r.cfg.Route == nil {
		return nil, fmt.Errorf("look up %s: %w", key, errNoRoute)
	}
	ctx, cancel := context.WithTimeout(ctx, routeWithin)
	defer cancel()
	r.stats.lookups.Add(1)
	most := max(n, r.spread())
	ids, hops, err := r.cfg.Route(ctx, key, most)
	if err != nil {
		r.stats.lost.Add(1)
		return nil, fmt.Errorf("look up %s: %w", key, err)
	}
	r.stats.hops.Add(uint64(hops))
	known, _ := r.cfg.View.Closest(key, most)
	for _, id := range known { // a neighbour that the lookup did not meet
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	ids = keys.Sort(keys.Of(key), ids)
	ids = ids[:min(most, len(ids))]
	r.remember(key, ids)
	return ids[:min(n, len(ids))], nil
}

// spread is how many members may come to hold a record: the closest, and those that stand in for them.
func (r *Records) spread() int {
	replicas, _ := r.replication()
	return replicas + successors
}

// recent returns what the last lookup said of a key that is here, if that was within a round of anti-entropy.
func (r *Records) recent(key string, n int) []peer.ID {
	r.local.mu.RLock()
	defer r.local.mu.RUnlock()
	e := r.local.entries[key]
	if e == nil || !e.routed || e.found.IsZero() || time.Since(e.found) > r.cfg.SyncEvery {
		return nil
	}
	return slices.Clone(e.holders[:min(n, len(e.holders))])
}

// remember notes what a lookup said of a key that is here.
func (r *Records) remember(key string, ids []peer.ID) {
	r.local.mu.Lock()
	defer r.local.mu.Unlock()
	e := r.local.entries[key]
	if e == nil || !e.routed {
		return
	}
	e.holders, e.found = ids, time.Now()
}

// forget has the next who needs the holders of a key look them up.
func (r *Records) forget(key string) {
	r.local.mu.Lock()
	defer r.local.mu.Unlock()
	if e := r.local.entries[key]; e != nil && e.routed {
		e.found = time.Time{}
	}
}

// closestOfAll is closest for several keys at once that are to be written, which this node does again and again: what the last lookup said
// of them holds for a while. One result and one error for each.
func (r *Records) closestOfAll(ctx context.Context, list []string, n int) (found [][]peer.ID, errs []error) {
	found, errs = make([][]peer.ID, len(list)), make([]error, len(list))
	lanes := make(chan struct{}, routeLanes)
	var wg sync.WaitGroup
	for i, key := range list {
		ids, sure := r.cfg.View.Closest(key, n)
		if !sure {
			ids = r.recent(key, n)
		}
		if sure || ids != nil {
			found[i] = ids
			continue
		}
		wg.Go(func() {
			lanes <- struct{}{}
			defer func() { <-lanes }()
			found[i], errs[i] = r.lookup(ctx, key, n)
		})
	}
	wg.Wait()
	return found, errs
}

// holdersOf returns the closest members of an entry's key: worked out once for each state of the view where that is sure of them, else as the last
// lookup said, nil where there was none yet. Called under local.mu.
func (r *Records) holdersOf(key string, e *entry, replicas int, gen uint64) []peer.ID {
	if e.gen != gen || e.holders == nil && !e.routed {
		ids, sure := r.cfg.View.Closest(key, replicas)
		e.gen = gen
		switch {
		case sure:
			e.holders, e.routed, e.found = ids, false, time.Time{}
		case !e.routed:
			e.holders, e.routed, e.found, e.tried = nil, true, time.Time{}, time.Time{}
		}
	}
	return e.holders[:min(replicas, len(e.holders))]
}

// overdue is a key whose holders are to be looked up.
type overdue struct {
	key   string
	holds bool // this node is one of them, as far as it knows
	tried time.Time
}

// locate looks up who holds the keys here of which the view is not sure: those that this node holds after half a round of anti-entropy,
// those that it only wrote after some rounds.
func (r *Records) locate(ctx context.Context) {
	replicas, _ := r.replication()
	gen := r.generation.Load()
	now := time.Now()
	var list []overdue
	r.local.each(func(key string, e *entry) {
		holders := r.holdersOf(key, e, replicas, gen)
		if !e.routed {
			return
		}
		holds := slices.Contains(holders, r.cfg.Self)
		patience := foreignRounds * r.cfg.SyncEvery
		if holds || e.version.Writer != r.cfg.Self || e.found.IsZero() {
			patience = r.cfg.SyncEvery / 2
		}
		if now.Sub(e.found) >= patience {
			list = append(list, overdue{key, holds, e.tried})
		}
	})
	if len(list) == 0 {
		return
	}
	slices.SortFunc(list, func(a, b overdue) int {
		if a.holds != b.holds {
			if a.holds {
				return -1
			}
			return 1
		}
		return cmp.Or(a.tried.Compare(b.tried), cmp.Compare(a.key, b.key))
	})
	list = list[:min(len(list), locateMost)]
	ctx, cancel := context.WithTimeout(ctx, locateWithin)
	defer cancel()
	lanes := make(chan struct{}, routeLanes)
	var wg sync.WaitGroup
	for _, o := range list {
		wg.Go(func() {
			lanes <- struct{}{}
			defer func() { <-lanes }()
			if ctx.Err() != nil {
				return
			}
			r.tried(o.key, now)
			if _, err := r.lookup(ctx, o.key, replicas); err != nil {
				r.cfg.Log.Debug("the holders of a record are not known; a later round asks again", "key", o.key, "err", err)
			}
		})
	}
	wg.Wait()
}

func (r *Records) tried(key string, at time.Time) {
	r.local.mu.Lock()
	defer r.local.mu.Unlock()
	if e := r.local.entries[key]; e != nil {
		e.tried = at
	}
}
