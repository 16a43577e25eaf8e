package state

import (
	"cmp"
	"container/list"
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/RaduBerinde/btreemap"

	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// entryOverhead is what a remembered reply or low-water mark costs besides its bytes; measured roughly, counted always.
const entryOverhead = 160

// callKey orders the dedupe table by caller and number, so that "below the low-water mark" is one range. A plain key is a caller without number.
type callKey struct {
	caller   string
	numbered bool
	n        uint64
}

func compareCallKeys(a, b callKey) int {
	if c := strings.Compare(a.caller, b.caller); c != 0 {
		return c
	}
	if a.numbered != b.numbered {
		if a.numbered {
			return 1
		}
		return -1
	}
	return cmp.Compare(a.n, b.n)
}

// parseKey reads "<caller>/<n>"; anything else, also a number with a sign or leading zeros, is a plain key.
func parseKey(key string) callKey {
	i := strings.LastIndexByte(key, '/')
	if i > 0 && i < len(key)-1 && (key[i+1] >= '1' && key[i+1] <= '9' || key[i+1:] == "0") {
		if n, err := strconv.ParseUint(key[i+1:], 10, 64); err == nil {
			return callKey{caller: key[:i], numbered: true, n: n}
		}
	}
	return callKey{caller: key}
}

// Numbered splits a key "<caller>/<n>"; ok is false for a plain key.
func Numbered(key string) (caller string, n uint64, ok bool) {
	k := parseKey(key)
	return k.caller, k.n, k.numbered
}

// Call names a call for the dedupe table. Without a Key the call is not remembered.
type Call struct {
	Key         string
	Low         uint64 // the caller's low-water mark; 0 = not told
	Fingerprint uint64 // of method and request
}

// Ticket is the right to execute one call. Done must be called exactly once, after Commit or instead of it.
type Ticket struct {
	call Call
	key  callKey
	done func()
}

// Done lets others with the same key go on.
func (t *Ticket) Done() { t.done() }

// Admit asks whether a mutating call may run. It returns a ticket, or the remembered reply of an earlier one with the same key, or why not:
// ErrAnswered, ErrKeyReused, ErrTableFull, ErrBacklog, or the context's error while it waits for another call with the same key.
func (s *Store) Admit(ctx context.Context, call Call) (*Ticket, *statev1.Reply, error) {
	if len(call.Key) > MaxKeyBytes {
		return nil, nil, tooLarge("idempotency key", len(call.Key), MaxKeyBytes)
	}
	key := parseKey(call.Key)
	for {
		ticket, reply, wait, err := s.admitOnce(call, key)
		if wait == nil {
			return ticket, reply, err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, nil, context.Cause(ctx)
		}
	}
}

func (s *Store) admitOnce(call Call, key callKey) (*Ticket, *statev1.Reply, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if call.Key == "" {
		if s.journal.backlog() > s.limits.BacklogBytes {
			return nil, nil, nil, ErrBacklog
		}
		return &Ticket{done: func() {}}, nil, nil, nil
	}
	if low, ok := s.cur.low(key); ok && key.n < low {
		return nil, nil, nil, ErrAnswered
	}
	if _, reply, ok := s.cur.replies.Get(key); ok {
		s.ages.touch(key)
		if reply.GetFingerprint() != call.Fingerprint {
			return nil, nil, nil, ErrKeyReused
		}
		return nil, reply, nil, nil
	}
	if busy, ok := s.inflight[call.Key]; ok {
		return nil, nil, busy, nil
	}
	if s.journal.backlog() > s.limits.BacklogBytes {
		return nil, nil, nil, ErrBacklog
	}
	if s.cur.dedupe >= s.limits.DedupeBytes && !s.ages.anyExpired(s.limits) && !s.frees(key, call.Low) {
		return nil, nil, nil, ErrTableFull
	}
	s.ages.refresh(key)
	busy := make(chan struct{})
	s.inflight[call.Key] = busy
	return &Ticket{call: call, key: key, done: func() { s.finish(call.Key, busy) }}, nil, nil, nil
}

// frees reports whether the caller's low-water mark would let go of something.
func (s *Store) frees(key callKey, low uint64) bool {
	if !key.numbered || low == 0 {
		return false
	}
	for range s.cur.replies.Ascend(btreemap.GE(callKey{caller: key.caller, numbered: true}), btreemap.LT(callKey{caller: key.caller, numbered: true, n: low})) {
		return true
	}
	return false
}

func (s *Store) finish(key string, busy chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inflight[key] == busy {
		delete(s.inflight, key)
		close(busy)
	}
}

func (v *version) low(key callKey) (uint64, bool) {
	if !key.numbered {
		return 0, false
	}
	_, low, ok := v.lows.Get(key.caller)
	return low, ok
}

func replyCost(r *statev1.Reply) int64 {
	n := len(r.GetKey()) + len(r.GetBody()) + entryOverhead
	for _, h := range r.GetHeaders() {
		n += len(h.GetName()) + len(h.GetValue())
	}
	return int64(n)
}

func (v *version) putReply(r *statev1.Reply) {
	_, old, replaced := v.replies.ReplaceOrInsert(parseKey(string(r.GetKey())), r)
	if replaced {
		v.dedupe -= replyCost(old)
	}
	v.dedupe += replyCost(r)
}

func (v *version) dropReply(k callKey) {
	if _, old, ok := v.replies.Delete(k); ok {
		v.dedupe -= replyCost(old)
	}
}

// setLow raises a caller's low-water mark and lets go of what is below it.
func (v *version) setLow(caller string, n uint64) {
	_, old, had := v.lows.Get(caller)
	if had && old >= n {
		return
	}
	if !had {
		v.dedupe += int64(len(caller)) + entryOverhead
	}
	v.lows.ReplaceOrInsert(caller, n)
	v.dropRange(caller, n)
}

func (v *version) dropRange(caller string, below uint64) {
	var gone []callKey
	for k := range v.replies.Ascend(btreemap.GE(callKey{caller: caller, numbered: true}), btreemap.LT(callKey{caller: caller, numbered: true, n: below})) {
		gone = append(gone, k)
	}
	for _, k := range gone {
		v.dropReply(k)
	}
}

func (v *version) forgetCaller(caller string) {
	v.dropRange(caller, ^uint64(0))
	v.dropReply(callKey{caller: caller, numbered: true, n: ^uint64(0)})
	if _, _, ok := v.lows.Delete(caller); ok {
		v.dedupe -= int64(len(caller)) + entryOverhead
	}
}

// ages remembers, by this process's clock, when plain keys and callers were last seen; oldest first. It is not part of the state.
type ages struct {
	order [2]*list.List // of agedKey: plain keys, callers
	index [2]map[string]*list.Element
}

type agedKey struct {
	name string
	seen time.Time
}

const (
	plainKeys = 0
	callers   = 1
)

func (a *ages) reset() {
	for i := range a.order {
		a.order[i], a.index[i] = list.New(), map[string]*list.Element{}
	}
}

func (a *ages) touch(k callKey) {
	class := plainKeys
	if k.numbered {
		class = callers
	}
	now := time.Now()
	if e, ok := a.index[class][k.caller]; ok {
		e.Value = agedKey{k.caller, now}
		a.order[class].MoveToBack(e)
		return
	}
	a.index[class][k.caller] = a.order[class].PushBack(agedKey{k.caller, now})
}

// refresh is touch for what is known already: a caller that calls is not silent, even when this call fails.
func (a *ages) refresh(k callKey) {
	if _, ok := a.index[callers][k.caller]; ok && k.numbered {
		a.touch(k)
	}
}

func (a *ages) forget(class int, name string) {
	if e, ok := a.index[class][name]; ok {
		a.order[class].Remove(e)
		delete(a.index[class], name)
	}
}

func (a *ages) anyExpired(l Limits) bool {
	return len(a.expired(plainKeys, l.KeyAge, 1)) > 0 || len(a.expired(callers, l.CallerAge, 1)) > 0
}

// expired lists up to max names of a class that were not seen for age.
func (a *ages) expired(class int, age time.Duration, limit int) []string {
	var out []string
	now := time.Now()
	for e := a.order[class].Front(); e != nil && len(out) < limit; e = e.Next() {
		k, ok := e.Value.(agedKey)
		if !ok || now.Sub(k.seen) < age {
			break
		}
		out = append(out, k.name)
	}
	return out
}

// Absorb has the store remember what another one remembers of calls: replies that it has not itself, low-water marks, and how far the component's own
// calls are numbered. It counts as a change: the mark rises above both stores', without a journal entry, so what comes next is a full checkpoint.
// It is for stores that nobody else uses yet; the other one stays as it is.
func (s *Store) Absorb(other *Store) {
	from := other.snapshot()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range from.replies.Ascend(allCalls()) {
		k := parseKey(string(r.GetKey()))
		if low, ok := s.cur.low(k); ok && k.n < low {
			continue
		}
		if _, _, ok := s.cur.replies.Get(k); !ok {
			s.cur.putReply(r)
			s.ages.touch(k)
		}
	}
	for caller, n := range from.lows.Ascend(allStrings()) {
		s.cur.setLow(caller, n)
	}
	s.cur.nextCall = max(s.cur.nextCall, from.nextCall)
	s.cur.mark = max(s.cur.mark, from.mark) + 1 // no reply is of a later mark than the state that holds it
	s.snap = nil
	s.journal.reset(s.cur.mark)
}
