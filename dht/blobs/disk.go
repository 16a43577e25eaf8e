package blobs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/coppice-project/coppice/internal/planted"
)

// Keys, after the prefix: 'h' hash -> head (when it came, its size, kind and links); 'd' hash -> its data, absent where empty;
// 'c' hash -> nothing: all below is here (only nodes with links need one).
const (
	headKey     = 'h'
	dataKey     = 'd'
	completeKey = 'c'
)

// headFormat leads each head.
const headFormat = 1

var errUnreadable = errors.New("unreadable head")

func (s *Store) key(kind byte, h Hash) []byte {
	k := make([]byte, 0, len(s.cfg.Prefix)+1+len(h))
	k = append(k, s.cfg.Prefix...)
	k = append(k, kind)
	return append(k, h[:]...)
}

// head is what is kept about a node beside its data.
type head struct {
	stored time.Time
	size   uint64 // of the encoding
	links  []Link
	kind   string
}

func appendHeadValue(n *Node, size int, now time.Time) []byte {
	b := make([]byte, 0, 24+len(n.Kind)+len(n.Links)*36)
	b = append(b, headFormat)
	b = binary.BigEndian.AppendUint64(b, uint64(now.UnixMilli()))
	b = binary.AppendUvarint(b, uint64(size))
	return n.appendHead(b)
}

func decodeHeadValue(b []byte) (head, error) {
	if len(b) < 9 || b[0] != headFormat {
		return head{}, fmt.Errorf("%w: %d bytes", errUnreadable, len(b))
	}
	stored := time.UnixMilli(int64(binary.BigEndian.Uint64(b[1:])))
	size, rest, err := uvarint(b[9:])
	if err != nil {
		return head{}, fmt.Errorf("%w: size", errUnreadable)
	}
	n, rest, err := decodeHead(rest)
	if err != nil || len(rest) != 0 {
		return head{}, fmt.Errorf("%w: %d bytes too many, %v", errUnreadable, len(rest), err)
	}
	return head{stored: stored, size: size, links: n.Links, kind: n.Kind}, nil
}

// lookup reads one value; ok is false where there is none. The value is valid within f only.
func (s *Store) lookup(key []byte, f func([]byte) error) (ok bool, err error) {
	v, closer, err := s.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	err = f(v)
	return true, errors.Join(err, closer.Close())
}

func nothing([]byte) error { return nil }

func (s *Store) has(h Hash) (bool, error) { return s.lookup(s.key(headKey, h), nothing) }

// headOf returns the head of a node; ok is false where it is not here. An unreadable head reads as not here: get reports it.
func (s *Store) headOf(h Hash) (hd head, ok bool, err error) {
	ok, err = s.lookup(s.key(headKey, h), func(b []byte) (err error) {
		hd, err = decodeHeadValue(b)
		return err
	})
	if errors.Is(err, errUnreadable) {
		return head{}, false, nil
	}
	return hd, ok, err
}

// flagged reports whether the node is marked complete.
func (s *Store) flagged(h Hash) (bool, error) { return s.lookup(s.key(completeKey, h), nothing) }

// read puts an encoding together from head and data.
func (s *Store) read(h Hash) ([]byte, error) {
	v, closer, err := s.db.Get(s.key(headKey, h))
	if err != nil {
		return nil, err
	}
	_, err = decodeHeadValue(v)
	var enc []byte
	if err == nil {
		_, n := binary.Uvarint(v[9:])
		enc = append(make([]byte, 0, len(v)+MaxKind), v[9+n:]...)
	}
	if err := errors.Join(err, closer.Close()); err != nil {
		return nil, err
	}
	data, closer, err := s.db.Get(s.key(dataKey, h))
	if errors.Is(err, pebble.ErrNotFound) {
		return append(enc, 0), nil
	}
	if err != nil {
		return nil, err
	}
	enc = binary.AppendUvarint(enc, uint64(len(data)))
	enc = append(enc, data...)
	return enc, closer.Close()
}

// wal knows how much of what was applied has reached the disk. Each apply has a number, in the order of Pebble's log; an fsync covers
// all numbers up to its own.
type wal struct {
	mu      sync.Mutex // guards all below, and keeps the numbers in the order of the log
	applied uint64
	synced  uint64
	failed  error // of an fsync; nothing is durable any more
}

// fail notes that an fsync failed, and says whether it was the first.
func (w *wal) fail(err error) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failed != nil {
		return false
	}
	w.failed = fmt.Errorf("%w: %w", errNotDurable, err)
	return true
}

func (w *wal) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed
}

// errNotDurable says that nothing can be promised to be on this disk.
var errNotDurable = errors.New("an fsync failed: check the disk, then start the node again")

// notDurable ends all promises of this store, and has the node end.
func (s *Store) notDurable(err error) error {
	if s.wal.fail(err) {
		s.cfg.Log.Error("blobs: nothing is acknowledged any more", "err", err)
		if s.cfg.Failed != nil {
			s.cfg.Failed(fmt.Errorf("pages: %w", err))
		}
	}
	return s.wal.failure()
}

// apply runs f, which applies one batch without waiting for the disk, and returns its number.
func (w *wal) apply(f func() error) (uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := f(); err != nil {
		return 0, err
	}
	w.applied++
	return w.applied, nil
}

// now returns the number of what was applied last.
func (w *wal) now() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.applied
}

// done notes that everything up to a number is on disk.
func (w *wal) done(n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.synced = max(w.synced, n)
}

func (w *wal) isDone(n uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.synced >= n
}

// durable returns once everything applied up to a number is on disk.
func (s *Store) durable(n uint64) error {
	if s.wal.isDone(n) || planted.Bug("ack-unsynced") {
		return nil
	}
	if err := s.wal.failure(); err != nil {
		return err
	}
	covers := s.wal.now()
	if err := s.db.LogData(nil, pebble.Sync); err != nil {
		return s.notDurable(err)
	}
	if err := s.wal.failure(); err != nil {
		return err
	}
	s.wal.done(covers)
	return nil
}

// lazily applies one batch without an fsync of its own.
func (s *Store) lazily(b *pebble.Batch) error {
	_, err := s.wal.apply(func() error { return s.db.Apply(b, pebble.NoSync) })
	return err
}

// stager collects nodes into one batch. It is used under sweeping.RLock, from its first add until apply.
type stager struct {
	s     *Store
	b     *pebble.Batch
	fresh map[Hash]bool // staged here: is it complete?
	now   time.Time
	pin   bool
	nodes int64
	bytes int64
}

// newStager begins a batch; pin says whether each node is pinned, taking over the pins of those it links to.
func (s *Store) newStager(pin bool) *stager { return s.newStagerOf(pin, 0) }

// newStagerOf is newStager for about so many bytes of nodes.
func (s *Store) newStagerOf(pin bool, size int) *stager {
	b := s.db.NewBatch()
	if size > 0 {
		b = s.db.NewBatchWithSize(size + size/8 + 4<<10)
	}
	return &stager{s: s, b: b, fresh: map[Hash]bool{}, now: time.Now(), pin: pin}
}

// add stages an encoding that came from elsewhere.
func (st *stager) add(enc []byte) (h Hash, complete bool, err error) {
	n, err := decodeNode(enc)
	if err != nil {
		return Hash{}, false, err
	}
	return st.addNode(&n, enc)
}

// addNode stages a node and reports whether it is complete with it.
func (st *stager) addNode(n *Node, enc []byte) (h Hash, complete bool, err error) {
	h = hashOf(enc)
	complete, err = st.addHashed(n, h, len(enc))
	return h, complete, err
}

// addHashed is addNode for a node whose hash and size are known.
func (st *stager) addHashed(n *Node, h Hash, size int) (complete bool, err error) {
	if done, ok := st.fresh[h]; ok {
		return done, nil
	}
	complete, err = st.complete(n.Links)
	if err != nil {
		return false, err
	}
	have, err := st.s.has(h)
	if err != nil {
		return false, err
	}
	st.fresh[h] = complete
	if !have {
		if err := st.set(n, h, size); err != nil {
			return false, err
		}
	}
	if complete && len(n.Links) > 0 {
		if err := st.b.Set(st.s.key(completeKey, h), nil, nil); err != nil {
			return false, err
		}
	}
	st.s.pins.put(h, n.Links, st.pin)
	return complete, nil
}

func (st *stager) set(n *Node, h Hash, size int) error {
	if err := st.b.Set(st.s.key(headKey, h), appendHeadValue(n, size, st.now), nil); err != nil {
		return err
	}
	st.nodes++
	st.bytes += int64(size)
	if len(n.Data) == 0 {
		return nil
	}
	return st.b.Set(st.s.key(dataKey, h), n.Data, nil)
}

// complete reports whether all links lead to complete nodes.
func (st *stager) complete(links []Link) (bool, error) {
	for _, l := range links {
		if done, ok := st.fresh[l.Hash]; ok {
			if !done {
				return false, nil
			}
			continue
		}
		done, err := st.s.isComplete(l.Hash)
		if err != nil || !done {
			return false, err
		}
	}
	return true, nil
}

// apply makes the batch visible. The function returned waits until it, and all that was applied before, is on disk; it must be called.
func (st *stager) apply() (synced func() error, err error) {
	if planted.Bug("ack-unsynced") {
		return func() error { return nil }, st.applyLazily()
	}
	s, b := st.s, st.b
	if b.Empty() {
		st.drop()
		n := s.wal.now()
		return func() error { return s.durable(n) }, nil
	}
	n, err := s.wal.apply(func() error { return s.db.ApplyNoSyncWait(b, pebble.Sync) })
	if err != nil {
		return nil, err
	}
	s.stats.add(st.nodes, st.bytes)
	return func() error {
		err := b.SyncWait()
		if err != nil { // Pebble itself says no more about it
			return errors.Join(s.notDurable(err), b.Close())
		}
		if err := s.wal.failure(); err != nil {
			return errors.Join(err, b.Close())
		}
		s.wal.done(n)
		return b.Close()
	}, nil
}

// applyLazily makes the batch visible without waiting for, or asking for, an fsync of its own.
func (st *stager) applyLazily() error {
	if st.b.Empty() {
		st.drop()
		return nil
	}
	if err := st.s.lazily(st.b); err != nil {
		return err
	}
	st.s.stats.add(st.nodes, st.bytes)
	return st.b.Close()
}

// drop gives up a batch that was not applied.
func (st *stager) drop() {
	if st.b != nil {
		// Closing a batch only returns its memory.
		_ = st.b.Close()
		st.b = nil
	}
}
