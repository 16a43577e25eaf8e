package arbiter

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
)

// world is a group under the keeper's hand: what it decides is done at once.
type world struct {
	s situation
}

func newWorld(n int) *world {
	w := &world{s: situation{members: map[peer.ID]standing{}, max: 5, ready: func(peer.ID) bool { return true }, reached: func(peer.ID) bool { return true }, maySwap: true, mayHand: true}}
	for i := range n {
		w.s.members[testID(i+1)] = standing{alive: true, eligible: true}
	}
	w.s.self = testID(1)
	w.s.voters = []peer.ID{testID(1)}
	w.s.coordinator = testID(1)
	return w
}

// settle carries out the keeper's steps until it has nothing to do, and checks each.
func (w *world) settle(t *testing.T) {
	t.Helper()
	for range 100 {
		st := w.s.next()
		voters := len(w.s.voters)
		switch st.kind {
		case stepNone, stepWait:
			return
		case stepLearner:
			w.s.learners = append(w.s.learners, st.id)
		case stepVoter:
			w.s.learners = slices.DeleteFunc(w.s.learners, func(id peer.ID) bool { return id == st.id })
			w.s.voters = append(w.s.voters, st.id)
		case stepDemote:
			w.s.voters = slices.DeleteFunc(w.s.voters, func(id peer.ID) bool { return id == st.id })
			w.s.learners = append(w.s.learners, st.id)
		case stepRemove:
			w.s.voters = slices.DeleteFunc(w.s.voters, func(id peer.ID) bool { return id == st.id })
			w.s.learners = slices.DeleteFunc(w.s.learners, func(id peer.ID) bool { return id == st.id })
		case stepName:
			w.s.coordinator = st.id
		case stepHand:
			w.s.self = st.id
		case stepPair:
			w.s.primary = st.id
		case stepUnpair:
			w.s.primary = ""
		}
		if w.s.primary != "" && (len(w.s.voters) != 2 || !slices.Contains(w.s.voters, w.s.primary)) {
			t.Fatalf("after %s %s: the rule of two nodes holds for %d voters", st.kind, st.id, len(w.s.voters))
		}
		if d := len(w.s.voters) - voters; d < -1 || d > 1 {
			t.Fatalf("%s changed %d voters at once", st.kind, d)
		}
		if !slices.Contains(w.s.voters, w.s.self) {
			t.Fatalf("after %s %s the leader does not vote", st.kind, st.id)
		}
		alive := 0
		for _, v := range w.s.voters {
			if !w.s.members[v].dead {
				alive++
			}
		}
		if alive < len(w.s.voters)/2+1 {
			t.Fatalf("after %s %s: %d of %d voters live", st.kind, st.id, alive, len(w.s.voters))
		}
	}
	t.Fatal("the keeper finds no rest")
}

func (w *world) kill(id peer.ID) {
	m := w.s.members[id]
	m.alive, m.eligible, m.dead = false, false, true
	w.s.members[id] = m
	if w.s.self == id {
		for _, v := range nearest(w.s.voters) {
			if w.s.members[v].alive {
				w.s.self = v // elected
				break
			}
		}
	}
	if w.s.primary != "" && slices.Contains(w.s.voters, id) { // the other goes on alone
		w.s.voters = slices.DeleteFunc(w.s.voters, func(v peer.ID) bool { return v == id })
		w.s.learners, w.s.primary, w.s.self = nil, "", w.s.voters[0]
	}
}

func (w *world) can() []peer.ID {
	var out []peer.ID
	for id, m := range w.s.members {
		if m.eligible {
			out = append(out, id)
		}
	}
	return nearest(out)
}

func TestKeeperReachesTheIdeal(t *testing.T) {
	for n := 1; n <= 12; n++ {
		w := newWorld(n)
		w.settle(t)
		can := w.can()
		want := ideal(can, func(peer.ID) string { return "" }, wanted(n, 5))
		if got := nearest(w.s.voters); !slices.Equal(got, want) {
			t.Errorf("%d nodes: voters %v, want %v", n, got, want)
		}
		if len(w.s.learners) != 0 || (w.s.primary != "") != (n == 2) {
			t.Errorf("%d nodes: learners %v, primary %q", n, w.s.learners, w.s.primary)
		}
		if w.s.coordinator != want[0] || w.s.self != want[0] {
			t.Errorf("%d nodes: coordinator %s, leader %s, closest %s", n, w.s.coordinator, w.s.self, want[0])
		}
	}
}

// TestKeeperProperties: whatever dies, drains, comes back or changes zone, the keeper comes to rest with an odd number of voters, or with
// two that go by the rule of two nodes, all of them eligible, without ever losing its majority on the way.
func TestKeeperProperties(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := 1 + r.IntN(9)
		w := newWorld(n)
		for id, m := range w.s.members {
			m.zone = []string{"", "a", "b", "c"}[r.IntN(4)]
			w.s.members[id] = m
		}
		w.settle(t)
		for range 20 {
			id := testID(1 + r.IntN(n))
			m := w.s.members[id]
			switch r.IntN(4) {
			case 0, 1:
				if alive := len(w.can()); alive > 1 && (len(w.s.voters) > 2 || !slices.Contains(w.s.voters, id)) {
					w.kill(id)
				}
			case 2:
				m.alive, m.eligible, m.dead = true, true, false
				w.s.members[id] = m
			case 3:
				if m.alive && len(w.can()) > 1 {
					m.eligible = false // draining
					w.s.members[id] = m
				}
			}
			w.s.maySwap, w.s.mayHand = r.IntN(2) == 0, r.IntN(2) == 0
			w.settle(t)
			if n := len(w.s.voters); n%2 != 1 && n != 2 || (n == 2) != (w.s.primary != "") {
				t.Fatalf("seed %d: %d voters, primary %q", seed, n, w.s.primary)
			}
			if want := wanted(len(w.can()), 5); len(w.s.voters) != want {
				t.Fatalf("seed %d: %d voters for %d eligible members", seed, len(w.s.voters), len(w.can()))
			}
			for _, v := range w.s.voters {
				if !w.s.members[v].eligible {
					t.Fatalf("seed %d: %s votes", seed, v)
				}
			}
		}
	}
}

func TestKeeperHoldsStill(t *testing.T) {
	w := newWorld(5)
	w.settle(t)
	suspect := w.s.voters[3]
	if suspect == w.s.self {
		suspect = w.s.voters[2]
	}
	m := w.s.members[suspect]
	m.alive, m.eligible = false, false // and not dead: nobody knows
	w.s.members[suspect] = m
	if st := w.s.next(); st.kind != stepNone {
		t.Errorf("a suspect voter: %s %s %s", st.kind, st.id, st.why)
	}
	// After a restart the view is empty but for the leader: the group stays as it is.
	for id := range w.s.members {
		if id != w.s.self {
			w.s.members[id] = standing{}
		}
	}
	if st := w.s.next(); st.kind != stepNone && st.kind != stepName {
		t.Errorf("an empty view: %s %s %s", st.kind, st.id, st.why)
	}
	// Growth waits until the next odd number can be reached.
	w = newWorld(3)
	w.settle(t)
	w.s.members[testID(4)] = standing{alive: true, eligible: true}
	w.s.members[testID(5)] = standing{alive: true, eligible: true}
	w.s.ready = func(id peer.ID) bool { return id != testID(5) }
	w.settle(t)
	if len(w.s.voters) != 3 {
		t.Errorf("%d voters while the fifth is not ready", len(w.s.voters))
	}
}

func TestZonesInTheIdeal(t *testing.T) {
	var all []peer.ID
	zone := map[peer.ID]string{}
	for i := range 9 {
		id := testID(i + 1)
		all = append(all, id)
		zone[id] = []string{"a", "b", "c"}[i%3]
	}
	of := func(id peer.ID) string { return zone[id] }
	for n := range []int{1, 3, 5} {
		picked := ideal(nearest(all), of, n)
		used := map[string]int{}
		for _, id := range picked {
			used[zone[id]]++
		}
		for z, k := range used {
			if k > max(1, (n+1)/2-1) {
				t.Errorf("%d voters: %d in zone %s", n, k, z)
			}
		}
		if n > 0 && picked[0] != nearest(all)[0] {
			t.Errorf("the closest is not among %d", n)
		}
	}
	// One zone only: full anyway.
	if got := ideal(nearest(all), func(peer.ID) string { return "z" }, 5); len(got) != 5 {
		t.Error(fmt.Sprint("one zone: ", len(got)))
	}
}
