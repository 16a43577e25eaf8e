package records

import (
	"context"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// buckets is the number of ranges of the key space that have a sum of their own in a digest.
	buckets = 64
	// differMost bounds the keys that one comparison names.
	differMost = 2048
)

// shared returns what this node holds of the keys that both it and another should hold.
func (r *Records) shared(with peer.ID) []held {
	replicas, _ := r.replication()
	gen := r.generation.Load()
	var list []held
	r.local.each(func(key string, e *entry) {
		holders := r.holdersOf(key, e, replicas, gen)
		if slices.Contains(holders, with) && slices.Contains(holders, r.cfg.Self) {
			list = append(list, held{key: key, version: e.version, sum: e.sum, bucket: e.bucket})
		}
	})
	return list
}

func sums(list []held) []uint64 {
	s := make([]uint64, buckets)
	for _, h := range list {
		s[h.bucket] ^= h.sum
	}
	return s
}

// antiEntropy compares with a few of the members that hold keys this node holds, or, where it holds none, with any.
func (r *Records) antiEntropy(ctx context.Context) {
	ids := r.neighbours()
	r.shuffle(ids)
	for _, id := range ids[:min(syncPeers, len(ids))] {
		if err := r.compare(ctx, id); err != nil {
			r.cfg.Log.Debug("anti-entropy failed; the next round tries another", "with", id, "err", err)
			continue
		}
		r.stats.synced.Add(1)
	}
}

func (r *Records) neighbours() []peer.ID {
	replicas, _ := r.replication()
	gen := r.generation.Load()
	seen := map[peer.ID]struct{}{}
	r.local.each(func(key string, e *entry) {
		holders := r.holdersOf(key, e, replicas, gen)
		if slices.Contains(holders, r.cfg.Self) {
			for _, id := range holders {
				seen[id] = struct{}{}
			}
		}
	})
	if len(seen) == 0 {
		for _, id := range r.cfg.View.Alive() {
			seen[id] = struct{}{}
		}
	}
	delete(seen, r.cfg.Self)
	ids := make([]peer.ID, 0, len(seen))
	for id := range seen {
		ids = append(ids, id)
	}
	slices.Sort(ids) // so that the choice depends on the seed only
	return ids
}

// compare brings this node and another to the same records, of those that both should hold.
func (r *Records) compare(ctx context.Context, with peer.ID) error {
	mine := r.shared(with)
	a, err := r.ask(ctx, with, &wirev1.RecordAsk{Digest: &wirev1.RecordDigest{Sums: sums(mine)}})
	if err != nil || len(a.GetDigest().GetRanges()) == 0 {
		return err
	}
	differ := map[int]bool{}
	for _, b := range a.GetDigest().GetRanges() {
		differ[int(b)] = true
	}
	theirs := map[string]Version{}
	var wanted []string
	for _, o := range a.GetDigest().GetDiffering() {
		v := versionOf(o.GetVersion())
		theirs[o.GetKey()] = v
		if e, ok := r.local.lookup(o.GetKey()); !ok || v.Compare(e.version) > 0 {
			wanted = append(wanted, o.GetKey())
		}
	}
	var push []string
	for _, h := range mine {
		if !differ[h.bucket] {
			continue
		}
		if v, ok := theirs[h.key]; !ok || h.version.Compare(v) > 0 {
			push = append(push, h.key)
		}
	}
	if err := r.fetch(ctx, with, wanted); err != nil {
		return err
	}
	return r.send(ctx, with, push)
}

// fetch gets records from a member and keeps them.
func (r *Records) fetch(ctx context.Context, from peer.ID, wanted []string) error {
	for part := range slices.Chunk(wanted, 128) {
		a, err := r.ask(ctx, from, &wirev1.RecordAsk{Get: part})
		if err != nil {
			return err
		}
		items := slices.DeleteFunc(a.GetGet(), func(i *wirev1.RecordItem) bool { return len(i.GetEnvelope()) == 0 })
		in, _, _ := r.accept(items)
		if _, err := r.keep(ctx, in); err != nil {
			return err
		}
	}
	return nil
}

// serveDigest names what is held here in the ranges whose sums differ.
func (r *Records) serveDigest(from peer.ID, d *wirev1.RecordDigest) *wirev1.RecordDigestAnswer {
	a := &wirev1.RecordDigestAnswer{}
	if len(d.GetSums()) != buckets {
		return a // another version's ranges: nothing can be said
	}
	list := r.shared(from)
	differ := map[int]bool{}
	for b, sum := range sums(list) {
		if sum != d.GetSums()[b] {
			differ[b] = true
			a.Ranges = append(a.Ranges, uint32(b))
		}
	}
	for i := range list {
		if differ[list[i].bucket] && len(a.Differing) < differMost {
			a.Differing = append(a.Differing, list[i].offer())
		}
	}
	return a
}
