package state

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// Restore replaces the state by what the frames say: full checkpoints, deltas and journal entries in any number, in order, until recv returns io.EOF.
// Entries that the state holds already are skipped; a gap, a torn stream or a wrong digest is a *CorruptError and changes nothing. schemas are those the
// program can read. It returns the payload's bytes and the new mark. The caller sees to it that no call runs meanwhile.
func (s *Store) Restore(recv func() (*componentv1.StateFrame, error), schemas []uint32) (bytes, mark uint64, err error) {
	s.mu.Lock()
	r := &restorer{v: s.cur.clone(), schemas: schemas}
	s.mu.Unlock()
	for {
		f, err := recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, 0, fmt.Errorf("restore: receive frame: %w", err)
		}
		if err := r.frame(f); err != nil {
			return 0, 0, err
		}
	}
	if err := r.complete(); err != nil {
		return 0, 0, err
	}
	s.install(r.v)
	return r.bytes, r.v.mark, nil
}

// install makes a restored version the current one. All ages start anew; followers have to begin again.
func (s *Store) install(v *version) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cur, s.snap, s.durable = v, nil, v.mark
	s.calls, s.callLow = nil, v.nextCall
	s.life++
	s.ages.reset()
	for k := range v.replies.Ascend(allCalls()) {
		s.ages.touch(k)
	}
	for caller := range v.lows.Ascend(allStrings()) {
		s.ages.touch(callKey{caller: caller, numbered: true})
	}
	s.journal.reset(v.mark)
}

// restorer takes frames one by one. It stages a version that becomes the state only when all of it has arrived.
type restorer struct {
	v       *version
	schemas []uint32
	bytes   uint64

	open    bool   // between a header and its end frame
	delta   bool   // of the open checkpoint
	header  uint64 // its mark
	total   uint64 // its payload, told
	got     uint64 // its payload, seen
	section string // being read; SectionHeader = none yet
	offset  uint64 // expected next
	entry   uint64 // mark of the journal entry being read
	buf     []byte // bytes of an unfinished record or entry
	owned   bool   // buf is ours to append to
	lastKey string
	pairs   int
}

func (r *restorer) fail(format string, args ...any) error {
	return &CorruptError{Section: r.section, Offset: r.offset, Why: fmt.Sprintf(format, args...)}
}

func (r *restorer) frame(f *componentv1.StateFrame) error {
	if f.GetXxh64() != Digest(f) {
		return &CorruptError{Section: f.GetSection(), Offset: f.GetOffset(), Why: "the digest does not match: the frame was damaged or cut off"}
	}
	if f.GetDeleted() {
		return r.fail("a deleted section: SDK state has none")
	}
	switch f.GetSection() {
	case componentv1.SectionHeader:
		return r.begin(f)
	case componentv1.SectionMap, componentv1.SectionDedupe:
		return r.records(f)
	case componentv1.SectionJournal:
		return r.journal(f)
	case componentv1.SectionEnd:
		return r.end(f)
	}
	return r.fail("unknown section %q: written by something that is not an SDK of this format", f.GetSection())
}

func (r *restorer) readable(schema uint32) error {
	if slices.Contains(r.schemas, schema) {
		return nil
	}
	return r.fail("schema %d: this version reads %v; restore it with a version that reads it", schema, r.schemas)
}

func (r *restorer) begin(f *componentv1.StateFrame) error {
	if r.open || len(r.buf) > 0 {
		return r.fail("a header inside another checkpoint or entry")
	}
	if err := r.readable(f.GetSchema()); err != nil {
		return err
	}
	r.open, r.delta = true, f.GetSinceMark() != 0
	r.header, r.total, r.got = f.GetMark(), f.GetTotalBytes(), 0
	r.section, r.offset = componentv1.SectionHeader, 0
	if r.delta {
		if f.GetSinceMark() > r.v.mark {
			return r.fail("a delta on top of mark %d, but the state is at %d: something between is missing", f.GetSinceMark(), r.v.mark)
		}
		return nil
	}
	r.v = newVersion(f.GetSchema())
	r.v.mark = f.GetMark()
	r.lastKey, r.pairs = "", 0
	return nil
}

// records takes a frame of section "map" or "dedupe".
func (r *restorer) records(f *componentv1.StateFrame) error {
	if !r.open || r.delta {
		return r.fail("a frame of section %q outside a full checkpoint", f.GetSection())
	}
	if f.GetSection() != r.section {
		if len(r.buf) > 0 {
			return r.fail("the section ends inside a record")
		}
		if r.section == componentv1.SectionDedupe {
			return r.fail("section %q after section dedupe", f.GetSection())
		}
		r.section, r.offset = f.GetSection(), 0
	}
	if err := r.take(f); err != nil {
		return err
	}
	take := r.pair
	if r.section == componentv1.SectionDedupe {
		take = r.dedupe
	}
	for {
		size, n := protowire.ConsumeVarint(r.buf)
		if n < 0 {
			if len(r.buf) >= 10 {
				return r.fail("a record's length is not a number")
			}
			return nil
		}
		if size > maxRecordBytes {
			return r.fail("a record of %d bytes, at most %d", size, maxRecordBytes)
		}
		if uint64(len(r.buf)-n) < size {
			return nil
		}
		if err := take(r.buf[n : n+int(size)]); err != nil {
			return err
		}
		r.buf = r.buf[n+int(size):]
	}
}

// take checks the frame's place in its stream and appends its data.
func (r *restorer) take(f *componentv1.StateFrame) error {
	if f.GetOffset() != r.offset {
		return r.fail("a frame at offset %d: one is missing or repeated", f.GetOffset())
	}
	if len(f.GetData()) == 0 {
		return r.fail("an empty frame")
	}
	r.offset += uint64(len(f.GetData()))
	r.got += uint64(len(f.GetData()))
	r.bytes += uint64(len(f.GetData()))
	switch {
	case len(r.buf) == 0:
		r.buf, r.owned = f.GetData(), false
	case !r.owned: // the rest of a frame's own slice: append to a copy, never in place
		r.buf, r.owned = append(slices.Clip(r.buf), f.GetData()...), true
	default:
		r.buf = append(r.buf, f.GetData()...)
	}
	return nil
}

func (r *restorer) pair(b []byte) error {
	var p statev1.Pair
	if err := proto.Unmarshal(b, &p); err != nil {
		return r.fail("not a pair: %v", err)
	}
	key := string(p.GetKey())
	if r.pairs > 0 && key <= r.lastKey {
		return r.fail("keys out of order")
	}
	r.lastKey = key
	r.pairs++
	r.v.pairBytes += putPair(r.v.pairs, key, p.GetValue())
	return nil
}

func (r *restorer) dedupe(b []byte) error {
	var d statev1.Dedupe
	if err := proto.Unmarshal(b, &d); err != nil {
		return r.fail("not a dedupe record: %v", err)
	}
	switch rec := d.GetRecord().(type) {
	case *statev1.Dedupe_Reply:
		if len(rec.Reply.GetKey()) == 0 || rec.Reply.GetMark() == 0 || rec.Reply.GetMark() > r.header {
			return r.fail("a remembered reply without a key, or with a mark that the checkpoint does not hold")
		}
		r.v.putReply(rec.Reply)
	case *statev1.Dedupe_Low:
		r.v.setLow(string(rec.Low.GetCaller()), rec.Low.GetN())
	case *statev1.Dedupe_NextCall:
		r.v.nextCall = max(1, rec.NextCall)
	default:
		return r.fail("a dedupe record of an unknown kind")
	}
	return nil
}

// journal takes a frame of a journal entry, inside a delta or by itself.
func (r *restorer) journal(f *componentv1.StateFrame) error {
	if r.open && !r.delta {
		return r.fail("a journal entry inside a full checkpoint")
	}
	if f.GetOffset() == 0 {
		if len(r.buf) > 0 {
			return r.fail("entry %d starts inside entry %d", f.GetMark(), r.entry)
		}
		r.section, r.offset, r.entry = componentv1.SectionJournal, 0, f.GetMark()
	}
	if f.GetMark() != r.entry {
		return r.fail("a frame of entry %d inside entry %d", f.GetMark(), r.entry)
	}
	if err := r.take(f); err != nil {
		return err
	}
	if len(r.buf) > maxRecordBytes {
		return r.fail("an entry of more than %d bytes", maxRecordBytes)
	}
	if !f.GetLast() {
		return nil
	}
	var e statev1.Entry
	if err := proto.Unmarshal(r.buf, &e); err != nil {
		return r.fail("not a journal entry: %v", err)
	}
	r.buf = nil
	return r.apply(&e)
}

func (r *restorer) apply(e *statev1.Entry) error {
	switch {
	case e.GetMark() != r.entry:
		return r.fail("the frame says entry %d, the entry itself %d", r.entry, e.GetMark())
	case e.GetMark() <= r.v.mark:
		return nil
	case e.GetMark() != r.v.mark+1:
		return r.fail("entry %d after mark %d: entries between are missing", e.GetMark(), r.v.mark)
	case e.GetReply() != nil && len(e.GetReply().GetKey()) == 0:
		return r.fail("entry %d remembers a reply without a key", e.GetMark())
	}
	if err := r.readable(e.GetSchema()); err != nil {
		return err
	}
	r.v.apply(e)
	return nil
}

func (r *restorer) end(f *componentv1.StateFrame) error {
	switch {
	case !r.open:
		return r.fail("an end without a header")
	case len(r.buf) > 0:
		return r.fail("the checkpoint ends inside a record")
	case f.GetMark() != r.header || !f.GetLast():
		return r.fail("the end says mark %d, the header %d", f.GetMark(), r.header)
	case r.got != r.total:
		return r.fail("%d bytes of payload, the header says %d", r.got, r.total)
	case r.delta && r.v.mark < r.header:
		return r.fail("the delta leads to mark %d, the header says %d", r.v.mark, r.header)
	}
	r.open, r.section = false, componentv1.SectionHeader
	return nil
}

func (r *restorer) complete() error {
	if r.open || len(r.buf) > 0 {
		return r.fail("the stream ends before the checkpoint does")
	}
	return nil
}
