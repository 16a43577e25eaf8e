package records

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	ds "github.com/ipfs/go-datastore"
	dsq "github.com/ipfs/go-datastore/query"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/multiformats/go-base32"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/internal/planted"
)

// entry is what is kept in memory of a record here; the value stays in the datastore.
type entry struct {
	version Version
	written time.Time // when it was written, as far as is known here; on the monotonic clock within a run
	ttl     time.Duration
	deleted bool
	sum     uint64
	bucket  int // range of the key space
	// placed are the members that held the key when repair last looked (nil: it never did); holders those closest to it as of a
	// generation of the view, or, routed, where the view was not sure in that one, more than hold it, as a lookup said when they were found (zero: none
	// did); tried is when the keeper looked them up last.
	placed, holders []peer.ID
	gen             uint64
	routed          bool
	found, tried    time.Time
	strayed         int // rounds in which this node was not among the holders
}

func (e *entry) age(now time.Time) time.Duration { return max(now.Sub(e.written), 0) }

func (e *entry) expired(now time.Time) bool { return e.ttl > 0 && e.age(now) > e.ttl }

// local is the index over the datastore.
type local struct {
	store   ds.Batching
	corrupt func(key string, err error) // is told of a record that cannot be read any more

	writing sync.Mutex // held from a look at the version to its write: the one place where records are written

	mu      sync.RWMutex // guards all below
	entries map[string]*entry
	sorted  []string // all keys, in order where inOrder
	inOrder bool
	dead    int
}

// valueKey is where kad-dht keeps the record of a key (records/value_store.go, valueDsKey).
func valueKey(key string) ds.Key {
	return ds.NewKey("/" + Namespace + "/" + base32.RawStdEncoding.EncodeToString([]byte(key)))
}

// openLocal builds the index. What cannot be read is left alone: kad-dht's store discards it, and a write replaces it.
func openLocal(store ds.Batching) (*local, error) {
	l := &local{store: store, entries: map[string]*entry{}}
	res, err := store.Query(context.Background(), dsq.Query{Prefix: "/" + Namespace})
	if err != nil {
		return nil, fmt.Errorf("read stored records: %w", err)
	}
	now := time.Now()
	for q := range res.Next() {
		if q.Error != nil {
			return nil, errors.Join(fmt.Errorf("read stored records: %w", q.Error), res.Close())
		}
		rec, received, ok := parseStored(q.Value, now)
		if ok && valueKey(rec.Key).String() == q.Key {
			l.set(rec.Key, rec, received)
		}
	}
	return l, res.Close()
}

// parseStored reads kad-dht's record. It does not verify the signature again: that was done before it was stored.
func parseStored(b []byte, now time.Time) (*Record, time.Time, bool) {
	p := &recpb.Record{}
	if proto.Unmarshal(b, p) != nil {
		return nil, time.Time{}, false
	}
	r, err := openUnchecked(p.GetValue(), false)
	if err != nil || r.Key != string(p.GetKey()) {
		return nil, time.Time{}, false
	}
	received, err := time.Parse(time.RFC3339Nano, p.GetTimeReceived())
	if err != nil {
		received = now
	}
	// The wall clock fills the gap of a restart; the age goes on from there on the monotonic one.
	return r, now.Add(-max(now.Sub(received), 0)), true
}

func encodeStored(key string, envelope []byte, written time.Time) ([]byte, error) {
	return proto.Marshal(&recpb.Record{
		Key: []byte(key), Value: envelope, TimeReceived: written.UTC().Format(time.RFC3339Nano),
	})
}

// set puts a record into the index.
func (l *local) set(key string, r *Record, written time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.entries[key]
	if e == nil {
		point := keys.Of(key)
		e = &entry{bucket: int(point[0]) * buckets / 256}
		l.entries[key] = e
		l.sorted = append(l.sorted, key)
		l.inOrder = false
	} else if e.deleted {
		l.dead--
	}
	if r.Deleted {
		l.dead++
	}
	e.version, e.ttl, e.deleted, e.written = r.Version(), r.TTL, r.Deleted, written
	e.sum = sumOf(key, e.version)
}

// drop takes keys out of the index.
func (l *local) drop(gone []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, key := range gone {
		if e := l.entries[key]; e != nil {
			if e.deleted {
				l.dead--
			}
			delete(l.entries, key)
		}
	}
	l.sorted = slices.DeleteFunc(l.sorted, func(k string) bool { return l.entries[k] == nil })
}

// get returns a copy of an entry that has not expired.
func (l *local) get(key string) (entry, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	e := l.entries[key]
	if e == nil || e.expired(time.Now()) {
		return entry{}, false
	}
	return *e, true
}

// lookup returns a copy of an entry, expired or not.
func (l *local) lookup(key string) (entry, bool) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	e := l.entries[key]
	if e == nil {
		return entry{}, false
	}
	return *e, true
}

// keysUnder returns the keys with a prefix that have not expired, in order, at most limit (0: all), after a key.
func (l *local) keysUnder(prefix, after string, limit int) (found []string, more bool) {
	l.mu.Lock()
	if !l.inOrder {
		slices.Sort(l.sorted)
		l.inOrder = true
	}
	l.mu.Unlock()
	l.mu.RLock()
	defer l.mu.RUnlock()
	list := l.sorted
	if !l.inOrder { // a key came in between
		list = slices.Sorted(slices.Values(list))
	}
	now := time.Now()
	from, _ := slices.BinarySearch(list, max(prefix, after))
	for _, k := range list[from:] {
		if !strings.HasPrefix(k, prefix) {
			break
		}
		if k == after || l.entries[k].expired(now) {
			continue
		}
		if limit > 0 && len(found) == limit {
			return found, true
		}
		found = append(found, k)
	}
	return found, false
}

// each calls f for each entry that has not expired, under the lock: f may change the entry's holders.
func (l *local) each(f func(key string, e *entry)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	for k, e := range l.entries {
		if !e.expired(now) {
			f(k, e)
		}
	}
}

func (l *local) count() (keys, dead int) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return len(l.entries), l.dead
}

// read returns a record that is here, as stored, with its age. One that cannot be read any more is not here from then on: the index forgets it, so that
// another holder's copy of the same version is taken in by read repair and anti-entropy, over what is broken.
func (l *local) read(ctx context.Context, key string) (envelope []byte, age time.Duration, ok bool, err error) {
	e, ok := l.get(key)
	if !ok {
		return nil, 0, false, nil
	}
	envelope, _, err = l.load(ctx, key, e.version)
	switch {
	case err == nil:
		return envelope, e.age(time.Now()), true, nil
	case ctx.Err() != nil:
		return nil, 0, false, fmt.Errorf("read record %s: %w", key, err)
	case l.forget(key, e.version):
		l.corrupt(key, err)
	}
	return nil, 0, false, nil
}

// load reads a record from the datastore that should be of version v, or of a later one that is just being written. The signature is its reader's to verify.
func (l *local) load(ctx context.Context, key string, v Version) (envelope []byte, r *Record, err error) {
	b, err := l.store.Get(ctx, valueKey(key))
	if err != nil {
		return nil, nil, err
	}
	p := &recpb.Record{}
	if err := proto.Unmarshal(b, p); err != nil {
		return nil, nil, err
	}
	r, err = openUnchecked(p.GetValue(), false)
	switch {
	case err != nil:
		return nil, nil, err
	case r.Key != key:
		return nil, nil, fmt.Errorf("it is the record of %q", r.Key)
	case r.Version().Compare(v) < 0:
		return nil, nil, errors.New("it is older than the one that was written")
	}
	return p.GetValue(), r, nil
}

// forget takes a record out of the index that the datastore no longer has, if it still is of version v: false: it is not, a newer one has come.
func (l *local) forget(key string, v Version) bool {
	l.writing.Lock()
	defer l.writing.Unlock()
	if e, ok := l.lookup(key); !ok || e.version != v {
		return false
	}
	l.drop([]string{key})
	return true
}

// record reads a record that is here.
func (l *local) record(ctx context.Context, key string) (Record, bool, error) {
	envelope, age, ok, err := l.read(ctx, key)
	if err != nil || !ok {
		return Record{}, false, err
	}
	r, err := openUnchecked(envelope, false)
	if err != nil || r.Key != key {
		return Record{}, false, nil
	}
	r.Age = age
	return *r, true, nil
}

// incoming is a valid record on its way into the store.
type incoming struct {
	*Record
	envelope []byte
}

type verdict int

const (
	stored verdict = iota
	same
	older
	noRoom
)

// keep writes records that are higher than what is here, all in one batch, and synced where one of them never expires. It is the only
// way into the datastore.
func (l *local) keep(ctx context.Context, in []incoming, room func(key string, have int) bool) (verdicts []verdict, err error) {
	l.writing.Lock()
	defer l.writing.Unlock()
	b, err := l.store.Batch(ctx)
	if err != nil {
		return nil, fmt.Errorf("keep records: %w", err)
	}
	now := time.Now()
	verdicts = make([]verdict, len(in))
	highest := map[string]int{} // index of what this batch writes
	durable := false
	for i, r := range in {
		if verdicts[i] = l.judge(ctx, r, in, highest, room); verdicts[i] != stored {
			continue
		}
		value, err := encodeStored(r.Key, r.envelope, now.Add(-r.Age))
		if err == nil {
			err = b.Put(ctx, valueKey(r.Key), value)
		}
		if err != nil {
			return nil, fmt.Errorf("keep record %s: %w", r.Key, err)
		}
		highest[r.Key] = i
		durable = durable || r.TTL == 0 || r.Deleted
	}
	if len(highest) == 0 {
		return verdicts, nil
	}
	if err := b.Commit(ctx); err != nil {
		return nil, fmt.Errorf("keep records: %w", err)
	}
	for key, i := range highest {
		l.set(key, in[i].Record, now.Add(-in[i].Age))
	}
	if durable {
		if err := l.store.Sync(ctx, ds.NewKey("/"+Namespace)); err != nil {
			return nil, fmt.Errorf("keep records: %w", err)
		}
	}
	return verdicts, nil
}

// judge compares a record with what is here, or earlier in the same batch.
func (l *local) judge(ctx context.Context, r incoming, in []incoming, highest map[string]int, room func(string, int) bool) verdict {
	if r.TTL > 0 && r.Age > r.TTL {
		return older // it would not be found here
	}
	l.mu.RLock()
	e, have := l.entries[r.Key], len(l.entries)
	var current Version
	if e != nil {
		current = e.version
	}
	l.mu.RUnlock()
	i, inBatch := highest[r.Key]
	if inBatch {
		current = in[i].Version()
	} else if e == nil {
		if !room(r.Key, have+len(highest)) {
			return noRoom
		}
		return stored
	}
	mine := r.Version()
	if c := mine.Compare(current); c > 0 || c < 0 && planted.Bug("mirror-older-wins") {
		return stored
	} else if c == 0 {
		return same
	}
	// Members that mirror the same register write the same value under the same number: one is as good as the other.
	if mine.Writer = current.Writer; mine != current {
		return older
	}
	var twin *Record
	if inBatch {
		twin = in[i].Record
	} else {
		var err error
		if _, twin, err = l.load(ctx, r.Key, current); err != nil {
			return older // who reads it finds that it is broken (read)
		}
	}
	if twin.Deleted == r.Deleted && bytes.Equal(twin.Value, r.Value) {
		return same
	}
	return older
}

// remove deletes keys from the datastore and the index, where their version is still the one given.
func (l *local) remove(ctx context.Context, gone map[string]Version) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	b, err := l.store.Batch(ctx)
	if err != nil {
		return fmt.Errorf("drop records: %w", err)
	}
	var list []string
	for key, v := range gone {
		l.mu.RLock()
		e := l.entries[key]
		still := e != nil && e.version == v
		l.mu.RUnlock()
		if !still {
			continue
		}
		if err := b.Delete(ctx, valueKey(key)); err != nil {
			return fmt.Errorf("drop record %s: %w", key, err)
		}
		list = append(list, key)
	}
	if len(list) == 0 {
		return nil
	}
	if err := b.Commit(ctx); err != nil {
		return fmt.Errorf("drop records: %w", err)
	}
	l.drop(list)
	return nil
}
