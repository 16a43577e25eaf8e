package events

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// extrasMost is how many events of one origin may wait for a gap before it.
	extrasMost = 1024
	// originsMost bounds the (node, boot)s that are remembered, the ones without events here included.
	originsMost = 4096
	// lastMost bounds the channels with a last event.
	lastMost = 4096
)

// originKey is one boot of one node.
type originKey struct {
	node string
	boot uint64
}

// origin is what is known of the events of one boot.
type origin struct {
	key originKey
	// upto: everything up to it is known: here, told to subscribers, or gone.
	upto uint64
	// extra are here beyond a gap, since gap.
	extra map[uint64]struct{}
	gap   time.Time
	at    map[uint64]uint64 // counter -> place in the ring
	used  uint64            // place of the newest event, to forget the oldest origins first
}

// ring is the history: events by place, in the order in which they came. It is not safe for concurrent use; Events guards it.
type ring struct {
	db      *pebble.DB
	prefix  []byte
	keep    int
	next    uint64
	order   []place // oldest first
	origins map[originKey]*origin
	last    map[string]*wirev1.Event
}

type place struct {
	seq     uint64
	origin  *origin
	counter uint64
}

// Keys, after the prefix: 'e' place -> event; 'l' channel -> its last event.
func (r *ring) eventKey(seq uint64) []byte {
	return binary.BigEndian.AppendUint64(append(slices.Clone(r.prefix), 'e'), seq)
}

func (r *ring) lastKey(channel string) []byte {
	return append(append(slices.Clone(r.prefix), 'l'), channel...)
}

// openRing reads the history. Events that cannot be read are removed.
func openRing(db *pebble.DB, prefix string, keep int) (*ring, error) {
	r := &ring{
		db: db, prefix: []byte(prefix), keep: keep, next: 1,
		origins: map[originKey]*origin{}, last: map[string]*wirev1.Event{},
	}
	bad := db.NewBatch()
	err := r.scan('e', func(key, value []byte) error {
		w := &wirev1.Event{}
		if len(key) != 8 || proto.Unmarshal(value, w) != nil || check(w) != nil {
			return bad.Delete(append(append(slices.Clone(r.prefix), 'e'), key...), nil)
		}
		seq := binary.BigEndian.Uint64(key)
		o := r.origin(w)
		o.at[w.GetCounter()], o.used = seq, seq
		r.order = append(r.order, place{seq, o, w.GetCounter()})
		r.next = seq + 1
		return nil
	})
	if err == nil {
		err = r.scan('l', func(key, value []byte) error {
			w := &wirev1.Event{}
			if proto.Unmarshal(value, w) != nil || w.GetChannel() != string(key) {
				return bad.Delete(r.lastKey(string(key)), nil)
			}
			r.last[w.GetChannel()] = w
			return nil
		})
	}
	if err == nil && !bad.Empty() {
		err = bad.Commit(pebble.NoSync)
	}
	if err = errors.Join(err, bad.Close()); err != nil {
		return nil, fmt.Errorf("read the history of events: %w", err)
	}
	r.resume()
	return r, nil
}

// resume works out what is known from what is here. What is missing before it was removed, or had been waited for in vain.
func (r *ring) resume() {
	for _, o := range r.origins {
		for c := range o.at {
			o.upto = max(o.upto, c)
		}
	}
}

func (r *ring) scan(kind byte, f func(key, value []byte) error) error {
	lo := append(slices.Clone(r.prefix), kind)
	hi := append(slices.Clone(r.prefix), kind+1)
	it, err := r.db.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: hi})
	if err != nil {
		return err
	}
	for it.First(); it.Valid() && err == nil; it.Next() {
		var v []byte
		if v, err = it.ValueAndErr(); err == nil {
			err = f(it.Key()[len(lo):], v)
		}
	}
	return errors.Join(err, it.Error(), it.Close())
}

func keyOf(w *wirev1.Event) originKey { return originKey{string(w.GetOrigin()), w.GetBoot()} }

func (r *ring) origin(w *wirev1.Event) *origin { return r.originOf(keyOf(w)) }

func (r *ring) originOf(k originKey) *origin {
	o := r.origins[k]
	if o == nil {
		o = &origin{key: k, extra: map[uint64]struct{}{}, at: map[uint64]uint64{}}
		if len(r.origins) >= originsMost {
			r.forget()
		}
		o.used = r.next
		r.origins[k] = o
	}
	return o
}

// forget drops the origin that was heard of longest ago, of those that have no events here.
func (r *ring) forget() {
	var oldest *origin
	for _, o := range r.origins {
		if len(o.at) == 0 && (oldest == nil || o.used < oldest.used) {
			oldest = o
		}
	}
	if oldest != nil {
		delete(r.origins, oldest.key)
	}
}

func (o *origin) knows(counter uint64) bool {
	if counter <= o.upto {
		return true
	}
	_, ok := o.extra[counter]
	return ok
}

// learn notes an event that has come and returns the counters that are known without a gap from now on, in order.
func (o *origin) learn(counter uint64) (ready []uint64) {
	if o.knows(counter) {
		return nil
	}
	if counter != o.upto+1 {
		if len(o.extra) == 0 {
			o.gap = time.Now()
		}
		o.extra[counter] = struct{}{}
		if len(o.extra) <= extrasMost {
			return nil
		}
		return o.giveUp()
	}
	o.upto = counter
	return append([]uint64{counter}, o.absorb()...)
}

// absorb takes in what had waited for the gap that is now closed.
func (o *origin) absorb() (ready []uint64) {
	for {
		if _, ok := o.extra[o.upto+1]; !ok {
			break
		}
		o.upto++
		delete(o.extra, o.upto)
		ready = append(ready, o.upto)
	}
	if len(ready) > 0 {
		o.gap = time.Now()
	}
	return ready
}

// giveUp skips the first gap.
func (o *origin) giveUp() []uint64 {
	first := uint64(0)
	for c := range o.extra {
		if first == 0 || c < first {
			first = c
		}
	}
	if first == 0 {
		return nil
	}
	o.upto = first - 1
	return o.absorb()
}

// first is the lowest counter that is here without a gap after it as far as is known; what is below it cannot be had from here.
func (o *origin) first() uint64 {
	lowest := o.upto + 1
	for c := range o.at {
		lowest = min(lowest, c)
	}
	return lowest
}

// skip notes that everything below first is gone, and returns what that makes ready.
func (o *origin) skip(first uint64) []uint64 {
	if first <= o.upto+1 {
		return nil
	}
	var ready []uint64
	for c := range o.extra {
		if c < first {
			ready = append(ready, c)
			delete(o.extra, c)
		}
	}
	slices.Sort(ready)
	o.upto = first - 1
	return append(ready, o.absorb()...)
}

// add stores events that are not known yet and returns those, and those that subscribers may be told of now: per origin in order.
func (r *ring) add(list []*wirev1.Event) (fresh, ready []*wirev1.Event, err error) {
	b := r.db.NewBatch()
	defer func() { err = errors.Join(err, b.Close()) }()
	var told []place
	for _, w := range list {
		o := r.origin(w)
		if o.knows(w.GetCounter()) {
			continue
		}
		value, err := proto.Marshal(w)
		if err == nil {
			err = b.Set(r.eventKey(r.next), value, nil)
		}
		if err == nil {
			err = r.retain(b, w, value)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("keep event: %w", err)
		}
		o.at[w.GetCounter()], o.used = r.next, r.next
		r.order = append(r.order, place{r.next, o, w.GetCounter()})
		r.next++
		fresh = append(fresh, w)
		for _, c := range o.learn(w.GetCounter()) {
			told = append(told, place{origin: o, counter: c})
		}
	}
	if err := r.evict(b); err != nil {
		return nil, nil, fmt.Errorf("remove old events: %w", err)
	}
	if err := b.Commit(pebble.NoSync); err != nil {
		return nil, nil, fmt.Errorf("keep events: %w", err)
	}
	ready, err = r.load(told)
	return fresh, ready, err
}

// retain keeps an event as its channel's last, unless there is a later one.
func (r *ring) retain(b *pebble.Batch, w *wirev1.Event, value []byte) error {
	channel := w.GetChannel()
	if old := r.last[channel]; old != nil {
		if compareTime(w, old) < 0 {
			return nil
		}
	} else if len(r.last) >= lastMost {
		var oldest *wirev1.Event
		for _, l := range r.last {
			if oldest == nil || compareTime(l, oldest) < 0 {
				oldest = l
			}
		}
		delete(r.last, oldest.GetChannel())
		if err := b.Delete(r.lastKey(oldest.GetChannel()), nil); err != nil {
			return err
		}
	}
	r.last[channel] = w
	return b.Set(r.lastKey(channel), value, nil)
}

// evict removes the oldest events beyond the history's length.
func (r *ring) evict(b *pebble.Batch) error {
	n := len(r.order) - r.keep
	if n <= 0 {
		return nil
	}
	for _, p := range r.order[:n] {
		delete(p.origin.at, p.counter)
		if err := b.Delete(r.eventKey(p.seq), nil); err != nil {
			return err
		}
	}
	r.order = append(r.order[:0], r.order[n:]...)
	return nil
}

// load reads events by origin and counter; those that are gone are left out.
func (r *ring) load(places []place) ([]*wirev1.Event, error) {
	list := make([]*wirev1.Event, 0, len(places))
	for _, p := range places {
		seq, ok := p.origin.at[p.counter]
		if !ok {
			continue
		}
		w, err := r.read(seq)
		if err != nil {
			return list, err
		}
		if w != nil {
			list = append(list, w)
		}
	}
	return list, nil
}

func (r *ring) read(seq uint64) (*wirev1.Event, error) {
	v, closer, err := r.db.Get(r.eventKey(seq))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read event: %w", err)
	}
	w := &wirev1.Event{}
	if proto.Unmarshal(v, w) != nil {
		w = nil
	}
	return w, closer.Close()
}
