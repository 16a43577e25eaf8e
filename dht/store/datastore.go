package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"

	"github.com/cockroachdb/pebble/v2"
	ds "github.com/ipfs/go-datastore"
	"github.com/ipfs/go-datastore/query"
)

// DatastoreOption changes how a Datastore writes.
type DatastoreOption func(*datastore)

// NoSync lets writes return before they are durable; Sync makes them so. For what can be had again elsewhere.
func NoSync() DatastoreOption {
	return func(d *datastore) { d.write = pebble.NoSync }
}

// Datastore returns the part of the database under "ds/<prefix>/" as a go-datastore. Two calls with one prefix see the same data.
// Closing it does nothing; close the Store.
func (s *Store) Datastore(prefix string, opts ...DatastoreOption) ds.Batching {
	d := &datastore{s: s, prefix: []byte("ds/" + url.PathEscape(prefix)), write: pebble.Sync}
	for _, o := range opts {
		o(d)
	}
	return d
}

// datastore implements ds.Batching and, by that, ds.Datastore over a key prefix of the shared database.
type datastore struct {
	s      *Store
	prefix []byte // without the slash that starts each key
	write  *pebble.WriteOptions
}

func (d *datastore) key(k ds.Key) []byte {
	return append(bytes.Clone(d.prefix), k.String()...)
}

// Get implements ds.Read.
func (d *datastore) Get(_ context.Context, k ds.Key) ([]byte, error) {
	done, err := d.s.use()
	if err != nil {
		return nil, err
	}
	defer done()
	v, closer, err := d.s.db.Get(d.key(k))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, ds.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", k, err)
	}
	out := append([]byte{}, v...)
	return out, closer.Close()
}

// Has implements ds.Read.
func (d *datastore) Has(ctx context.Context, k ds.Key) (bool, error) {
	_, err := d.GetSize(ctx, k)
	if errors.Is(err, ds.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// GetSize implements ds.Read.
func (d *datastore) GetSize(_ context.Context, k ds.Key) (int, error) {
	done, err := d.s.use()
	if err != nil {
		return -1, err
	}
	defer done()
	v, closer, err := d.s.db.Get(d.key(k))
	if errors.Is(err, pebble.ErrNotFound) {
		return -1, ds.ErrNotFound
	}
	if err != nil {
		return -1, fmt.Errorf("read %s: %w", k, err)
	}
	return len(v), closer.Close()
}

// Put implements ds.Write.
func (d *datastore) Put(_ context.Context, k ds.Key, value []byte) error {
	done, err := d.s.use()
	if err != nil {
		return err
	}
	defer done()
	if err := d.s.db.Set(d.key(k), value, d.write); err != nil {
		return fmt.Errorf("write %s: %w", k, err)
	}
	return nil
}

// Delete implements ds.Write; deleting what is not there is no error.
func (d *datastore) Delete(_ context.Context, k ds.Key) error {
	done, err := d.s.use()
	if err != nil {
		return err
	}
	defer done()
	if err := d.s.db.Delete(d.key(k), d.write); err != nil {
		return fmt.Errorf("delete %s: %w", k, err)
	}
	return nil
}

// Sync implements ds.Datastore: all writes so far, of any prefix, are durable when it returns.
func (d *datastore) Sync(context.Context, ds.Key) error {
	done, err := d.s.use()
	if err != nil {
		return err
	}
	defer done()
	if err := d.s.db.LogData(nil, pebble.Sync); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// Close implements io.Closer and does nothing: the Store owns the database.
func (d *datastore) Close() error { return nil }

// Query implements ds.Read. It sees the data as of the call. Results in key order (or reversed) stream from the database; other
// orders are sorted in memory. The results must be read to their end or closed.
func (d *datastore) Query(_ context.Context, q query.Query) (query.Results, error) {
	done, err := d.s.use()
	if err != nil {
		return nil, err
	}
	prefix := ds.NewKey(q.Prefix).String()
	if prefix != "/" {
		prefix += "/"
	}
	lower := append(bytes.Clone(d.prefix), prefix...)
	it, err := d.s.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: after(lower)})
	if err != nil {
		done()
		return nil, fmt.Errorf("query %s: %w", q.Prefix, err)
	}
	start, step, rest := it.First, it.Next, q
	rest.Prefix = "" // done by the bounds
	if len(q.Orders) > 0 {
		switch q.Orders[0].(type) {
		case query.OrderByKey, *query.OrderByKey:
			rest.Orders = nil
		case query.OrderByKeyDescending, *query.OrderByKeyDescending:
			start, step, rest.Orders = it.Last, it.Prev, nil
		}
	}
	return query.NaiveQueryApply(rest, query.ResultsFromIterator(q, d.iterator(it, q, start, step, done))), nil
}

func (d *datastore) iterator(it *pebble.Iterator, q query.Query, start, step func() bool, done func()) query.Iterator {
	begun, failed, closed := false, false, false
	values := !q.KeysOnly || len(q.Filters) > 0 || len(q.Orders) > 0 // filters and orders may look at the value
	return query.Iterator{
		Next: func() (query.Result, bool) {
			if closed || failed {
				return query.Result{}, false
			}
			ok := false
			if begun {
				ok = step()
			} else {
				begun, ok = true, start()
			}
			if !ok {
				if err := it.Error(); err != nil {
					failed = true
					return query.Result{Error: fmt.Errorf("query: %w", err)}, true
				}
				return query.Result{}, false
			}
			e := query.Entry{Key: string(it.Key()[len(d.prefix):])}
			v, err := it.ValueAndErr()
			if err != nil {
				failed = true
				return query.Result{Error: fmt.Errorf("query %s: %w", e.Key, err)}, true
			}
			e.Size = len(v)
			if values {
				e.Value = append([]byte{}, v...)
			}
			return query.Result{Entry: e}, true
		},
		Close: func() error {
			if closed {
				return nil
			}
			closed = true
			defer done()
			return it.Close()
		},
	}
}

// after returns the first key that does not start with prefix.
func after(prefix []byte) []byte {
	end := bytes.Clone(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		if end[i] != 0xff {
			end[i]++
			return end[:i+1]
		}
	}
	return nil
}

// Batch implements ds.Batching. The batch is atomic; it may be committed once.
func (d *datastore) Batch(context.Context) (ds.Batch, error) {
	return &batch{d: d}, nil
}

// batch keeps its operations in memory until Commit, so that an abandoned one holds nothing of the database.
type batch struct {
	d   *datastore
	ops []op
}

type op struct {
	key, value []byte
	del        bool
}

func (b *batch) Put(_ context.Context, k ds.Key, v []byte) error {
	b.ops = append(b.ops, op{key: b.d.key(k), value: bytes.Clone(v)})
	return nil
}

func (b *batch) Delete(_ context.Context, k ds.Key) error {
	b.ops = append(b.ops, op{key: b.d.key(k), del: true})
	return nil
}

func (b *batch) Commit(context.Context) (err error) {
	done, err := b.d.s.use()
	if err != nil {
		return err
	}
	defer done()
	pb := b.d.s.db.NewBatch()
	defer func() { err = errors.Join(err, pb.Close()) }()
	for _, o := range b.ops {
		if o.del {
			err = pb.Delete(o.key, nil)
		} else {
			err = pb.Set(o.key, o.value, nil)
		}
		if err != nil {
			return fmt.Errorf("batch: %w", err)
		}
	}
	if err := pb.Commit(b.d.write); err != nil {
		return fmt.Errorf("commit batch: %w", err)
	}
	b.ops = nil
	return nil
}
