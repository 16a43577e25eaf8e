package frames

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

type frame = componentv1.StateFrame

func data(section string, offset uint64, text string) *frame {
	return Seal(&frame{Section: section, Offset: offset, Data: []byte(text)})
}

func header(mark, since, total uint64) *frame {
	return Seal(&frame{Mark: mark, SinceMark: since, TotalBytes: total, Schema: 1})
}

func end(mark uint64) *frame {
	return Seal(&frame{Section: componentv1.SectionEnd, Mark: mark, Last: true})
}

func entry(mark uint64, offset uint64, text string, last bool) *frame {
	return Seal(&frame{Section: componentv1.SectionJournal, Mark: mark, Offset: offset, Data: []byte(text), Last: last})
}

// whole is a full checkpoint of two sections.
func whole() []*frame {
	return []*frame{header(7, 0, 9), data("map", 0, "abc"), data("map", 3, "de"), data("dedupe", 0, "fghi"), end(7)}
}

// delta leads from mark 4 to mark 6.
func delta() []*frame {
	return []*frame{header(6, 4, 8), entry(5, 0, "abc", false), entry(5, 3, "de", true), entry(6, 0, "fgh", true), end(6)}
}

func run() []*frame {
	return []*frame{entry(5, 0, "abc", true), entry(6, 0, "d", false), entry(6, 1, "e", true), entry(7, 0, "f", true)}
}

func verdict(v *Verifier, list []*frame) error {
	for _, f := range list {
		if err := v.Frame(f); err != nil {
			return err
		}
	}
	return v.End()
}

func TestWhatIsAStreamOfStateFrames(t *testing.T) {
	opaque := []*frame{
		header(9, 4, 3), data("a file", 0, "abc"), Seal(&frame{Section: "another", Deleted: true}), Seal(&frame{Section: "empty"}), end(9),
	}
	for name, c := range map[string]struct {
		v    *Verifier
		list []*frame
		mark uint64
		full bool
	}{
		"a full checkpoint":                       {Checkpoint(0), whole(), 7, true},
		"a full one where a delta was asked for":  {Checkpoint(4), whole(), 7, true},
		"a delta of entries":                      {Checkpoint(4), delta(), 6, false},
		"a delta of sections":                     {Checkpoint(4), opaque, 9, false},
		"nothing has changed":                     {Checkpoint(6), []*frame{header(6, 6, 0), end(6)}, 6, false},
		"an empty state":                          {Checkpoint(0), []*frame{header(0, 0, 0), end(0)}, 0, true},
		"a journal":                               {Journal(4), run(), 7, false},
		"a journal of nothing yet":                {Journal(4), nil, 4, false},
		"a base that is kept":                     {Stored(), whole(), 7, true},
		"a delta that is kept":                    {Stored(), delta(), 6, false},
		"entries that are kept, from any mark on": {Stored(), run()[1:], 7, false},
	} {
		if err := verdict(c.v, c.list); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if c.v.Mark() != c.mark || c.v.Full() != c.full {
			t.Errorf("%s: mark %d, full %v; want %d, %v", name, c.v.Mark(), c.v.Full(), c.mark, c.full)
		}
	}
}

func TestWhatIsNoStreamOfStateFrames(t *testing.T) {
	change := func(list []*frame, at int, f func(*frame)) []*frame {
		f(list[at])
		Seal(list[at])
		return list
	}
	unsealed := func(list []*frame, at int, f func(*frame)) []*frame {
		f(list[at])
		return list
	}
	cut := func(list []*frame, at int) []*frame { return slices.Delete(list, at, at+1) }
	twice := func(list []*frame, at int) []*frame { return slices.Insert(list, at, proto.CloneOf(list[at])) }
	for name, c := range map[string]struct {
		v    *Verifier
		list []*frame
		want string
	}{
		"a wrong digest":                 {Checkpoint(0), unsealed(whole(), 2, func(f *frame) { f.Data[0] ^= 1 }), "digest"},
		"no digest":                      {Checkpoint(0), unsealed(whole(), 0, func(f *frame) { f.Xxh64 = 0 }), "digest"},
		"another mark under the digest":  {Checkpoint(0), unsealed(whole(), 4, func(f *frame) { f.Mark++ }), "digest"},
		"a frame is missing":             {Checkpoint(0), cut(whole(), 1), "missing or repeated"},
		"a section's last is missing":    {Checkpoint(0), cut(whole(), 2), "header says 9"},
		"a frame comes twice":            {Checkpoint(0), twice(whole(), 1), "missing or repeated"},
		"a whole section comes twice":    {Checkpoint(0), slices.Insert(whole(), 4, data("map", 0, "x")), "begins again"},
		"no end":                         {Checkpoint(0), cut(whole(), 4), "cut off"},
		"nothing at all":                 {Checkpoint(4), nil, "empty"},
		"no header":                      {Checkpoint(0), cut(whole(), 0), "without a header"},
		"two headers":                    {Checkpoint(0), twice(whole(), 0), "second header"},
		"more than the header says":      {Checkpoint(0), slices.Insert(whole(), 4, data("more", 0, "x")), "more than the 9 bytes"},
		"a frame after the end":          {Checkpoint(0), append(whole(), data("more", 0, "x")), "after the end"},
		"the end says another mark":      {Checkpoint(0), change(whole(), 4, func(f *frame) { f.Mark = 6 }), "end says mark 6"},
		"empty frames without an end":    {Checkpoint(0), slices.Insert(whole(), 2, data("map", 3, "")), "empty frame"},
		"an empty section that goes on":  {Checkpoint(0), []*frame{header(1, 0, 0), data("a", 0, ""), data("a", 0, "")}, "goes on"},
		"a delta on top of another mark": {Checkpoint(3), delta(), "mark 3 was asked for"},
		"a delta that was not asked for": {Checkpoint(0), delta(), "mark 0 was asked for"},
		"a delta that goes back":         {Checkpoint(9), []*frame{header(8, 9, 0)}, "back to mark 8"},
		"an entry is missing":            {Checkpoint(4), cut(cut(change(delta(), 0, func(f *frame) { f.TotalBytes = 3 }), 1), 1), "entry 6 after mark 4"},
		"the last entry is missing":      {Checkpoint(4), cut(change(delta(), 0, func(f *frame) { f.TotalBytes = 5 }), 3), "lead to mark 5"},
		"an entry beyond the header":     {Checkpoint(4), change(delta(), 0, func(f *frame) { f.Mark = 5 }), "entry 6, the header says"},
		"an entry in a full checkpoint":  {Checkpoint(0), slices.Insert(whole(), 4, entry(1, 0, "x", true)), "in a full checkpoint"},
		"an entry's frame is missing":    {Journal(4), cut(run(), 1), "missing or repeated"},
		"a journal with a gap":           {Journal(4), cut(run(), 0), "entry 6 after mark 4"},
		"a journal that repeats":         {Journal(4), twice(run(), 0), "entry 5 after mark 5"},
		"a journal from before":          {Journal(5), run(), "entry 5 after mark 5"},
		"a journal's entry without end":  {Journal(4), run()[:2], "inside journal entry 6"},
		"an entry inside another":        {Journal(4), slices.Delete(run(), 2, 3), "entry 7 inside entry 6"},
		"a header in a journal":          {Journal(4), whole(), "a header in a stream"},
		"an empty entry":                 {Journal(4), []*frame{entry(5, 0, "", false)}, "an empty frame"},
		"data in a journal":              {Journal(4), []*frame{data("map", 0, "x")}, "without a header"},
		"kept, with a gap":               {Stored(), slices.Delete(run(), 1, 3), "entry 7 after mark 5"},
		"kept, and nothing in it":        {Stored(), nil, "empty"},
		"deleted in a full checkpoint":   {Checkpoint(0), []*frame{header(1, 0, 0), Seal(&frame{Section: "a", Deleted: true})}, "deleted section"},
	} {
		err := verdict(c.v, c.list)
		var wrong *Error
		if !errors.As(err, &wrong) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: want an *Error with %q, got %v", name, c.want, err)
		}
	}
}

// Whatever comes in, a verifier ends it or takes it, and never more of it than its header says.
func FuzzVerifier(f *testing.F) {
	f.Add(uint8(0), []byte{0, 1, 2, 3, 4})
	f.Add(uint8(4), []byte{0, 1, 1, 2})
	f.Fuzz(func(t *testing.T, since uint8, picks []byte) {
		v := Checkpoint(uint64(since))
		pool := append(append(whole(), delta()...), run()...)
		total, got := uint64(0), uint64(0)
		for _, p := range picks {
			fr := pool[int(p)%len(pool)]
			if v.Frame(fr) != nil {
				return
			}
			total = max(total, fr.GetTotalBytes())
			if got += uint64(len(fr.GetData())); got > total {
				t.Fatalf("%d bytes were taken, the header says %d", got, total)
			}
		}
		if v.End() == nil && got != total {
			t.Fatalf("%d bytes make a whole of %d", got, total)
		}
	})
}
