package components

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

const minuteMs = uint64(time.Minute / time.Millisecond)

func entry(atMs uint64, why string) *componentsv1.HistoryEntry {
	return &componentsv1.HistoryEntry{UnixMs: atMs, Seq: atMs, Root: fmt.Append(nil, atMs), Why: why}
}

// A week with a change every minute: what is kept lies ever wider apart, and every age has something near it.
func TestPeriodicCheckpointsAreThinnedWithAge(t *testing.T) {
	h := &componentsv1.History{}
	r := Retention{Count: DefaultHistory}
	now := uint64(0)
	for range 7 * 24 * 60 {
		now += minuteMs
		if Remember(h, entry(now, WhyPeriodic), r) == nil {
			t.Fatal("the newest was not kept")
		}
	}
	if len(h.Entries) != r.Count {
		t.Fatalf("%d entries", len(h.Entries))
	}
	var ages []uint64
	for _, e := range slices.Backward(h.Entries) {
		ages = append(ages, (now-e.UnixMs)/minuteMs)
	}
	t.Log("ages in minutes:", ages)
	for i := 2; i < len(ages); i++ {
		if ages[i] > 10*ages[i-1] {
			t.Errorf("nothing between %d and %d minutes ago", ages[i-1], ages[i])
		}
	}
	if ages[2] > 15 || ages[len(ages)-1] < 6*24*60 {
		t.Errorf("ages %v: a recent and an old one should be there", ages)
	}
}

// What was made on purpose goes after what was made by the clock, but leaves a third of the room to that.
func TestWhatWasMadeOnPurposeStaysLonger(t *testing.T) {
	h := &componentsv1.History{}
	r := Retention{Count: 9}
	now := uint64(0)
	add := func(why string) {
		now += minuteMs
		Remember(h, entry(now, why), r)
	}
	count := func(why string) (n int) {
		for _, e := range h.Entries {
			if e.Why == why {
				n++
			}
		}
		return n
	}
	for range 4 {
		add(WhyByHand)
	}
	for range 100 {
		add(WhyPeriodic)
	}
	if count(WhyByHand) != 4 || count(WhyPeriodic) != 5 {
		t.Errorf("%d by hand and %d periodic of 9", count(WhyByHand), count(WhyPeriodic))
	}
	for range 100 {
		add(WhyBeforeSwap)
	}
	if count(WhyPeriodic) != 3 || count(WhyByHand) != 0 {
		t.Errorf("%d periodic and %d by hand after 100 swaps", count(WhyPeriodic), count(WhyByHand))
	}
	if h.Last != 204 || Newest(h).Number != 204 {
		t.Errorf("last %d, the newest is %d", h.Last, Newest(h).Number)
	}
	if Forget(h, Retention{Count: 9, Age: time.Hour}, now+2*60*minuteMs) != true || len(h.Entries) != 0 {
		t.Errorf("%d entries are older than an hour and kept", len(h.Entries))
	}
}

func TestTheSameCheckpointIsKeptOnce(t *testing.T) {
	h := &componentsv1.History{}
	r := Retention{Count: 3}
	a := Remember(h, entry(5, WhyPeriodic), r)
	b := Remember(h, &componentsv1.HistoryEntry{UnixMs: 9, Seq: 5, Root: a.Root, Why: WhyByHand}, r)
	if len(h.Entries) != 1 || b.Number != a.Number || b.Why != WhyByHand {
		t.Errorf("%v", h.Entries)
	}
	if Remember(h, entry(6, WhyPeriodic), Retention{Count: 1}) != nil || h.Last != 1 || Newest(h).Why != WhyByHand {
		t.Errorf("a periodic one took the only place: %v", h)
	}
	if Remember(h, entry(7, WhyByHand), Retention{}) != nil || len(h.Entries) != 0 {
		t.Errorf("history: 0 keeps %v", h.Entries)
	}
}

// Whatever is remembered in whatever order: the bounds hold, numbers and times rise, and what was made on purpose last is there.
func TestHistoryProperties(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		h := &componentsv1.History{}
		r := Retention{Count: 1 + rng.IntN(20)}
		now := uint64(1)
		for range 1 + rng.IntN(60) {
			now += rng.Uint64N(100_000)
			why := []string{WhyByHand, WhyBeforeSwap, WhyPeriodic, WhyPeriodic}[rng.IntN(4)]
			e := entry(now, why)
			e.UnixMs -= min(e.UnixMs, rng.Uint64N(500)) // clocks
			kept := Remember(h, e, r)
			if kept == nil && why != WhyPeriodic {
				t.Fatalf("seed %d: %s was not kept", seed, why)
			}
			if len(h.Entries) > r.Count {
				t.Fatalf("seed %d: %d entries of %d", seed, len(h.Entries), r.Count)
			}
			for i := 1; i < len(h.Entries); i++ {
				if a, b := h.Entries[i-1], h.Entries[i]; a.Number >= b.Number || a.UnixMs > b.UnixMs {
					t.Fatalf("seed %d: %v before %v", seed, a, b)
				}
			}
		}
	}
}

func TestFindACheckpoint(t *testing.T) {
	h := &componentsv1.History{}
	for i := range uint64(4) {
		e := entry((i+1)*minuteMs, WhyByHand)
		e.Seq = 40 + i
		Remember(h, e, Retention{Count: 3}) // c1 is gone
	}
	at := func(ms uint64) Moment { return Moment{Time: time.UnixMilli(int64(ms))} }
	for m, want := range map[Moment]uint64{{ID: "c2"}: 2, {ID: "43"}: 4, at(2 * minuteMs): 2, at(3*minuteMs - 1): 2, at(99 * minuteMs): 4} {
		if e, err := Find(h, m); err != nil || e.GetNumber() != want {
			t.Errorf("%s: c%d, %v; want c%d", m, e.GetNumber(), err, want)
		}
	}
	for _, m := range []Moment{{ID: "c1"}, {ID: "c99"}, {ID: "40"}, {ID: "now"}, at(2*minuteMs - 1)} {
		if e, err := Find(h, m); !errors.Is(err, ErrNoCheckpoint) {
			t.Errorf("%s: %v, %v", m, e, err)
		}
	}
	Replaced(h, h.Entries[2], h.Entries[0].Root) // c4 was left for c2
	if e, err := Find(h, at(99*minuteMs)); err != nil || e.GetNumber() != 2 {
		t.Errorf("after it went back to c2: %v, %v", e, err)
	}
	if e, err := Find(h, Moment{ID: "c4"}); err != nil || e.GetNumber() != 4 {
		t.Errorf("what was left: %v, %v", e, err)
	}
	if _, err := Find(nil, Moment{ID: "c1"}); !errors.Is(err, ErrNoCheckpoint) {
		t.Error(err)
	}
}

func TestRetentionOfAManifest(t *testing.T) {
	for text, want := range map[string]Retention{
		"": {Count: 10}, "state: {history: 0}": {}, "state: {history: 30, history_age: 14d}": {30, 14 * 24 * time.Hour}, "state: {history_age: 36h}": {10, 36 * time.Hour},
	} {
		list, err := ParseManifests("x.yaml", []byte("application: a\ncomponents:\n  - name: x\n    artifact: x\n    "+text+"\n"))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := RetentionOf(list[0].GetComponents()[0]); got != want {
			t.Errorf("%s: %+v", text, got)
		}
	}
	for _, text := range []string{"history: 501", "history: -1", "history_age: 3", "history_age: 5m", "history_age: 0d", "replicas: 0", "replicas: 8", "min_replicas: 4", "standby: lukewarm"} {
		if _, err := ParseManifests("x.yaml", []byte("application: a\ncomponents:\n  - name: x\n    artifact: x\n    state: {"+text+"}\n")); err == nil {
			t.Errorf("%s was taken", text)
		}
	}
}

// A branch is named in full or by what tells it from its instance's others; anything else is an entry of the history, or a time.
func TestNamesOfBranches(t *testing.T) {
	const instance = "tally/counter-0"
	for id, want := range map[string]string{
		"@branch-n2-1": "branch/tally/counter-0@branch-n2-1", "tally/counter-0@branch-n2-1": "branch/tally/counter-0@branch-n2-1", "c7": "", "7": "", "": "",
	} {
		if key, is, err := (Moment{ID: id}).Branch(instance); err != nil || is != (want != "") || is && key != want {
			t.Errorf("%q is %q, %v, %v", id, key, is, err)
		}
	}
	if want := BranchRegister(instance, "n2", 1); want != BranchesOf(instance)+"n2-1" || want != BranchPrefix+instance+BranchID("n2", 1) {
		t.Errorf("names differ: %s", want)
	}
	if _, is, err := (Moment{ID: "tally/other-0@branch-n2-1"}).Branch(instance); !is || !errors.Is(err, ErrNoCheckpoint) {
		t.Errorf("a branch of another instance: %v, %v", is, err)
	}
}
