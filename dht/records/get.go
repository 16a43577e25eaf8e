package records

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// heard is what one member said of a key.
type heard struct {
	from peer.ID
	rec  *Record
	item *wirev1.RecordItem
	err  error
}

// Get asks the r members closest to the key at once and returns the newest record that a majority of them knows, as soon as that many
// have answered, with how many of those had just that one. Where none of the closest has it, the next ones are asked, which take
// records in when the closest fail. Holders that lack it or have an older one get it in the background. The error is ErrNotFound
// (with the tombstone as the record, where it was deleted), or says why nobody answered.
func (r *Records) Get(ctx context.Context, key string) (rec Record, agree int, err error) {
	if err := checkKey(key); err != nil {
		return Record{}, 0, err
	}
	replicas, _ := r.replication()
	targets, err := r.closest(ctx, key, replicas+successors)
	if err != nil {
		return Record{}, 0, fmt.Errorf("get: %w", err)
	}
	first := targets[:min(replicas, len(targets))]
	said, err := r.gather(ctx, key, first, len(first)/2+1)
	if err == nil && newest(said) == nil && len(targets) > len(first) {
		var more []heard
		if more, err = r.gather(ctx, key, targets[len(first):], len(targets)-len(first)); err == nil {
			said = append(said, more...)
		}
	}
	if err != nil {
		return Record{}, 0, fmt.Errorf("get %s: %w", key, err)
	}
	best := newest(said)
	if best == nil {
		if err := silence(said); err != nil {
			return Record{}, 0, fmt.Errorf("get %s: nobody answered: %w", key, err)
		}
		return Record{}, 0, fmt.Errorf("get %s: %w", key, ErrNotFound)
	}
	rec = *best
	for _, h := range said {
		if h.rec != nil && h.rec.Version() == rec.Version() {
			agree++
			rec.Age = max(rec.Age, h.rec.Age)
		}
	}
	if rec.Deleted {
		return rec, agree, fmt.Errorf("get %s: %w", key, ErrNotFound)
	}
	return rec, agree, nil
}

func newest(said []heard) *Record {
	var best *Record
	for _, h := range said {
		if h.rec != nil && (best == nil || h.rec.Version().Compare(best.Version()) > 0) {
			best = h.rec
		}
	}
	return best
}

// silence returns why nobody answered; nil where somebody did.
func silence(said []heard) error {
	var errs []error
	for _, h := range said {
		if h.err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", h.from, h.err))
	}
	if len(errs) == 0 {
		return errors.New("this node sees no members")
	}
	return errors.Join(errs...)
}

// gather asks members for a key and returns when enough have answered and one of them has it, or all have spoken. All answers, late
// ones too, then lead to read repair.
func (r *Records) gather(ctx context.Context, key string, from []peer.ID, enough int) ([]heard, error) {
	answers := make(chan heard, len(from))
	attempt := context.WithoutCancel(ctx)
	started := 0
	for _, id := range from {
		if r.start(func() { answers <- r.getFrom(attempt, id, key) }) {
			started++
		}
	}
	var said []heard
	answered := 0
	for len(said) < started {
		select {
		case h := <-answers:
			said = append(said, h)
			if h.err == nil {
				answered++
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if answered >= enough && newest(said) != nil {
			break
		}
	}
	known := slices.Clone(said)
	r.start(func() {
		for len(known) < started {
			known = append(known, <-answers)
		}
		r.readRepair(attempt, known)
	})
	return said, nil
}

// getFrom asks one member for one key. A record that is not valid is as good as none.
func (r *Records) getFrom(ctx context.Context, id peer.ID, key string) heard {
	a, err := r.ask(ctx, id, &wirev1.RecordAsk{Get: []string{key}})
	if err != nil {
		return heard{from: id, err: err}
	}
	if len(a.GetGet()) != 1 {
		return heard{from: id, err: fmt.Errorf("%d answers to one key", len(a.GetGet()))}
	}
	item := a.GetGet()[0]
	if len(item.GetEnvelope()) == 0 {
		return heard{from: id}
	}
	in, _, why := r.accept([]*wirev1.RecordItem{item})
	if len(in) == 0 || in[0].Key != key {
		return heard{from: id, err: errors.Join(why...)}
	}
	return heard{from: id, rec: in[0].Record, item: item}
}

// readRepair brings the newest record to those who answered without it.
func (r *Records) readRepair(ctx context.Context, said []heard) {
	best := newest(said)
	if best == nil {
		return
	}
	var item *wirev1.RecordItem
	for _, h := range said {
		if h.rec == best {
			item = h.item
		}
	}
	for _, h := range said {
		if h.err != nil || (h.rec != nil && h.rec.Version() == best.Version()) {
			continue
		}
		if _, err := r.ask(ctx, h.from, &wirev1.RecordAsk{Put: []*wirev1.RecordItem{item}}); err != nil {
			r.cfg.Log.Debug("read repair failed", "key", best.Key, "to", h.from, "err", err)
			continue
		}
		r.stats.repaired.Add(1)
	}
}

const (
	// scanLanes is how many members a scan asks at once.
	scanLanes = 16
	// scanCopies of each record are asked for while the view has been quiet for scanQuiet: then the closest holders have it, and the other
	// copies would be more than half of what a scan moves. A round of anti-entropy lies within.
	scanCopies = 2
	scanQuiet  = time.Minute
)

// Scan asks all alive members what they hold under a prefix and returns the newest record of each key, deletions left out, in order of
// key, with how many members were asked and how many answered: with fewer answers than were asked, keys whose holders were all silent
// are missing. While the view is quiet only the closest holders of each key tell it.
func (r *Records) Scan(ctx context.Context, prefix string) (recs []Record, asked, answered int) {
	if time.Since(time.Unix(0, r.changedAt.Load())) >= scanQuiet {
		recs, asked, answered = r.scan(ctx, prefix, scanCopies)
	}
	if asked == 0 || answered < asked {
		recs, asked, answered = r.ScanAll(ctx, prefix)
	}
	return slices.DeleteFunc(recs, func(rec Record) bool { return rec.Deleted }), asked, answered
}

// ScanAll is Scan of every copy that anybody has, with the deletions that are still remembered.
func (r *Records) ScanAll(ctx context.Context, prefix string) (recs []Record, asked, answered int) {
	return r.scan(ctx, prefix, 0)
}

func (r *Records) scan(ctx context.Context, prefix string, near uint32) (recs []Record, asked, answered int) {
	ids := r.cfg.Everyone()
	var mu sync.Mutex
	found := map[string]*Record{}
	lanes := make(chan struct{}, scanLanes)
	var wg sync.WaitGroup
	for _, id := range ids {
		wg.Go(func() {
			lanes <- struct{}{}
			defer func() { <-lanes }()
			list, err := r.scanOne(ctx, id, prefix, near)
			mu.Lock()
			defer mu.Unlock()
			for _, rec := range list {
				merge(found, rec)
			}
			if err == nil {
				answered++
			}
		})
	}
	wg.Wait()
	for _, rec := range found {
		recs = append(recs, *rec)
	}
	slices.SortFunc(recs, func(a, b Record) int {
		if a.Key < b.Key {
			return -1
		}
		return 1
	})
	return recs, len(ids), answered
}

func merge(found map[string]*Record, rec *Record) {
	best := found[rec.Key]
	switch {
	case best == nil || rec.Version().Compare(best.Version()) > 0:
		found[rec.Key] = rec
	case rec.Version() == best.Version():
		best.Age = max(best.Age, rec.Age)
	}
}

func (r *Records) scanOne(ctx context.Context, id peer.ID, prefix string, near uint32) ([]*Record, error) {
	var list []*Record
	after := ""
	for {
		a, err := r.ask(ctx, id, &wirev1.RecordAsk{Scan: &wirev1.RecordScan{Prefix: prefix, After: after, Near: near}})
		if err != nil {
			return list, err
		}
		in, _, _ := r.accept(a.GetScan().GetItems())
		for _, rec := range in {
			list = append(list, rec.Record)
			after = max(after, rec.Key)
		}
		if !a.GetScan().GetMore() {
			return list, nil
		}
		if len(in) == 0 {
			return list, errors.New("the member says that there is more and sends nothing")
		}
	}
}
