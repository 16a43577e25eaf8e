package node

import (
	"context"
	"errors"
	"sync/atomic"

	ds "github.com/ipfs/go-datastore"
	"github.com/ipfs/go-datastore/query"
)

// lateStore is kad-dht's datastore before the records, which own it, can exist: they need the host that kad-dht comes with.
type lateStore struct{ of atomic.Pointer[ds.Batching] }

var errNotOpen = errors.New("the records are not open yet")

func (l *lateStore) set(d ds.Batching) { l.of.Store(&d) }

func (l *lateStore) get() (ds.Batching, error) {
	if p := l.of.Load(); p != nil {
		return *p, nil
	}
	return nil, errNotOpen
}

func (l *lateStore) Get(ctx context.Context, k ds.Key) ([]byte, error) {
	d, err := l.get()
	if err != nil {
		return nil, err
	}
	return d.Get(ctx, k)
}

func (l *lateStore) Has(ctx context.Context, k ds.Key) (bool, error) {
	d, err := l.get()
	if err != nil {
		return false, err
	}
	return d.Has(ctx, k)
}

func (l *lateStore) GetSize(ctx context.Context, k ds.Key) (int, error) {
	d, err := l.get()
	if err != nil {
		return 0, err
	}
	return d.GetSize(ctx, k)
}

func (l *lateStore) Query(ctx context.Context, q query.Query) (query.Results, error) {
	d, err := l.get()
	if err != nil {
		return nil, err
	}
	return d.Query(ctx, q)
}

func (l *lateStore) Put(ctx context.Context, k ds.Key, v []byte) error {
	d, err := l.get()
	if err != nil {
		return err
	}
	return d.Put(ctx, k, v)
}

func (l *lateStore) Delete(ctx context.Context, k ds.Key) error {
	d, err := l.get()
	if err != nil {
		return err
	}
	return d.Delete(ctx, k)
}

func (l *lateStore) Sync(ctx context.Context, k ds.Key) error {
	d, err := l.get()
	if err != nil {
		return err
	}
	return d.Sync(ctx, k)
}

func (l *lateStore) Batch(ctx context.Context) (ds.Batch, error) {
	d, err := l.get()
	if err != nil {
		return nil, err
	}
	return d.Batch(ctx)
}

func (l *lateStore) Close() error { return nil }
