package records

import (
	"context"
	"fmt"
	"strings"
	"time"

	ds "github.com/ipfs/go-datastore"
	dsq "github.com/ipfs/go-datastore/query"
	recpb "github.com/libp2p/go-libp2p-record/pb"
	"github.com/multiformats/go-base32"
	"google.golang.org/protobuf/proto"
)

// Datastore returns the datastore to give to kad-dht. Reads are those of the store below, except that what has expired is not found;
// records that kad-dht writes take the same way as all others: one that is lower than what is here is not written and gives an error.
// Other keys pass through.
func (r *Records) Datastore() ds.Batching { return &datastore{r: r, below: r.cfg.Store} }

type datastore struct {
	r     *Records
	below ds.Batching
}

// recordKey returns the record key that a datastore key stands for.
func recordKey(k ds.Key) (string, bool) {
	enc, ok := strings.CutPrefix(k.String(), keyPrefix)
	if !ok || strings.Contains(enc, "/") {
		return "", false
	}
	key, err := base32.RawStdEncoding.DecodeString(enc)
	return string(key), err == nil
}

func (d *datastore) visible(k ds.Key) bool {
	key, ok := recordKey(k)
	if !ok {
		return true
	}
	d.r.local.mu.RLock()
	defer d.r.local.mu.RUnlock()
	e := d.r.local.entries[key]
	return e == nil || !e.expired(time.Now())
}

func (d *datastore) Get(ctx context.Context, k ds.Key) ([]byte, error) {
	if !d.visible(k) {
		return nil, ds.ErrNotFound
	}
	return d.below.Get(ctx, k)
}

func (d *datastore) Has(ctx context.Context, k ds.Key) (bool, error) {
	if !d.visible(k) {
		return false, nil
	}
	return d.below.Has(ctx, k)
}

func (d *datastore) GetSize(ctx context.Context, k ds.Key) (int, error) {
	if !d.visible(k) {
		return -1, ds.ErrNotFound
	}
	return d.below.GetSize(ctx, k)
}

func (d *datastore) Query(ctx context.Context, q dsq.Query) (dsq.Results, error) {
	return d.below.Query(ctx, q)
}

// Put writes through Records where the key is that of a record.
func (d *datastore) Put(ctx context.Context, k ds.Key, value []byte) error {
	key, ok := recordKey(k)
	if !ok {
		return d.below.Put(ctx, k, value)
	}
	p := &recpb.Record{}
	if err := proto.Unmarshal(value, p); err != nil {
		return fmt.Errorf("store %s: %w: %w", key, ErrInvalid, err)
	}
	rec, err := d.r.validator.open(p.GetValue())
	if err == nil && rec.Key != key {
		err = fmt.Errorf("%w: a record for %q", ErrInvalid, rec.Key)
	}
	if err != nil {
		d.r.stats.invalid.Add(1)
		return fmt.Errorf("store %s: %w", key, err)
	}
	verdicts, err := d.r.keep(ctx, []incoming{{Record: rec, envelope: p.GetValue()}})
	if err != nil {
		return err
	}
	switch verdicts[0] {
	case older:
		return fmt.Errorf("store %s: version %s is lower than the one here", key, rec.Version())
	case noRoom:
		return fmt.Errorf("store %s: %w", key, ErrFull)
	default:
		return nil
	}
}

// Delete removes what kad-dht found unreadable, or another key.
func (d *datastore) Delete(ctx context.Context, k ds.Key) error {
	key, ok := recordKey(k)
	if !ok {
		return d.below.Delete(ctx, k)
	}
	l := d.r.local
	l.writing.Lock()
	defer l.writing.Unlock()
	if err := d.below.Delete(ctx, k); err != nil {
		return err
	}
	l.drop([]string{key})
	return nil
}

func (d *datastore) Batch(context.Context) (ds.Batch, error) { return ds.NewBasicBatch(d), nil }

func (d *datastore) Sync(ctx context.Context, k ds.Key) error { return d.below.Sync(ctx, k) }

// Close does nothing: the store below belongs to whoever opened it.
func (d *datastore) Close() error { return nil }
