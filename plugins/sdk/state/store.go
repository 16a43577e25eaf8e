package state

import (
	"strings"
	"sync"
	"time"

	"github.com/RaduBerinde/btreemap"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// degree of the B-trees: nodes of at most 31 items, so that the copy a write makes of its path stays at a few KiB.
const degree = 16

// version is one state. Once it was handed out (Store.snapshot) it is never changed; Store.cur, which nobody else sees, is.
type version struct {
	mark     uint64
	schema   uint32
	pairs    *btreemap.BTreeMap[string, []byte]
	replies  *btreemap.BTreeMap[callKey, *statev1.Reply]
	lows     *btreemap.BTreeMap[string, uint64]
	nextCall uint64
	dedupe   int64 // bytes accounted to replies and lows

	pairBytes int64 // encoded size of pairs in a checkpoint
}

// putPair sets a key and returns by how much the encoded size of the map grows.
func putPair(m *btreemap.BTreeMap[string, []byte], key string, value []byte) int64 {
	_, old, replaced := m.ReplaceOrInsert(key, value)
	if replaced {
		return pairCost(key, value) - pairCost(key, old)
	}
	return pairCost(key, value)
}

// deletePair is the counterpart of putPair; ok is whether the key was there.
func deletePair(m *btreemap.BTreeMap[string, []byte], key string) (grown int64, ok bool) {
	_, old, ok := m.Delete(key)
	if !ok {
		return 0, false
	}
	return -pairCost(key, old), true
}

func pairCost(key string, value []byte) int64 {
	return int64(protowire.SizeBytes(pairSize(key, value)))
}

func newVersion(schema uint32) *version {
	return &version{
		schema:   schema,
		pairs:    btreemap.New[string, []byte](degree, strings.Compare),
		replies:  btreemap.New[callKey, *statev1.Reply](degree, compareCallKeys),
		lows:     btreemap.New[string, uint64](degree, strings.Compare),
		nextCall: 1,
	}
}

// clone is lazy: it shares all nodes until one side writes. Not to be called concurrently on the same version.
func (v *version) clone() *version {
	c := *v
	c.pairs, c.replies, c.lows = v.pairs.Clone(), v.replies.Clone(), v.lows.Clone()
	return &c
}

// Store is the state of one component instance. Make one with New.
type Store struct {
	limits Limits
	writer chan struct{} // holds one token: whoever has it is the write transaction

	mu       sync.Mutex // guards everything below
	cur      *version
	snap     *version                 // clone of cur for readers; nil when cur has moved on
	inflight map[string]chan struct{} // keys being executed; closed when done
	ages     ages
	journal  journal
	durable  uint64    // newest mark known to be committed elsewhere
	life     uint64    // +1 with each restore
	calls    []callsAt // next call numbers whose marks are not durable yet, oldest first
	callLow  uint64    // every number below it was taken by a transaction that is durable
	holder   holder
}

// holder says who has the write token, for those who look for a hang.
type holder struct {
	name  string
	since time.Time
}

// callsAt says that from mark on the next call number is next.
type callsAt struct{ mark, next uint64 }

// New returns an empty store whose map is of the given schema (the author's number for the meaning of keys and values).
func New(schema uint32, limits Limits) *Store {
	s := &Store{
		limits:   limits.withDefaults(),
		writer:   make(chan struct{}, 1),
		cur:      newVersion(schema),
		inflight: map[string]chan struct{}{},
		callLow:  1,
	}
	s.writer <- struct{}{}
	s.ages.reset()
	s.journal.reset(0)
	return s
}

// Mark returns the number of the newest journal entry; 0 is the empty state.
func (s *Store) Mark() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur.mark
}

// Schema returns the schema of what the map holds now.
func (s *Store) Schema() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur.schema
}

// SetDurable tells the store that all entries up to mark are committed elsewhere. Marks never go back; one beyond the newest entry is ignored.
func (s *Store) SetDurable(mark uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if mark > s.durable && mark <= s.cur.mark {
		s.durable = mark
		for len(s.calls) > 0 && s.calls[0].mark <= mark {
			s.callLow = s.calls[0].next
			s.calls = s.calls[1:]
		}
	}
}

// CallLow returns the low-water mark of the component's own calls: every smaller number belongs to a transaction that is committed elsewhere, so no
// restore will make that call again.
func (s *Store) CallLow() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.callLow
}

// Stats are figures for people and for hang detection.
type Stats struct {
	Mark, Durable  uint64
	Pairs, Replies int
	StateBytes     int64 // of the map, as a checkpoint writes it
	DedupeBytes    int64
	JournalBytes   int64
	BacklogBytes   int64     // unread by the slowest follower
	Writer         string    // the transaction that holds the state, "" = none
	WriterSince    time.Time // since when
}

// Stats returns the figures of this moment.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		Mark: s.cur.mark, Durable: s.durable,
		Pairs: s.cur.pairs.Len(), Replies: s.cur.replies.Len(),
		StateBytes: s.cur.pairBytes, DedupeBytes: s.cur.dedupe, JournalBytes: s.journal.bytes, BacklogBytes: s.journal.backlog(),
		Writer: s.holder.name, WriterSince: s.holder.since,
	}
}

func (s *Store) snapshot() *version {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshotLocked()
}

func (s *Store) snapshotLocked() *version {
	if s.snap == nil {
		s.snap = s.cur.clone()
	}
	return s.snap
}
