package state

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// forgetBatch bounds how many aged keys one commit lets go of when the table is not full.
const forgetBatch = 64

// Commit ends a write transaction: its writes and, for a ticket with a key, the reply become one journal entry, whose mark it returns. Without writes
// and without a key there is no entry and the mark is the observed one. On an error nothing has happened and nothing is remembered. reply may be nil for
// a ticket without a key; its key, mark and fingerprint are filled in.
func (s *Store) Commit(ctx context.Context, t *Txn, ticket *Ticket, reply *statev1.Reply) (uint64, error) {
	keyed := ticket != nil && ticket.call.Key != ""
	if keyed && t.readOnly {
		return 0, fmt.Errorf("a reply can be remembered by a write transaction only: %w", ErrReadOnly)
	}
	if keyed {
		if err := s.Begin(ctx, t); err != nil {
			s.Rollback(t)
			return 0, err
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	defer s.release(t)
	if t.err != nil {
		return 0, t.err
	}
	if t.ended {
		return 0, ErrEnded
	}
	if t.readOnly || !t.begun {
		return t.mark, nil
	}
	return s.commit(t, ticket, keyed, reply)
}

// commit builds the entry and makes it the newest version; t.mu and the write token are held, so cur's mark cannot move.
func (s *Store) commit(t *Txn, ticket *Ticket, keyed bool, reply *statev1.Reply) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entry := &statev1.Entry{Mark: s.cur.mark + 1, Schema: t.schema, Ops: t.ops}
	if t.nextCall != s.cur.nextCall {
		entry.NextCall = t.nextCall
	}
	if !keyed && len(t.ops) == 0 && entry.NextCall == 0 && t.schema == s.cur.schema {
		return t.mark, nil
	}
	if keyed {
		if reply == nil {
			reply = &statev1.Reply{}
		}
		reply.Key, reply.Mark, reply.Fingerprint = []byte(ticket.call.Key), entry.Mark, ticket.call.Fingerprint
		if n := t.bytes + len(reply.Body); n > MaxTxnBytes {
			return 0, tooLarge("transaction with its reply", n, MaxTxnBytes)
		}
		if ticket.key.numbered && ticket.call.Low > 0 {
			entry.Low = &statev1.Low{Caller: []byte(ticket.key.caller), N: ticket.call.Low}
		}
		entry.Reply = reply
		if err := s.makeRoom(entry); err != nil {
			return 0, err
		}
	}
	body, err := encodeEntry(entry)
	if err != nil {
		return 0, err
	}
	s.cur.pairs = t.work
	s.cur.pairBytes += t.grown
	s.cur.applyDedupe(entry)
	s.cur.mark, s.cur.schema = entry.Mark, entry.Schema
	s.snap = nil
	if entry.NextCall != 0 {
		s.calls = append(s.calls, callsAt{entry.Mark, entry.NextCall})
	}
	s.noteAges(entry)
	s.journal.append(JournalEntry{Mark: entry.Mark, Schema: entry.Schema, Body: body}, s.limits.JournalBytes)
	return entry.Mark, nil
}

// encodeEntry leaves the reply's mark out: it is the entry's, and a reply must not say another.
func encodeEntry(e *statev1.Entry) ([]byte, error) {
	mark := e.GetMark()
	if e.Reply != nil {
		e.Reply.Mark = 0
		defer func() { e.Reply.Mark = mark }()
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("encode journal entry %d: %w", mark, err)
	}
	return b, nil
}

// makeRoom adds to the entry which aged keys are forgotten, and refuses when the reply does not fit all the same.
func (s *Store) makeRoom(e *statev1.Entry) error {
	for _, name := range s.ages.expired(callers, s.limits.CallerAge, forgetBatch) {
		e.ForgetCallers = append(e.ForgetCallers, []byte(name))
	}
	limit := forgetBatch
	need := s.cur.dedupe + replyCost(e.GetReply()) - s.limits.DedupeBytes
	if low := e.GetLow(); low != nil {
		need += int64(len(low.GetCaller())) + entryOverhead
	}
	if need > 0 {
		need -= s.freedBy(e)
		limit += int(max(need, 0)/entryOverhead) + 1
	}
	for _, name := range s.ages.expired(plainKeys, s.limits.KeyAge, limit) {
		e.ForgetKeys = append(e.ForgetKeys, []byte(name))
		if _, old, ok := s.cur.replies.Get(callKey{caller: name}); ok {
			need -= replyCost(old)
		}
	}
	if need > 0 {
		return ErrTableFull
	}
	return nil
}

// freedBy is what the entry's low-water mark and forgotten callers give back.
func (s *Store) freedBy(e *statev1.Entry) int64 {
	if e.GetLow() == nil && len(e.GetForgetCallers()) == 0 {
		return 0
	}
	probe := *s.cur
	probe.replies, probe.lows = s.cur.replies.Clone(), s.cur.lows.Clone()
	before := probe.dedupe
	for _, c := range e.GetForgetCallers() {
		probe.forgetCaller(string(c))
	}
	if low := e.GetLow(); low != nil {
		probe.setLow(string(low.GetCaller()), low.GetN())
	}
	return before - probe.dedupe
}

// applyDedupe carries out everything of an entry but its ops, mark and schema.
func (v *version) applyDedupe(e *statev1.Entry) {
	for _, k := range e.GetForgetKeys() {
		v.dropReply(callKey{caller: string(k)})
	}
	for _, c := range e.GetForgetCallers() {
		v.forgetCaller(string(c))
	}
	if low := e.GetLow(); low != nil {
		v.setLow(string(low.GetCaller()), low.GetN())
	}
	if r := e.GetReply(); r != nil {
		r.Mark = e.GetMark()
		v.putReply(r)
	}
	if e.GetNextCall() != 0 {
		v.nextCall = e.GetNextCall()
	}
}

// apply carries out a whole entry on a staged version.
func (v *version) apply(e *statev1.Entry) {
	for _, op := range e.GetOps() {
		if op.GetDelete() {
			grown, _ := deletePair(v.pairs, string(op.GetKey()))
			v.pairBytes += grown
		} else {
			v.pairBytes += putPair(v.pairs, string(op.GetKey()), op.GetValue())
		}
	}
	v.applyDedupe(e)
	v.mark, v.schema = e.GetMark(), e.GetSchema()
}

func (s *Store) noteAges(e *statev1.Entry) {
	for _, k := range e.GetForgetKeys() {
		s.ages.forget(plainKeys, string(k))
	}
	for _, c := range e.GetForgetCallers() {
		s.ages.forget(callers, string(c))
	}
	if r := e.GetReply(); r != nil {
		s.ages.touch(parseKey(string(r.GetKey())))
	}
}
