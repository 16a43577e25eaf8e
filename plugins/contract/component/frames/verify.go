package frames

import (
	"fmt"

	"github.com/cespare/xxhash/v2"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	// maxSections and maxSectionName bound what is remembered of a stream.
	maxSections    = 1 << 18
	maxSectionName = 4 << 10
	// maxEntry bounds one journal entry, which is kept in memory as a whole: more than an SDK makes.
	maxEntry = 96 << 20
)

// Error says where a stream of frames is not what it should be.
type Error struct {
	Section string
	Offset  uint64
	Why     string
}

func (e *Error) Error() string {
	if e.Section == "" {
		return "its stream of state frames is wrong: " + e.Why
	}
	return fmt.Sprintf("its stream of state frames is wrong, in section %q at offset %d: %s", e.Section, e.Offset, e.Why)
}

// form is what a stream may be.
type form uint8

const (
	checkpoint form = iota
	journal
	stored
)

// Verifier checks one stream of frames. It is for one goroutine.
type Verifier struct {
	form  form
	since uint64 // checkpoint, journal: the mark that was asked for

	begun, ended bool // the header and the end frame have been seen
	full         bool
	mark         uint64 // the header's
	total, got   uint64 // payload, told and seen

	section string // the one being read; "" none yet
	offset  uint64 // expected next
	seen    map[uint64]struct{}

	entries bool   // there was a journal entry
	entry   uint64 // the mark of the entry being read; 0 none
	last    uint64 // the mark of the last whole entry
	pending uint64 // bytes of the entry being read
}

// Checkpoint checks an answer to Checkpoint with this since_mark: all of a state, or what changed after that mark.
func Checkpoint(since uint64) *Verifier {
	return &Verifier{form: checkpoint, since: since, last: since, seen: map[uint64]struct{}{}}
}

// Journal checks an answer to Deltas with this since_mark.
func Journal(since uint64) *Verifier { return &Verifier{form: journal, since: since, last: since} }

// Stored checks one piece of a checkpoint as it is kept: what Checkpoint takes, or a run of journal entries from any mark on.
func Stored() *Verifier { return &Verifier{form: stored, seen: map[uint64]struct{}{}} }

// Mark is the mark that the checkpoint leads to, known after its header; of journal entries that of the last whole one.
func (v *Verifier) Mark() uint64 {
	if v.begun {
		return v.mark
	}
	return v.last
}

// Full says whether the checkpoint is all of the state; known after its header.
func (v *Verifier) Full() bool { return v.begun && v.full }

// Inside says that a journal entry has begun and not ended.
func (v *Verifier) Inside() bool { return v.entry != 0 }

func (v *Verifier) fail(format string, args ...any) error {
	return &Error{Section: v.section, Offset: v.offset, Why: fmt.Sprintf(format, args...)}
}

// Frame takes the next frame. After an error the stream is worth nothing.
func (v *Verifier) Frame(f *componentv1.StateFrame) error {
	name := f.GetSection()
	switch {
	case f.GetXxh64() != Digest(f):
		return &Error{Section: name, Offset: f.GetOffset(), Why: "the digest of a frame does not match: it was damaged, or not sealed at all"}
	case v.ended:
		return v.fail("a frame after the end")
	case len(name) > maxSectionName:
		return v.fail("a section's name of %d bytes, at most %d", len(name), maxSectionName)
	case v.entry != 0 && name != componentv1.SectionJournal:
		return v.fail("a frame of section %q inside journal entry %d", name, v.entry)
	}
	switch name {
	case componentv1.SectionHeader:
		return v.header(f)
	case componentv1.SectionEnd:
		return v.end(f)
	case componentv1.SectionJournal:
		return v.journal(f)
	}
	return v.data(f)
}

func (v *Verifier) header(f *componentv1.StateFrame) error {
	switch {
	case v.form == journal:
		return v.fail("a header in a stream of journal entries")
	case v.begun || v.entries:
		return v.fail("a second header")
	case len(f.GetData()) > 0 || f.GetOffset() != 0 || f.GetDeleted() || f.GetLast():
		return v.fail("a header with data, an offset, or the marks of an end")
	case v.form == checkpoint && f.GetSinceMark() != 0 && f.GetSinceMark() != v.since:
		return v.fail("a delta on top of mark %d, mark %d was asked for", f.GetSinceMark(), v.since)
	case f.GetMark() < f.GetSinceMark():
		return v.fail("a delta from mark %d back to mark %d", f.GetSinceMark(), f.GetMark())
	}
	v.begun, v.full, v.mark, v.total, v.last = true, f.GetSinceMark() == 0, f.GetMark(), f.GetTotalBytes(), f.GetSinceMark()
	return nil
}

// data takes a frame of a section whose bytes are the component's business.
func (v *Verifier) data(f *componentv1.StateFrame) error {
	if !v.begun {
		return v.fail("a frame of section %q without a header before it", f.GetSection())
	}
	if f.GetSection() != v.section {
		if err := v.open(f.GetSection()); err != nil {
			return err
		}
	} else if v.offset == 0 {
		return v.fail("a section that was empty or deleted goes on")
	}
	if f.GetDeleted() && (len(f.GetData()) > 0 || f.GetOffset() > 0 || v.full) {
		return v.fail("a deleted section with data, in the middle of itself, or in a full checkpoint")
	}
	return v.take(f)
}

// open begins a section.
func (v *Verifier) open(name string) error {
	h := xxhash.Sum64String(name)
	if _, again := v.seen[h]; again {
		return v.fail("section %q begins again", name)
	}
	if len(v.seen) >= maxSections {
		return v.fail("more than %d sections", maxSections)
	}
	v.seen[h] = struct{}{}
	v.section, v.offset = name, 0
	return nil
}

// take checks a frame's place in its section, and that there is not more than the header says.
func (v *Verifier) take(f *componentv1.StateFrame) error {
	n := uint64(len(f.GetData()))
	switch {
	case f.GetOffset() != v.offset:
		return v.fail("a frame at offset %d: one is missing or repeated", f.GetOffset())
	case n == 0 && v.offset > 0:
		return v.fail("an empty frame")
	}
	v.offset += n
	v.got += n
	if v.begun && v.got > v.total {
		return v.fail("more than the %d bytes that the header says", v.total)
	}
	return nil
}

// journal takes a frame of a journal entry.
func (v *Verifier) journal(f *componentv1.StateFrame) error {
	mark := f.GetMark()
	switch {
	case v.form == checkpoint && !v.begun:
		return v.fail("a journal entry without a header before it")
	case v.begun && v.full:
		return v.fail("a journal entry in a full checkpoint")
	case f.GetDeleted():
		return v.fail("a deleted journal entry")
	case len(f.GetData()) == 0:
		return v.fail("an empty frame of journal entry %d", mark)
	}
	if v.entry == 0 {
		first := v.form == stored && !v.begun && !v.entries // it may have any mark
		if !first && mark != v.last+1 || mark == 0 {
			return v.fail("entry %d after mark %d: entries between are missing, or it is repeated", mark, v.last)
		}
		v.section, v.offset, v.entry, v.entries, v.pending = componentv1.SectionJournal, 0, mark, true, 0
	}
	if mark != v.entry {
		return v.fail("a frame of entry %d inside entry %d", mark, v.entry)
	}
	if err := v.take(f); err != nil {
		return err
	}
	if v.pending += uint64(len(f.GetData())); v.pending > maxEntry {
		return v.fail("entry %d has more than %d bytes", mark, maxEntry)
	}
	if f.GetLast() {
		v.last, v.entry = mark, 0
		if v.begun && v.last > v.mark {
			return v.fail("entry %d, the header says that mark %d is the last", v.last, v.mark)
		}
	}
	return nil
}

func (v *Verifier) end(f *componentv1.StateFrame) error {
	switch {
	case !v.begun:
		return v.fail("an end without a header")
	case f.GetMark() != v.mark || !f.GetLast() || len(f.GetData()) > 0:
		return v.fail("the end says mark %d, the header %d", f.GetMark(), v.mark)
	case v.got != v.total:
		return v.fail("%d bytes, the header says %d", v.got, v.total)
	case v.entries && v.last != v.mark:
		return v.fail("its entries lead to mark %d, the header says %d", v.last, v.mark)
	}
	v.ended = true
	return nil
}

// End says whether the stream may end here.
func (v *Verifier) End() error {
	switch {
	case v.entry != 0:
		return v.fail("it ends inside journal entry %d", v.entry)
	case v.begun && !v.ended:
		return v.fail("it ends before its end frame: it was cut off")
	case v.form == checkpoint && !v.begun:
		return v.fail("it is empty: not even a header")
	case v.form == stored && !v.begun && !v.entries:
		return v.fail("it is empty")
	}
	return nil
}
