package state

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	stateframes "github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// Digest computes the xxh64 of a frame as the contract defines it.
func Digest(f *componentv1.StateFrame) uint64 { return stateframes.Digest(f) }

// Send passes one frame on; the frame is the receiver's.
type Send func(*componentv1.StateFrame) error

func seal(f *componentv1.StateFrame) *componentv1.StateFrame { return stateframes.Seal(f) }

// sectionWriter cuts a section's byte stream into frames.
type sectionWriter struct {
	section string
	chunk   int
	offset  uint64
	buf     []byte
	send    Send
}

// record appends one length-delimited record.
func (w *sectionWriter) record(b []byte) error {
	w.grow()
	w.buf = protowire.AppendVarint(w.buf, uint64(len(b)))
	return w.write(b)
}

func (w *sectionWriter) grow() {
	if w.buf == nil {
		w.buf = make([]byte, 0, w.chunk+16)
	}
}

func (w *sectionWriter) write(b []byte) error {
	for len(w.buf)+len(b) >= w.chunk {
		n := max(0, w.chunk-len(w.buf))
		w.buf = append(w.buf, b[:n]...)
		b = b[n:]
		if err := w.flush(); err != nil {
			return err
		}
		w.grow()
	}
	w.buf = append(w.buf, b...)
	return nil
}

func (w *sectionWriter) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	f := seal(&componentv1.StateFrame{Section: w.section, Offset: w.offset, Data: w.buf})
	w.offset += uint64(len(w.buf))
	w.buf = nil
	return w.send(f)
}

// EntryFrames sends one journal entry.
func EntryFrames(e JournalEntry, chunk int, send Send) error {
	chunk = clampChunk(chunk)
	for offset := 0; ; {
		n := min(chunk, len(e.Body)-offset)
		f := &componentv1.StateFrame{
			Section: componentv1.SectionJournal, Mark: e.Mark, Schema: e.Schema,
			Offset: uint64(offset), Data: e.Body[offset : offset+n],
		}
		offset += n
		f.Last = offset == len(e.Body)
		if err := send(seal(f)); err != nil {
			return err
		}
		if f.Last {
			return nil
		}
	}
}

func clampChunk(chunk int) int {
	if chunk <= 0 {
		return DefaultChunk
	}
	return min(max(chunk, 1<<10), maxChunk)
}

// appendPair appends the encoding of a statev1.Pair; by hand because a checkpoint does it for every key.
func appendPair(b []byte, key string, value []byte) []byte {
	if key != "" {
		b = protowire.AppendTag(b, 1, protowire.BytesType)
		b = protowire.AppendString(b, key)
	}
	if len(value) > 0 {
		b = protowire.AppendTag(b, 2, protowire.BytesType)
		b = protowire.AppendBytes(b, value)
	}
	return b
}

func pairSize(key string, value []byte) int {
	n := 0
	if key != "" {
		n += protowire.SizeTag(1) + protowire.SizeBytes(len(key))
	}
	if len(value) > 0 {
		n += protowire.SizeTag(2) + protowire.SizeBytes(len(value))
	}
	return n
}

// dedupes lists the records of section "dedupe" in order: next_call, low-water marks, replies.
func (v *version) dedupes(yield func(*statev1.Dedupe) bool) {
	if !yield(&statev1.Dedupe{Record: &statev1.Dedupe_NextCall{NextCall: v.nextCall}}) {
		return
	}
	for caller, n := range v.lows.Ascend(allStrings()) {
		if !yield(&statev1.Dedupe{Record: &statev1.Dedupe_Low{Low: &statev1.Low{Caller: []byte(caller), N: n}}}) {
			return
		}
	}
	for _, r := range v.replies.Ascend(allCalls()) {
		if !yield(&statev1.Dedupe{Record: &statev1.Dedupe_Reply{Reply: r}}) {
			return
		}
	}
}

// encodedBytes is the exact payload of the map and dedupe sections.
func (v *version) encodedBytes() uint64 {
	total := uint64(v.pairBytes)
	for d := range v.dedupes {
		total += uint64(protowire.SizeBytes(proto.Size(d)))
	}
	return total
}
