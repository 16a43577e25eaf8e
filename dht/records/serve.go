package records

import (
	"context"
	"fmt"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// maxItems bounds each list in a question.
	maxItems = 4096
	// scanBytes is how much of a scan one answer carries.
	scanBytes = 1 << 20
)

// serve answers a question of a member, or of this node itself.
func (r *Records) serve(ctx context.Context, from peer.ID, ask *wirev1.RecordAsk) (*wirev1.RecordAnswer, error) {
	if len(ask.GetPut()) > maxItems || len(ask.GetGet()) > maxItems || len(ask.GetOffer()) > maxItems {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "more than %d records in one question", maxItems)
	}
	a := &wirev1.RecordAnswer{}
	var err error
	if len(ask.GetPut()) > 0 {
		if a.Put, err = r.servePut(ctx, ask.GetPut()); err != nil {
			return nil, err
		}
	}
	if len(ask.GetGet()) > 0 {
		if a.Get, err = r.serveGet(ctx, ask.GetGet()); err != nil {
			return nil, err
		}
	}
	for _, o := range ask.GetOffer() {
		e, ok := r.local.get(o.GetKey())
		a.Wanted = append(a.Wanted, !ok || versionOf(o.GetVersion()).Compare(e.version) > 0)
	}
	if ask.GetScan() != nil {
		if a.Scan, err = r.serveScan(ctx, ask.GetScan()); err != nil {
			return nil, err
		}
	}
	if ask.GetDigest() != nil {
		a.Digest = r.serveDigest(from, ask.GetDigest())
	}
	return a, nil
}

// keep stores valid records and tells subscribers of the new ones.
func (r *Records) keep(ctx context.Context, in []incoming) ([]verdict, error) {
	low := r.cfg.Low()
	verdicts, err := r.local.keep(ctx, in, func(_ string, have int) bool { return !low && have < r.cfg.MaxKeys })
	if err != nil {
		return nil, err
	}
	for i, v := range verdicts {
		switch v {
		case stored:
			r.place(in[i].Key)
			r.subs.tell(*in[i].Record)
		case older:
			r.stats.older.Add(1)
		case noRoom:
			r.stats.full.Add(1)
		}
	}
	return verdicts, nil
}

// accept verifies items from the wire. The result holds the valid ones, and for each item where it is among them, or why it is not.
func (r *Records) accept(items []*wirev1.RecordItem) (in []incoming, at []int, why []error) {
	at, why = make([]int, len(items)), make([]error, len(items))
	for i, item := range items {
		at[i] = -1
		rec, err := r.validator.open(item.GetEnvelope())
		if err != nil {
			r.stats.invalid.Add(1)
			why[i] = err
			continue
		}
		rec.Age = ageIn(item.GetAgeMs())
		at[i] = len(in)
		in = append(in, incoming{Record: rec, envelope: item.GetEnvelope()})
	}
	return in, at, why
}

func (r *Records) servePut(ctx context.Context, items []*wirev1.RecordItem) ([]*wirev1.RecordPutAnswer, error) {
	in, at, why := r.accept(items)
	verdicts, err := r.keep(ctx, in)
	if err != nil {
		return nil, err
	}
	answers := make([]*wirev1.RecordPutAnswer, len(items))
	for i := range items {
		if at[i] < 0 {
			answers[i] = &wirev1.RecordPutAnswer{Result: wirev1.RecordPutAnswer_INVALID, Message: why[i].Error()}
			continue
		}
		a := &wirev1.RecordPutAnswer{}
		switch verdicts[at[i]] {
		case stored:
			a.Result = wirev1.RecordPutAnswer_STORED
		case same:
			a.Result = wirev1.RecordPutAnswer_SAME
		case noRoom:
			a.Result = wirev1.RecordPutAnswer_FULL
		case older:
			a.Result = wirev1.RecordPutAnswer_OLDER
			if e, ok := r.local.get(in[at[i]].Key); ok {
				a.Newer = e.version.wire()
			}
		}
		answers[i] = a
	}
	return answers, nil
}

func (r *Records) serveGet(ctx context.Context, wanted []string) ([]*wirev1.RecordItem, error) {
	items := make([]*wirev1.RecordItem, len(wanted))
	size := 0
	for i, key := range wanted {
		items[i] = &wirev1.RecordItem{}
		envelope, age, ok, err := r.local.read(ctx, key)
		if err != nil {
			r.stats.missed.Add(1)
			return nil, err
		}
		if size += len(envelope); ok && size < peers.MaxMessage/2 {
			items[i].Envelope, items[i].AgeMs = envelope, ageOut(age)
		}
	}
	return items, nil
}

func (r *Records) serveScan(ctx context.Context, scan *wirev1.RecordScan) (*wirev1.RecordScanAnswer, error) {
	a := &wirev1.RecordScanAnswer{}
	size, after := 0, scan.GetAfter()
	for {
		found, more := r.local.keysUnder(scan.GetPrefix(), after, maxItems)
		for _, key := range found {
			after = key
			if scan.GetNear() > 0 && !r.near(key, int(scan.GetNear())) {
				continue
			}
			envelope, age, ok, err := r.local.read(ctx, key)
			if err != nil {
				r.stats.missed.Add(1)
				return nil, err
			}
			if !ok {
				continue
			}
			if size += len(envelope); size > scanBytes && len(a.Items) > 0 {
				a.More = true
				return a, nil
			}
			a.Items = append(a.Items, &wirev1.RecordItem{Envelope: envelope, AgeMs: ageOut(age)})
		}
		if a.More = more; !more || len(a.Items) > 0 {
			return a, nil
		}
	}
}

// near reports whether this node is among the n closest holders of a key that it holds.
func (r *Records) near(key string, n int) bool {
	replicas, _ := r.replication()
	gen := r.generation.Load()
	r.local.mu.Lock()
	defer r.local.mu.Unlock()
	e := r.local.entries[key]
	if e == nil {
		return false
	}
	holders := r.holdersOf(key, e, replicas, gen)
	if len(holders) == 0 {
		return true // nothing is known of its holders: better told twice than not at all
	}
	return slices.Contains(holders[:min(n, len(holders))], r.cfg.Self)
}

// Local returns the records that this node holds under a prefix, deletions left out, in order of key.
func (r *Records) Local(prefix string) []Record {
	found, _ := r.local.keysUnder(prefix, "", 0)
	list := make([]Record, 0, len(found))
	for _, key := range found {
		if e, ok := r.local.get(key); !ok || e.deleted {
			continue
		}
		rec, ok, err := r.local.record(context.Background(), key)
		if err != nil {
			r.stats.missed.Add(1)
			r.cfg.Log.Error("records: cannot read a record", "key", key, "err", err)
			continue
		}
		if ok {
			list = append(list, rec)
		}
	}
	return list
}

// Holders returns the members that should hold a key now, closest first. It looks them up where the view is not sure.
func (r *Records) Holders(ctx context.Context, key string) ([]peer.ID, error) {
	replicas, _ := r.replication()
	return r.closest(ctx, key, replicas)
}

// TooFewError says that a Put was acknowledged by fewer members than it wants. It may have reached some, and repair may spread it yet.
type TooFewError struct {
	Key         string
	Acked, Want int
	// Why the members that did not acknowledge did not; in no order.
	Why []error
}

func (e *TooFewError) Error() string {
	msg := fmt.Sprintf("record %s: %d of %d acknowledgements", e.Key, e.Acked, e.Want)
	for _, why := range e.Why {
		msg += "; " + why.Error()
	}
	return msg
}

func (e *TooFewError) Unwrap() []error { return e.Why }

// OlderError says that a Put with a version of its own met a higher one. Nothing of it remains.
type OlderError struct {
	Key         string
	Put, Newest Version
}

func (e *OlderError) Error() string {
	return fmt.Sprintf("record %s: version %s is lower than %s, which is there already", e.Key, e.Put, e.Newest)
}
