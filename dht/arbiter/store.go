package arbiter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// Keys of the raft database.
const (
	keyDisk   = "i"  // ArbiterDisk
	keyCommit = "c"  // highest index known to be committed
	keyRecall = "v"  // ArbiterRecall
	preRecall = "v/" // + key: a register of what a node outside of the group shows
	preStable = "k/" // raft's stable store
	preLog    = "l/" // + index: entries
	preMeta   = "m/" // + index, term, serial: published snapshots
	preChunk  = "s/" // + the same, + number: their contents
)

const (
	diskFormat = 1
	cachedLogs = 1024
)

// errNoKey is what raft compares with by its text.
var errNoKey = errors.New("not found")

// errDiskClosed is what those are told who come after Close: a peer's call may still be answered while the node ends.
var errDiskClosed = errors.New("the raft database is closed")

// disk is the raft database: log, stable store, snapshots and the node's label, in one small Pebble. What raft was promised is synced
// before the call returns.
type disk struct {
	db    *pebble.DB
	guard *guard // every write goes through it
	// committed tells how far the log is known to be committed; written beside entries, so that a restarted node sees its own state
	// before it meets a leader.
	committed func() uint64

	// labels has one entry while the incarnations are changed. A channel and no mutex: who waits for it waits for a disk, and must not keep virtual time
	// from going on.
	labels chan struct{}

	life sync.RWMutex // held, shared, by whoever uses db
	gone atomic.Bool  // it is closed, or will be soon: Pebble answers those who use it then with a panic

	mu          sync.RWMutex // guards the rest
	first, last uint64       // of the log; 0: empty
	cache       [cachedLogs]*raft.Log
	serial      uint64 // of snapshots
	label       *wirev1.ArbiterDisk
}

var (
	_ raft.LogStore      = (*disk)(nil)
	_ raft.StableStore   = (*disk)(nil)
	_ raft.SnapshotStore = (*disk)(nil)
)

// openDisk opens or makes the database in dir.
func openDisk(fs vfs.FS, dir string, log *slog.Logger) (*disk, error) {
	cache := pebble.NewCache(2 << 20)
	defer cache.Unref()
	d := &disk{guard: newGuard(log), labels: make(chan struct{}, 1), committed: func() uint64 { return 0 }}
	if err := d.guard.do(func() (err error) {
		d.db, err = pebble.Open(dir, &pebble.Options{
			FS: fs, Cache: cache, MemTableSize: 2 << 20, FormatMajorVersion: pebble.FormatColumnarBlocks, MaxOpenFiles: 64,
			Logger: d.guard, EventListener: &pebble.EventListener{WALCreated: d.guard.walCreated},
		})
		return err
	}); err != nil {
		return nil, fmt.Errorf("open the raft database %s: %w", dir, err)
	}
	if err := errors.Join(d.findEnds(), d.readLabel(), d.cleanSnapshots()); err != nil {
		return nil, errors.Join(fmt.Errorf("read the raft database %s: %w", dir, err), d.guard.do(d.db.Close))
	}
	return d, nil
}

// promised is how what raft was promised is written; bug names the planted one that forgets the fsync.
func promised(bug string) *pebble.WriteOptions {
	if planted.Bug(bug) {
		return pebble.NoSync
	}
	return pebble.Sync
}

// Close waits for a label that is being written; none is written afterwards. Raft has ended.
func (d *disk) Close() error {
	d.labels <- struct{}{}
	defer func() { <-d.labels }()
	if d.gone.Swap(true) || d.guard.failure() != nil {
		return nil // the failure was said before; what holds its locks has ended, and it would wait for that for ever
	}
	return d.guard.do(func() error {
		d.life.Lock()
		defer d.life.Unlock()
		return d.db.Close()
	})
}

// use runs what reads from the database, if that is still open. It is not to be called from within itself.
func (d *disk) use(f func() error) error {
	d.life.RLock()
	defer d.life.RUnlock()
	if d.gone.Load() {
		return errDiskClosed
	}
	return f()
}

// write is guard.do, if the database is still open.
func (d *disk) write(f func() error) error {
	return d.use(func() error { return d.guard.do(f) })
}

func numbered(prefix string, ns ...uint64) []byte {
	b := []byte(prefix)
	for _, n := range ns {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	return b
}

// after is the first key behind all that begin with prefix.
func after(prefix string) []byte {
	b := []byte(prefix)
	b[len(b)-1]++
	return b
}

func (d *disk) findEnds() error {
	return d.use(func() error {
		it, err := d.db.NewIter(&pebble.IterOptions{LowerBound: []byte(preLog), UpperBound: after(preLog)})
		if err != nil {
			return err
		}
		if it.First() {
			d.first = binary.BigEndian.Uint64(it.Key()[len(preLog):])
		}
		if it.Last() {
			d.last = binary.BigEndian.Uint64(it.Key()[len(preLog):])
		}
		return it.Close()
	})
}

func (d *disk) readLabel() error {
	b, err := d.get([]byte(keyDisk))
	if err != nil || b == nil {
		return err
	}
	d.label = new(wirev1.ArbiterDisk)
	if err := proto.Unmarshal(b, d.label); err != nil {
		return fmt.Errorf("label of the database: %w", err)
	}
	return nil
}

func (d *disk) writeLabel(l *wirev1.ArbiterDisk) error {
	b, err := proto.Marshal(l)
	if err != nil {
		return err
	}
	if err := d.write(func() error { return d.db.Set([]byte(keyDisk), b, pebble.Sync) }); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.label = l
	return nil
}

// boots counts this node's starts on this disk.
func (d *disk) boots() uint64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.label.GetBoots()
}

// settled says whether this node was in the group for Timings.Settle, in any of its lives.
func (d *disk) settled() bool {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.label.GetSettled()
}

// settleDown notes that it was.
func (d *disk) settleDown() error {
	if d.settled() {
		return nil
	}
	d.labels <- struct{}{}
	defer func() { <-d.labels }()
	if d.gone.Load() {
		return nil
	}
	d.mu.RLock()
	l := proto.CloneOf(d.label)
	d.mu.RUnlock()
	l.Settled = true
	if err := d.writeLabel(l); err != nil {
		return fmt.Errorf("label the raft database: %w", err)
	}
	return nil
}

// wipe empties log, stable store and snapshots in one step, after which the disk is of no incarnation. What it has met stays.
func (d *disk) wipe() error {
	d.labels <- struct{}{}
	defer func() { <-d.labels }()
	_, seen := d.incarnations()
	d.mu.RLock()
	l := d.relabelled(incarnation{}, seen)
	d.mu.RUnlock()
	label, err := proto.Marshal(l)
	if err != nil {
		return err
	}
	b := d.db.NewBatch()
	err = errors.Join(b.Set([]byte(keyDisk), label, nil), b.Delete([]byte(keyCommit), nil), dropRecall(b))
	for _, pre := range []string{preStable, preLog, preMeta, preChunk} {
		err = errors.Join(err, b.DeleteRange([]byte(pre), after(pre), nil))
	}
	if err = errors.Join(err, d.write(func() error { return b.Commit(pebble.Sync) })); err != nil {
		return fmt.Errorf("empty the raft database: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.label = l
	d.first, d.last, d.cache = 0, 0, [cachedLogs]*raft.Log{}
	return nil
}

// get returns a copy of the value, nil when there is none.
func (d *disk) get(key []byte) ([]byte, error) {
	var out []byte
	err := d.use(func() error {
		v, closer, err := d.db.Get(key)
		if errors.Is(err, pebble.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		out = append([]byte{}, v...)
		return closer.Close()
	})
	return out, err
}

// ===== raft.LogStore =====

// ends returns the first and the last index of the log; 0, 0: it is empty.
func (d *disk) ends() (first, last uint64) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.first, d.last
}

// termOf returns the term of the entry at an index, from the log or the newest snapshot; 0: unknown.
func (d *disk) termOf(index uint64) uint64 {
	var l raft.Log
	if d.GetLog(index, &l) == nil {
		return l.Term
	}
	if snaps, err := d.List(); err == nil && len(snaps) > 0 && snaps[0].Index == index {
		return snaps[0].Term
	}
	return 0
}

// FirstIndex implements raft.LogStore.
func (d *disk) FirstIndex() (uint64, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.first, nil
}

// LastIndex implements raft.LogStore.
func (d *disk) LastIndex() (uint64, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.last, nil
}

// GetLog implements raft.LogStore.
func (d *disk) GetLog(index uint64, out *raft.Log) error {
	d.mu.RLock()
	l, first, last := d.cache[index%cachedLogs], d.first, d.last
	d.mu.RUnlock()
	if index < first || index > last || last == 0 {
		return raft.ErrLogNotFound
	}
	if l != nil && l.Index == index {
		*out = *l
		return nil
	}
	b, err := d.get(numbered(preLog, index))
	if err != nil {
		return fmt.Errorf("entry %d: %w", index, err)
	}
	if b == nil {
		return raft.ErrLogNotFound
	}
	return decodeLog(index, b, out)
}

// StoreLog implements raft.LogStore.
func (d *disk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore: the entries are durable on return.
func (d *disk) StoreLogs(logs []*raft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	b := d.db.NewBatch()
	for _, l := range logs {
		if err := b.Set(numbered(preLog, l.Index), encodeLog(l), nil); err != nil {
			return err
		}
	}
	if err := b.Set([]byte(keyCommit), numbered("", d.committed()), nil); err != nil {
		return err
	}
	if err := d.write(func() error { return b.Commit(promised("log-unsynced")) }); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range logs {
		d.cache[l.Index%cachedLogs] = l
		if d.first == 0 || l.Index < d.first {
			d.first = l.Index
		}
		d.last = max(d.last, l.Index)
	}
	return nil
}

// DeleteRange implements raft.LogStore. It need not be synced: a later synced write makes it durable too, and until then the old
// entries are what they were.
func (d *disk) DeleteRange(from, to uint64) error {
	if to == math.MaxUint64 {
		return fmt.Errorf("delete entries %d to %d: no such entry", from, to)
	}
	if err := d.write(func() error {
		return d.db.DeleteRange(numbered(preLog, from), numbered(preLog, to+1), pebble.NoSync)
	}); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, l := range d.cache {
		if l != nil && l.Index >= from && l.Index <= to {
			d.cache[i] = nil
		}
	}
	switch {
	case from <= d.first && to >= d.last:
		d.first, d.last = 0, 0
	case from <= d.first:
		d.first = max(d.first, to+1)
	case to >= d.last:
		d.last = min(d.last, from-1)
	}
	return nil
}

// markCommitted writes how far the log is committed, unsynced: losing it costs nothing but an older view after a restart.
func (d *disk) markCommitted(index uint64) error {
	return d.write(func() error { return d.db.Set([]byte(keyCommit), numbered("", index), pebble.NoSync) })
}

// knownCommitted returns the highest index that is known to be committed, never beyond the log.
func (d *disk) knownCommitted() (uint64, error) {
	b, err := d.get([]byte(keyCommit))
	if err != nil || len(b) != 8 {
		return 0, err
	}
	return min(binary.BigEndian.Uint64(b), d.last), nil
}

const logVersion = 1

func encodeLog(l *raft.Log) []byte {
	b := make([]byte, 0, 32+len(l.Data)+len(l.Extensions))
	b = append(b, logVersion, byte(l.Type))
	b = binary.AppendUvarint(b, l.Term)
	var at int64
	if !l.AppendedAt.IsZero() {
		at = l.AppendedAt.UnixNano()
	}
	b = binary.AppendVarint(b, at)
	b = binary.AppendUvarint(b, uint64(len(l.Extensions)))
	b = append(b, l.Extensions...)
	return append(b, l.Data...)
}

func decodeLog(index uint64, b []byte, out *raft.Log) error {
	bad := fmt.Errorf("entry %d on disk is damaged", index)
	if len(b) < 2 {
		return bad
	}
	if b[0] != logVersion {
		return fmt.Errorf("entry %d on disk has format %d, this build knows %d", index, b[0], logVersion)
	}
	l := raft.Log{Index: index, Type: raft.LogType(b[1])}
	b = b[2:]
	var n int
	if l.Term, n = binary.Uvarint(b); n <= 0 {
		return bad
	}
	b = b[n:]
	at, n := binary.Varint(b)
	if n <= 0 {
		return bad
	}
	if at != 0 {
		l.AppendedAt = time.Unix(0, at)
	}
	b = b[n:]
	ext, n := binary.Uvarint(b)
	if n <= 0 || ext > uint64(len(b)-n) {
		return bad
	}
	b = b[n:]
	if ext > 0 {
		l.Extensions = b[:ext:ext]
	}
	l.Data = b[ext:]
	*out = l
	return nil
}

// ===== raft.StableStore =====

// Set implements raft.StableStore, durable on return.
func (d *disk) Set(key, val []byte) error {
	return d.use(func() error {
		return d.guard.promise(func() error { return d.db.Set(append([]byte(preStable), key...), val, promised("vote-unsynced")) })
	})
}

// Get implements raft.StableStore.
func (d *disk) Get(key []byte) ([]byte, error) {
	b, err := d.get(append([]byte(preStable), key...))
	if err == nil && b == nil {
		return nil, errNoKey
	}
	return b, err
}

// SetUint64 implements raft.StableStore, durable on return.
func (d *disk) SetUint64(key []byte, n uint64) error { return d.Set(key, numbered("", n)) }

// GetUint64 implements raft.StableStore.
func (d *disk) GetUint64(key []byte) (uint64, error) {
	b, err := d.Get(key)
	if err != nil {
		return 0, err
	}
	if len(b) != 8 {
		return 0, fmt.Errorf("%s on disk has %d bytes instead of 8", key, len(b))
	}
	return binary.BigEndian.Uint64(b), nil
}
