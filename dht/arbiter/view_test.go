package arbiter

import (
	"errors"
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
