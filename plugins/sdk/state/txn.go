package state

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/RaduBerinde/btreemap"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// Txn is one transaction over the map. Keys are any bytes in a string, in byte order; values are any bytes. Methods may be called from the goroutines
// of one call; after the call has ended reads find nothing and writes are refused (they make nothing wrong, and say so in the next Err).
//
// Writes have no error of their own: what is wrong with one (too large, a read-only transaction) makes the whole call fail and roll back.
type Txn struct {
	store    *Store
	name     string // who holds the state, for hang detection
	readOnly bool

	mu       sync.Mutex // guards everything below
	begun    bool
	ended    bool
	err      error
	mark     uint64 // observed: the version it started from
	work     *btreemap.BTreeMap[string, []byte]
	schema   uint32
	nextCall uint64
	ops      []*statev1.Op
	bytes    int   // written
	grown    int64 // of the map's encoded size
}

// NewTxn makes a transaction that does not hold anything yet; Begin makes it see the state.
func (s *Store) NewTxn(name string, readOnly bool) *Txn {
	return &Txn{store: s, name: name, readOnly: readOnly}
}

// Begin makes the transaction see the state; calling it again does nothing. A write transaction waits here for the one before it.
func (s *Store) Begin(ctx context.Context, t *Txn) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return ErrEnded
	}
	if t.begun {
		return nil
	}
	if t.readOnly {
		v := s.snapshot()
		t.work, t.mark, t.schema, t.nextCall, t.begun = v.pairs, v.mark, v.schema, v.nextCall, true
		return nil
	}
	select {
	case <-s.writer:
	default:
		select {
		case <-s.writer:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the state, which %q holds: %w", s.Stats().Writer, context.Cause(ctx))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holder = holder{t.name, time.Now()}
	t.work, t.mark, t.schema, t.nextCall, t.begun = s.cur.pairs.Clone(), s.cur.mark, s.cur.schema, s.cur.nextCall, true
	return nil
}

// Rollback ends the transaction without a trace. After a commit it does nothing.
func (s *Store) Rollback(t *Txn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.release(t)
}

// release gives the write token back; t.mu is held.
func (s *Store) release(t *Txn) {
	if t.ended {
		return
	}
	t.ended, t.work, t.ops = true, nil, nil
	if !t.begun || t.readOnly {
		return
	}
	s.mu.Lock()
	s.holder = holder{}
	s.mu.Unlock()
	s.writer <- struct{}{}
}

// Mark returns the journal mark of the version the transaction saw when it began; 0 if it has not.
func (t *Txn) Mark() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mark
}

// Err returns what makes this transaction fail at its end, if anything yet.
func (t *Txn) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// readable reports whether the map can be read; t.mu is held.
func (t *Txn) readable() bool {
	if t.begun && !t.ended {
		return true
	}
	if t.err == nil {
		t.err = ErrNotBegun
		if t.ended {
			t.err = ErrEnded
		}
	}
	return false
}

// Get returns a copy of the value of key.
func (t *Txn) Get(key string) (value []byte, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.readable() {
		return nil, false
	}
	_, v, ok := t.work.Get(key)
	return bytes.Clone(v), ok
}

// Has reports whether key is there.
func (t *Txn) Has(key string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.readable() && t.work.Has(key)
}

// Len returns the number of keys.
func (t *Txn) Len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.readable() {
		return 0
	}
	return t.work.Len()
}

// Put sets key to a copy of value.
func (t *Txn) Put(key string, value []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.writable(key, value) {
		return
	}
	value = append(make([]byte, 0, len(value)), value...)
	t.grown += putPair(t.work, key, value)
	t.ops = append(t.ops, &statev1.Op{Key: []byte(key), Value: value})
}

// Delete removes key and reports whether it was there.
func (t *Txn) Delete(key string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.writable(key, nil) {
		return false
	}
	grown, ok := deletePair(t.work, key)
	if !ok {
		return false
	}
	t.grown += grown
	t.ops = append(t.ops, &statev1.Op{Key: []byte(key), Delete: true})
	return true
}

// writable checks one write; t.mu is held.
func (t *Txn) writable(key string, value []byte) bool {
	if !t.readable() {
		return false
	}
	t.bytes += len(key) + len(value)
	err := t.err
	switch {
	case err != nil:
	case t.readOnly:
		err = ErrReadOnly
	case len(key) > MaxKeyBytes:
		err = tooLarge("key", len(key), MaxKeyBytes)
	case len(value) > MaxValueBytes:
		err = tooLarge(fmt.Sprintf("value of key %.60q", key), len(value), MaxValueBytes)
	case t.bytes > MaxTxnBytes:
		err = tooLarge("transaction", t.bytes, MaxTxnBytes)
	}
	t.err = err
	return err == nil
}

func tooLarge(what string, n, limit int) error {
	return fmt.Errorf("%s: %d bytes of at most %d: %w", what, n, limit, ErrTooLarge)
}

// All iterates over the keys that begin with prefix, in order; "" is every key. It shows the map as it was when the iteration started, so the loop may
// write.
func (t *Txn) All(prefix string) iter.Seq2[string, []byte] {
	return t.Range(prefix, prefixEnd(prefix))
}

// From iterates over the keys that begin with prefix and are not below from, in order: a page after another.
func (t *Txn) From(prefix, from string) iter.Seq2[string, []byte] {
	return t.Range(max(prefix, from), prefixEnd(prefix))
}

// Range iterates over from <= key < to, in order; to "" means no end. It shows the map as it was when the iteration started, so the loop may write.
func (t *Txn) Range(from, to string) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		view := t.view()
		if view == nil {
			return
		}
		upper := btreemap.Max[string]()
		if to != "" {
			upper = btreemap.LT(to)
		}
		for k, v := range view.Ascend(btreemap.GE(from), upper) {
			if !yield(k, bytes.Clone(v)) {
				return
			}
		}
	}
}

// view returns a map to iterate over that nobody changes.
func (t *Txn) view() *btreemap.BTreeMap[string, []byte] {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.readable() {
		return nil
	}
	if t.readOnly {
		return t.work // a version: never changed, and not ours to clone
	}
	return t.work.Clone()
}

// prefixEnd returns the smallest string above all that begin with prefix; "" when there is none.
func prefixEnd(prefix string) string {
	end := []byte(prefix)
	for len(end) > 0 && end[len(end)-1] == 0xff {
		end = end[:len(end)-1]
	}
	if len(end) == 0 {
		return ""
	}
	end[len(end)-1]++
	return string(end)
}

// Uint64 returns the number that PutUint64 stored under key, 0 if there is none. Something else there makes the call fail.
func (t *Txn) Uint64(key string) uint64 {
	v, ok := t.Get(key)
	if !ok {
		return 0
	}
	if len(v) != 8 {
		t.Fail(fmt.Errorf("key %.60q holds %d bytes, not a number", key, len(v)))
		return 0
	}
	return binary.BigEndian.Uint64(v)
}

// PutUint64 stores a number under key: 8 bytes, big endian.
func (t *Txn) PutUint64(key string, n uint64) {
	t.Put(key, binary.BigEndian.AppendUint64(nil, n))
}

// Message reads the protobuf message that PutMessage stored under key into m and reports whether it is there.
func (t *Txn) Message(key string, m proto.Message) (bool, error) {
	v, ok := t.Get(key)
	if !ok {
		return false, nil
	}
	if err := proto.Unmarshal(v, m); err != nil {
		return false, fmt.Errorf("key %.60q does not hold a %s: %w", key, m.ProtoReflect().Descriptor().FullName(), err)
	}
	return true, nil
}

// PutMessage stores a protobuf message under key.
func (t *Txn) PutMessage(key string, m proto.Message) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fail(fmt.Errorf("key %.60q: encode %s: %w", key, m.ProtoReflect().Descriptor().FullName(), err))
		return
	}
	t.Put(key, b)
}

// Fail makes the transaction fail and roll back at its end with this error, unless one was noted before.
func (t *Txn) Fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil && err != nil {
		t.err = err
	}
}

// NextCall takes the number of the next call that the component makes on its own account. The number is part of the state: if the transaction rolls
// back, the next one takes the same number again.
func (t *Txn) NextCall() (uint64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.readable() {
		return 0, t.err
	}
	if t.readOnly {
		return 0, errors.Join(ErrReadOnly, errors.New("only a write transaction can number its calls"))
	}
	n := t.nextCall
	t.nextCall++
	return n, nil
}

// SetSchema says that the map is of this schema from the end of the transaction on; a migration ends with it.
func (t *Txn) SetSchema(schema uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.writable("", nil) {
		t.schema = schema
	}
}

// ReadOnly reports whether the transaction may not write.
func (t *Txn) ReadOnly() bool { return t.readOnly }
