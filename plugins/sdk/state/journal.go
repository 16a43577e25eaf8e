package state

import (
	"context"
	"fmt"
)

// JournalEntry is one transaction as it is copied elsewhere. Body is an encoded statev1.Entry and must not be changed.
type JournalEntry struct {
	Mark   uint64
	Schema uint32
	Body   []byte
}

// journal is the tail of the entries: bounded for those who may come back, unbounded never (see Store.Admit and ErrBacklog).
type journal struct {
	entries   []JournalEntry // contiguous marks; entries[0] may be any
	first     uint64         // mark of entries[0], or the next mark when empty
	bytes     int64
	total     int64 // bytes of all entries ever appended; Follower.read counts in the same measure
	followers map[*Follower]struct{}
	changed   chan struct{} // closed at the next append, made when someone waits
}

func (j *journal) reset(mark uint64) {
	if j.changed != nil {
		close(j.changed)
	}
	*j = journal{first: mark + 1, followers: map[*Follower]struct{}{}}
}

func (j *journal) last() uint64 { return j.first + uint64(len(j.entries)) - 1 }

func (j *journal) append(e JournalEntry, bound int64) {
	j.entries = append(j.entries, e)
	j.bytes += int64(len(e.Body))
	j.total += int64(len(e.Body))
	if j.changed != nil {
		close(j.changed)
		j.changed = nil
	}
	j.trim(bound)
}

// trim drops the oldest entries beyond the bound, but none that an attached follower has not read.
func (j *journal) trim(bound int64) {
	keep := j.last() + 1
	for f := range j.followers {
		keep = min(keep, f.next)
	}
	drop := 0
	for drop < len(j.entries)-1 && j.bytes > bound && j.entries[drop].Mark < keep {
		j.bytes -= int64(len(j.entries[drop].Body))
		drop++
	}
	if drop == 0 {
		return
	}
	clear(j.entries[:drop])
	j.entries = j.entries[drop:]
	j.first += uint64(drop)
}

func (j *journal) backlog() int64 {
	var most int64
	for f := range j.followers {
		most = max(most, j.total-f.read)
	}
	return most
}

// since returns the entries after mark, without copying bodies.
func (j *journal) since(mark uint64) ([]JournalEntry, error) {
	switch {
	case mark > j.last():
		return nil, fmt.Errorf("mark %d, newest %d: %w", mark, j.last(), ErrFuture)
	case mark+1 < j.first:
		return nil, fmt.Errorf("mark %d, oldest entry %d: %w", mark, j.first, ErrGone)
	}
	return append([]JournalEntry(nil), j.entries[mark+1-j.first:]...), nil
}

// Follower reads journal entries as they are written. While it is open the entries it has not read are kept.
type Follower struct {
	store *Store
	life  uint64
	next  uint64 // guarded by store.mu
	read  int64  // guarded by store.mu: journal.total at next
}

// Follow starts reading after mark. ErrGone: the entries are no longer there. ErrFuture: there was never such a mark here.
func (s *Store) Follow(mark uint64) (*Follower, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ahead, err := s.journal.since(mark)
	if err != nil {
		return nil, err
	}
	f := &Follower{store: s, life: s.life, next: mark + 1, read: s.journal.total}
	for _, e := range ahead {
		f.read -= int64(len(e.Body))
	}
	s.journal.followers[f] = struct{}{}
	return f, nil
}

// Next returns the next entry, waiting for it. It ends with the context's error, or ErrFollowerUp after a restore.
func (f *Follower) Next(ctx context.Context) (JournalEntry, error) {
	for {
		e, ok, wait, err := f.poll()
		if ok || err != nil {
			return e, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return JournalEntry{}, context.Cause(ctx)
		}
	}
}

func (f *Follower) poll() (JournalEntry, bool, <-chan struct{}, error) {
	s := f.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.life != s.life {
		return JournalEntry{}, false, nil, ErrFollowerUp
	}
	if f.next <= s.journal.last() {
		e := s.journal.entries[f.next-s.journal.first]
		f.next++
		f.read += int64(len(e.Body))
		return e, true, nil, nil
	}
	if s.journal.changed == nil {
		s.journal.changed = make(chan struct{})
	}
	return JournalEntry{}, false, s.journal.changed, nil
}

// Close detaches the follower; entries it has not read may then be dropped.
func (f *Follower) Close() {
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	delete(f.store.journal.followers, f)
}
