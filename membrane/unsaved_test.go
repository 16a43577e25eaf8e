package membrane

import "testing"

// Where answers have no marks, calls are counted that may have changed something, and a checkpoint holds those that were answered before it was begun.
func TestCallsWithoutMarksAreCountedUntilTheyAreSaved(t *testing.T) {
	b := &Backend{methods: &Methods{byName: map[string]Method{"/s/Get": {Name: "/s/Get", NoSideEffects: true}}}}
	for range 3 {
		b.answered("/s/Put", 0)
		b.answered("/s/Get", 0)
	}
	b.answered(methodGet, 0)
	if n := b.Unsaved(); n != 3 {
		t.Errorf("%d calls, want 3", n)
	}
	begun := b.Answered()
	b.answered("HTTP POST", 0) // while the checkpoint is made: it may or may not be in it
	b.CountSaved(begun)
	if n := b.Unsaved(); n != 1 {
		t.Errorf("%d calls after a checkpoint, want 1", n)
	}
	b.CountSaved(1) // late news
	if n := b.Unsaved(); n != 1 {
		t.Errorf("%d calls, want 1", n)
	}
	b.CountSaved(b.Answered())
	if n := b.Unsaved(); n != 0 {
		t.Errorf("%d calls, want none", n)
	}
}
