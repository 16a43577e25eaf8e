package records

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// successors is how many members beyond the closest may stand in for those that fail.
const successors = 3

// Entry is one record to put.
type Entry struct {
	Key     string
	Value   []byte
	TTL     time.Duration // 0: it never expires
	Deleted bool          // a tombstone; Value and TTL are then set by PutMany
	// Incarnation, Epoch and Revision order a mirror. With Revision 0 the version is the one after the newest that this node knows
	// of; that is for keys that this node alone writes.
	Incarnation, Epoch, Revision uint64
}

// Result is what came of one entry.
type Result struct {
	// Acked members have it, on disk where it never expires; Of is how many should.
	Acked, Of int
	// Err is nil where at least W acknowledged: else *TooFewError, *OlderError, or an error that wraps ErrInvalid.
	Err error
}

// Put writes a record that only this node writes, under the next revision, to the r members closest to the key (this node counts where
// it is one of them) and returns as soon as W have acknowledged it. The rest goes on in the background. A record with a ttl holds for
// that long and must be put again in time; what is not certain after an error is whether some have it.
func (r *Records) Put(ctx context.Context, key string, value []byte, ttl time.Duration) (acked, of int, err error) {
	res := r.PutMany(ctx, []Entry{{Key: key, Value: value, TTL: ttl}})[0]
	return res.Acked, res.Of, res.Err
}

// Delete replaces the record by a tombstone, which is kept for Config.TombstoneFor. Only who may write the key may delete it.
func (r *Records) Delete(ctx context.Context, key string) error {
	return r.PutMany(ctx, []Entry{{Key: key, Deleted: true}})[0].Err
}

// PutMany puts several records with one message to each member concerned. It returns when each has its W acknowledgements or cannot
// get them; one result for each entry, in order.
func (r *Records) PutMany(ctx context.Context, entries []Entry) []Result {
	p := &putting{r: r, answers: make(chan putAnswer), over: make(chan struct{})}
	defer close(p.over)
	p.replicas, p.want = r.replication()
	p.prepare(ctx, entries)
	p.run(ctx)
	results := p.results()
	again := p.outdated()
	if len(again) > 0 && ctx.Err() == nil {
		for i, res := range r.PutMany(ctx, p.pick(again)) {
			results[again[i]] = res
		}
	}
	return results
}

// putting is one PutMany. It is used by one goroutine; attempts answer through the channel.
type putting struct {
	r              *Records
	replicas, want int
	items          []*putItem
	answers        chan putAnswer
	over           chan struct{} // closed when the call returns: answers then go nowhere
}

type putItem struct {
	entry    Entry
	auto     bool // the version was chosen here
	rec      Record
	envelope []byte
	targets  []peer.ID
	next     int // first of targets not asked yet
	pending  int
	acked    int
	newest   Version
	why      []error
	err      error
}

func (it *putItem) done(want int) bool { return it.err != nil || it.acked >= want || it.pending == 0 }

type putAnswer struct {
	from    peer.ID
	which   []int
	answers []*wirev1.RecordPutAnswer
	err     error
}

// prepare chooses versions, signs, and keeps a copy of each record here, whether or not this node is among the closest: the writer is
// who can always bring it again.
func (p *putting) prepare(ctx context.Context, entries []Entry) {
	for _, e := range entries {
		it := &putItem{entry: e, auto: e.Revision == 0}
		p.items = append(p.items, it)
		if e.Deleted {
			e.Value, e.TTL = nil, p.r.cfg.TombstoneFor
		}
		it.rec = Record{
			Key: e.Key, Value: e.Value, TTL: e.TTL, Deleted: e.Deleted, Writer: p.r.cfg.Self,
			Incarnation: e.Incarnation, Epoch: e.Epoch, Revision: e.Revision,
		}
		it.err = p.check(&it.rec)
	}
	for todo := p.items; len(todo) > 0; {
		todo = p.own(ctx, todo)
	}
	p.aim(ctx)
}

// aim finds whom to ask.
func (p *putting) aim(ctx context.Context) {
	var list []string
	var items []*putItem
	for _, it := range p.items {
		if it.err == nil {
			list, items = append(list, it.entry.Key), append(items, it)
		}
	}
	found, errs := p.r.closestOfAll(ctx, list, p.replicas+successors)
	for i, it := range items {
		if it.targets, it.err = found[i], errs[i]; it.err == nil {
			p.r.place(it.entry.Key)
		}
	}
}

func (p *putting) check(rec *Record) error {
	if err := checkKey(rec.Key); err != nil {
		return err
	}
	if owner, ok := ownerOf(rec.Key); ok && owner != rec.Writer.String() {
		return fmt.Errorf("%w: %s may be written by that node only", ErrInvalid, rec.Key)
	}
	if rec.TTL < 0 || rec.TTL > maxTTL || (rec.TTL > 0 && rec.TTL < time.Millisecond) {
		return fmt.Errorf("%w: a time to live of %v", ErrInvalid, rec.TTL)
	}
	return nil
}

// own signs and keeps items in one batch and returns those whose revision was taken by another Put here meanwhile.
func (p *putting) own(ctx context.Context, items []*putItem) (again []*putItem) {
	var signed []*putItem
	var in []incoming
	for _, it := range items {
		if it.err != nil {
			continue
		}
		if it.auto {
			p.r.nextVersion(&it.rec)
		}
		if it.envelope, it.err = seal(&it.rec, p.r.cfg.Key); it.err == nil {
			rec := it.rec
			signed, in = append(signed, it), append(in, incoming{Record: &rec, envelope: it.envelope})
		}
	}
	verdicts, err := p.r.keep(ctx, in)
	for i, it := range signed {
		switch {
		case err != nil:
			it.err = err
		case verdicts[i] == stored || verdicts[i] == noRoom: // without room here, others may have it
		case it.auto:
			again = append(again, it)
		case verdicts[i] == older:
			e, _ := p.r.local.lookup(it.entry.Key)
			it.err = &OlderError{Key: it.entry.Key, Put: it.rec.Version(), Newest: e.version}
		}
	}
	return again
}

// nextVersion sets the version after the newest that this node knows of.
func (r *Records) nextVersion(rec *Record) {
	rec.Incarnation, rec.Epoch, rec.Revision = r.cfg.Incarnation(), 0, 1
	if e, ok := r.local.lookup(rec.Key); ok && e.version.Incarnation >= rec.Incarnation {
		rec.Incarnation, rec.Epoch, rec.Revision = e.version.Incarnation, e.version.Epoch, e.version.Revision+1
	}
}

// run asks the closest, and for each that fails the next one, until every item is done.
func (p *putting) run(ctx context.Context) {
	first := map[peer.ID][]int{}
	for i, it := range p.items {
		for it.err == nil && it.next < min(p.replicas, len(it.targets)) {
			p.enlist(first, i)
		}
	}
	p.dispatch(ctx, first)
	for !p.finished() {
		select {
		case a := <-p.answers:
			p.take(ctx, a)
		case <-ctx.Done():
			for _, it := range p.items {
				if !it.done(p.want) {
					it.why = append(it.why, ctx.Err())
				}
			}
			return
		}
	}
}

func (p *putting) finished() bool {
	for _, it := range p.items {
		if !it.done(p.want) {
			return false
		}
	}
	return true
}

// enlist adds the item's next target to those to be asked.
func (p *putting) enlist(asks map[peer.ID][]int, i int) {
	it := p.items[i]
	to := it.targets[it.next]
	it.next++
	it.pending++
	asks[to] = append(asks[to], i)
}

func (p *putting) dispatch(ctx context.Context, asks map[peer.ID][]int) {
	for to, which := range asks {
		ask := &wirev1.RecordAsk{}
		for _, i := range which {
			ask.Put = append(ask.Put, &wirev1.RecordItem{Envelope: p.items[i].envelope})
		}
		attempt := context.WithoutCancel(ctx) // an attempt goes on when the call has what it wants
		if !p.r.start(func() {
			a, err := p.r.ask(attempt, to, ask)
			select {
			case p.answers <- putAnswer{from: to, which: which, answers: a.GetPut(), err: err}:
			case <-p.over:
			}
		}) {
			p.take(ctx, putAnswer{from: to, which: which, err: errors.New("this node is closing")})
		}
	}
}

// take counts what one member answered and asks successors for what it did not take.
func (p *putting) take(ctx context.Context, a putAnswer) {
	if a.err == nil && len(a.answers) != len(a.which) {
		a.err = fmt.Errorf("%d answers to %d records", len(a.answers), len(a.which))
	}
	more := map[peer.ID][]int{}
	for n, i := range a.which {
		it := p.items[i]
		it.pending--
		err := a.err
		if err == nil {
			switch ans := a.answers[n]; ans.GetResult() {
			case wirev1.RecordPutAnswer_STORED, wirev1.RecordPutAnswer_SAME:
				it.acked++
				continue
			case wirev1.RecordPutAnswer_OLDER:
				if v := versionOf(ans.GetNewer()); v.Compare(it.newest) > 0 {
					it.newest = v
				}
				err = &OlderError{Key: it.entry.Key, Put: it.rec.Version(), Newest: versionOf(ans.GetNewer())}
			case wirev1.RecordPutAnswer_FULL:
				err = ErrFull
			default:
				err = fmt.Errorf("refused: %s", ans.GetMessage())
			}
		}
		it.why = append(it.why, fmt.Errorf("%s: %w", a.from, err))
		if a.err != nil {
			p.r.forget(it.entry.Key)
		}
		if it.acked < p.want && it.next < len(it.targets) {
			p.enlist(more, i)
		}
	}
	if len(more) > 0 {
		p.dispatch(ctx, more)
	}
}

func (p *putting) results() []Result {
	results := make([]Result, len(p.items))
	for i, it := range p.items {
		res := Result{Acked: it.acked, Of: min(p.replicas, len(it.targets)), Err: it.err}
		if res.Err == nil && it.acked < p.want {
			if it.newest.Compare(it.rec.Version()) > 0 {
				res.Err = &OlderError{Key: it.entry.Key, Put: it.rec.Version(), Newest: it.newest}
			} else {
				res.Err = &TooFewError{Key: it.entry.Key, Acked: it.acked, Want: p.want, Why: it.why}
			}
		}
		results[i] = res
	}
	return results
}

// outdated returns the items whose revision, chosen here, is lower than one that members have: this node had lost count, or another
// wrote the key.
func (p *putting) outdated() []int {
	var again []int
	for i, it := range p.items {
		if it.auto && it.newest.Compare(it.rec.Version()) > 0 {
			again = append(again, i)
		}
	}
	return again
}

// pick returns the entries of some items, to be put with a version after the one met.
func (p *putting) pick(which []int) []Entry {
	entries := make([]Entry, 0, len(which))
	for _, i := range which {
		it := p.items[i]
		e := it.entry
		e.Incarnation, e.Epoch, e.Revision = it.newest.Incarnation, it.newest.Epoch, it.newest.Revision+1
		entries = append(entries, e)
	}
	return entries
}
