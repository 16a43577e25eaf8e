package records

import (
	"context"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	expireEvery = 10 * time.Second
	// settleFor is how long the view must have been quiet before a repair, settleMost the longest wait for that.
	settleFor  = 150 * time.Millisecond
	settleMost = time.Second
	// syncPeers is how many members a round of anti-entropy compares with.
	syncPeers = 2
	// strayRounds is in how many rounds in a row this node must not be among the closest before it hands a record over.
	strayRounds = 2
	strayMost   = 512
)

// keeper expires, repairs and compares until ctx ends.
func (r *Records) keeper(ctx context.Context) {
	expire := time.NewTicker(expireEvery)
	defer expire.Stop()
	compare := time.NewTicker(r.cfg.SyncEvery)
	defer compare.Stop()
	r.locate(ctx)
	r.repair(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.changed:
			r.settle(ctx)
			r.locate(ctx)
			r.repair(ctx)
		case <-expire.C:
			r.expire(ctx)
		case <-compare.C:
			r.locate(ctx)
			r.repair(ctx)
			r.antiEntropy(ctx)
			r.handOver(ctx)
		}
	}
}

// settle waits until no change of the view has come for a while.
func (r *Records) settle(ctx context.Context) {
	most := time.After(settleMost)
	for {
		select {
		case <-ctx.Done():
			return
		case <-most:
			return
		case <-r.changed:
		case <-time.After(settleFor):
			return
		}
	}
}

// expire removes what has run out, tombstones included.
func (r *Records) expire(ctx context.Context) {
	now := time.Now()
	gone := map[string]Version{}
	r.local.mu.RLock()
	for k, e := range r.local.entries {
		if e.expired(now) {
			gone[k] = e.version
		}
	}
	r.local.mu.RUnlock()
	if len(gone) == 0 {
		return
	}
	if err := r.local.remove(ctx, gone); err != nil {
		r.cfg.Log.Error("records: cannot remove what has expired", "err", err)
		return
	}
	r.stats.expired.Add(uint64(len(gone)))
}

// held is a key here with its version.
type held struct {
	key     string
	version Version
	sum     uint64
	bucket  int
}

func (h *held) offer() *wirev1.RecordOffer {
	return &wirev1.RecordOffer{Key: h.key, Version: h.version.wire()}
}

// place notes that a record that has just come is where it belongs as far as is known: its writer sends it there. Repair then looks
// for what changes.
func (r *Records) place(key string) {
	replicas, _ := r.replication()
	gen := r.generation.Load()
	r.local.mu.Lock()
	defer r.local.mu.Unlock()
	if e := r.local.entries[key]; e != nil && e.placed == nil {
		e.placed = r.holdersOf(key, e, replicas, gen)
	}
}

// repair offers each record here to members that have become holders of its key. Of the former holders that still are, the closest
// does it; where none is left, everyone who has it.
func (r *Records) repair(ctx context.Context) {
	replicas, _ := r.replication()
	gen := r.generation.Load()
	offers := map[peer.ID][]held{}
	r.local.each(func(key string, e *entry) {
		before, now := e.placed, r.holdersOf(key, e, replicas, gen)
		if len(now) == 0 {
			return // not known yet
		}
		e.placed = now
		first := r.cfg.Self
		for _, id := range now {
			if slices.Contains(before, id) {
				first = id
				break
			}
		}
		if first != r.cfg.Self {
			return
		}
		for _, id := range now {
			if id != r.cfg.Self && !slices.Contains(before, id) {
				offers[id] = append(offers[id], held{key: key, version: e.version})
			}
		}
	})
	for id, list := range offers {
		if ctx.Err() != nil {
			return
		}
		if _, err := r.offer(ctx, id, list); err != nil {
			r.cfg.Log.Debug("repair failed; the next round tries again", "to", id, "records", len(list), "err", err)
			r.displace(id, list)
		}
	}
}

// displace makes the next repair offer records to a member again.
func (r *Records) displace(id peer.ID, list []held) {
	r.local.mu.Lock()
	defer r.local.mu.Unlock()
	for _, h := range list {
		if e := r.local.entries[h.key]; e != nil {
			e.placed = slices.DeleteFunc(slices.Clone(e.placed), func(p peer.ID) bool { return p == id })
		}
	}
}

// offer brings a member what it lacks of a list, and returns which of it the member has now.
func (r *Records) offer(ctx context.Context, to peer.ID, list []held) (has []bool, err error) {
	for part := range slices.Chunk(list, 512) {
		ask := &wirev1.RecordAsk{}
		for i := range part {
			ask.Offer = append(ask.Offer, part[i].offer())
		}
		a, err := r.ask(ctx, to, ask)
		if err != nil {
			return nil, err
		}
		var wanted []string
		for i, h := range part {
			want := i < len(a.GetWanted()) && a.GetWanted()[i]
			if want {
				wanted = append(wanted, h.key)
			}
			has = append(has, !want)
		}
		if err := r.send(ctx, to, wanted); err != nil {
			return nil, err
		}
	}
	return has, nil
}

// send puts records from here to a member, with their age.
func (r *Records) send(ctx context.Context, to peer.ID, wanted []string) error {
	ask, size := &wirev1.RecordAsk{}, 0
	flush := func() error {
		if len(ask.Put) == 0 {
			return nil
		}
		_, err := r.ask(ctx, to, ask)
		if err == nil {
			r.stats.repaired.Add(uint64(len(ask.Put)))
		}
		ask, size = &wirev1.RecordAsk{}, 0
		return err
	}
	for _, key := range wanted {
		envelope, age, ok, err := r.local.read(ctx, key)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		ask.Put = append(ask.Put, &wirev1.RecordItem{Envelope: envelope, AgeMs: ageOut(age)})
		if size += len(envelope); size >= 256<<10 {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// handOver offers records for which this node is not among the closest any more to those who are, and drops what all of them have. Its
// own keys stay.
func (r *Records) handOver(ctx context.Context) {
	replicas, _ := r.replication()
	gen := r.generation.Load()
	strays := map[string]held{}
	to := map[peer.ID][]held{}
	r.local.each(func(key string, e *entry) {
		holders := r.holdersOf(key, e, replicas, gen)
		if e.version.Writer == r.cfg.Self || len(holders) == 0 || slices.Contains(holders, r.cfg.Self) {
			e.strayed = 0
			return
		}
		if e.strayed++; e.strayed <= strayRounds || len(strays) >= strayMost {
			return
		}
		h := held{key: key, version: e.version}
		strays[key] = h
		for _, id := range holders {
			to[id] = append(to[id], h)
		}
	})
	for id, list := range to {
		has, err := r.offer(ctx, id, list)
		for i, h := range list {
			if err != nil || !has[i] {
				delete(strays, h.key) // the next round finds out
			}
		}
	}
	if len(strays) == 0 || ctx.Err() != nil {
		return
	}
	gone := map[string]Version{}
	for key, h := range strays {
		gone[key] = h.version
	}
	if err := r.local.remove(ctx, gone); err != nil {
		r.cfg.Log.Error("records: cannot drop what was handed over", "err", err)
		return
	}
	r.stats.dropped.Add(uint64(len(gone)))
}
