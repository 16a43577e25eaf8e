package arbiter

import (
	"errors"
	"slices"
	"testing"

	iradix "github.com/hashicorp/go-immutable-radix"
)

func treeOf(regs ...*Register) *iradix.Tree {
	x := iradix.New().Txn()
	for _, r := range regs {
		x.Insert([]byte(r.Key), r)
	}
	return x.CommitOnly()
}

// TestAViewNeverMixesTwoLives: two lives of the group may have the same number and any indices. What is shown is the one or the other,
// however often and in whatever order word of the higher one comes.
func TestAViewNeverMixesTwoLives(t *testing.T) {
	low, high := incarnation{2, 5}, incarnation{2, 9}
	m := func(in incarnation) *meta { return &meta{Cluster: "c", Incarnation: in.number, Lineage: in.lineage} }
	ours := &Register{Key: "ours", Incarnation: 2, Index: 30}
	both := &Register{Key: "both", Incarnation: 2, Index: 12, Epoch: 3}
	other := &Register{Key: "both", Incarnation: 2, Index: 12, Epoch: 4}
	shown := func() *view {
		v := newView()
		if err := v.fromFeed(&feedUpdate{whole: treeOf(both, ours), life: low, at: point{2, 30}, complete: 30, meta: m(low)}); err != nil {
			t.Fatal(err)
		}
		return v
	}

	v := shown()
	for range 4 { // several streams may bring the news at once
		v.outrank(high)
	}
	if st := v.now(); st.at.inc != 1 || st.complete != 0 {
		t.Fatalf("outranked: %+v", st.at)
	}
	err := v.fromFeed(&feedUpdate{registers: []*Register{other}, life: high, at: point{2, 31}, complete: 31, meta: m(high)})
	if !errors.Is(err, errOtherLife) || v.get("both").Epoch != 3 || v.now().meta.incarnation() != low {
		t.Fatalf("changes of another life: %v, %+v", err, v.get("both"))
	}
	var changed []string
	v.watch.add(func(old, now *Register) {
		switch {
		case now == nil:
			changed = append(changed, "-"+old.Key)
		default:
			changed = append(changed, now.Key)
		}
	})
	if err := v.fromFeed(&feedUpdate{whole: treeOf(other), life: high, at: point{2, 14}, complete: 14, meta: m(high)}); err != nil {
		t.Fatal(err)
	}
	if v.get("ours") != nil || v.get("both").Epoch != 4 || v.now().meta.incarnation() != high {
		t.Fatalf("after the whole: %+v", v.list(""))
	}
	if len(changed) != 2 || changed[0] != "both" || changed[1] != "-ours" {
		t.Errorf("watchers were told of %q", changed)
	}

	// The same by the own machine, and with word of the higher life that comes only after it.
	v = shown()
	v.outrank(high)
	v.outrank(high)
	v.takeMachine(&viewState{tree: treeOf(other), meta: *m(high), at: point{2, 14}, complete: 14, fromRaft: true})
	v.outrank(high)
	if v.get("ours") != nil || v.get("both").Epoch != 4 || !v.now().fromRaft {
		t.Fatalf("after the machine: %+v", v.list(""))
	}

	// A feeder that began another life between its state and its word about it.
	v = newView()
	if err := v.fromFeed(&feedUpdate{whole: treeOf(ours), life: low, at: point{2, 30}, complete: 30, meta: m(high)}); err != nil {
		t.Fatal(err)
	}
	if v.now().meta.incarnation() != low {
		t.Errorf("the registers of %s are said to be of %s", low, v.now().meta.incarnation())
	}
}

// TestAViewTakesFromAFeederThatIsBehindWhatItLacked: a follower that changes its feeder may have been told of a claim by the first, while that still held
// checkpoints back, and get a whole state of the second from before the claim, with the checkpoints. The second does not send them again.
func TestAViewTakesFromAFeederThatIsBehindWhatItLacked(t *testing.T) {
	life := incarnation{1, 7}
	reg := func(key string, index, epoch uint64) *Register {
		return &Register{Key: key, Incarnation: 1, Index: index, Epoch: epoch}
	}
	v := newView()
	must := func(u *feedUpdate) {
		t.Helper()
		u.life, u.meta = life, &meta{Cluster: "c", Incarnation: life.number, Lineage: life.lineage}
		if err := v.fromFeed(u); err != nil {
			t.Fatal(err)
		}
	}
	must(&feedUpdate{whole: treeOf(reg("a", 5, 1), reg("b", 6, 1), reg("gone", 7, 1)), at: point{1, 7}, complete: 7})
	must(&feedUpdate{registers: []*Register{reg("b", 20, 2), {Key: "gone", Incarnation: 1, Index: 19, Deleted: true}}, at: point{1, 20}, complete: 7})

	var told []uint64
	v.watch.add(func(_, now *Register) { told = append(told, now.Index) })
	must(&feedUpdate{whole: treeOf(reg("a", 12, 1), reg("b", 11, 1), reg("gone", 7, 1)), at: point{1, 12}, complete: 12})
	if at := v.now().at; at != (point{1, 20}) || v.now().complete != 12 {
		t.Errorf("the view went to %v, complete to %d", at, v.now().complete)
	}
	if v.get("a").Index != 12 || v.get("b").Index != 20 || v.get("gone") != nil {
		t.Errorf("after the whole of a feeder that is behind: %+v", v.list(""))
	}
	if len(told) != 1 || told[0] != 12 {
		t.Errorf("watchers were told of the changes at %d", told)
	}
	must(&feedUpdate{whole: treeOf(reg("a", 5, 1)), at: point{1, 8}, complete: 8})
	if v.get("a").Index != 12 || v.now().complete != 12 {
		t.Error("the view went back")
	}
	must(&feedUpdate{registers: []*Register{reg("b", 20, 2)}, at: point{1, 21}, complete: 21})
	if v.get("a").Index != 12 || v.now().complete != 21 {
		t.Errorf("after the next update: %+v, complete %d", v.get("a"), v.now().complete)
	}
}

// TestAViewTellsOfNoChangeTwice: the machine's state may be taken as a whole between its making and its being shown. Who watches is told of the newest, and then
// of nothing older.
func TestAViewTellsOfNoChangeTwice(t *testing.T) {
	v := newView()
	was, middle, now := &Register{Key: "a", Incarnation: 1, Index: 5}, &Register{Key: "a", Incarnation: 1, Index: 6}, &Register{Key: "a", Incarnation: 1, Index: 7}
	at := func(r *Register) *viewState {
		return &viewState{tree: treeOf(r), meta: meta{Cluster: "c", Incarnation: 1}, at: point{1, r.Index}, complete: r.Index, fromRaft: true}
	}
	v.takeMachine(at(was))
	var told []uint64
	v.watch.add(func(_, now *Register) { told = append(told, now.Index) })
	v.takeMachine(at(now))
	v.fromMachine(at(now), []change{{key: "a", old: was, new: middle, index: 6}, {key: "a", old: middle, new: now, index: 7}})
	next := &Register{Key: "a", Incarnation: 1, Index: 8}
	v.fromMachine(at(next), []change{{key: "a", old: now, new: next, index: 8}})
	if !slices.IsSorted(told) || len(told) == 0 || told[len(told)-1] != 8 || v.get("a").Index != 8 {
		t.Errorf("told of the changes at %d, shown %d", told, v.get("a").Index)
	}
}
