package arbiter

import (
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/internal/planted"
)

// step is one thing for the keeper to do. At most one change of the group is under way at any time.
type step struct {
	kind stepKind
	id   peer.ID
	why  string
}

type stepKind int

const (
	stepNone    stepKind = iota
	stepWait             // for a learner to catch up
	stepLearner          // add as a learner
	stepVoter            // make a learner a voter
	stepDemote           // make a voter a learner
	stepRemove           // from the group
	stepName             // commit who is coordinator
	stepHand             // hand the leadership over
	stepPair             // commit that either of two may go on alone, and who is primary
	stepUnpair           // commit that neither may
	stepRaise            // commit that entries may be of a higher format
)

func (k stepKind) String() string {
	return [...]string{"nothing", "wait for", "add as learner", "make voter", "make learner", "remove", "name as coordinator", "hand leadership to", "pair, primary", "unpair", "raise the format at"}[k]
}

// situation is what the keeper decides on. Deciding is a pure function of it.
type situation struct {
	self        peer.ID
	voters      []peer.ID
	learners    []peer.ID
	index       uint64 // of the entry that made the group
	members     map[peer.ID]standing
	coordinator peer.ID
	primary     peer.ID            // of the rule of two nodes; "": it does not hold
	ready       func(peer.ID) bool // a learner that has caught up and would take part
	reached     func(peer.ID) bool // a newcomer that others than the leader get through to
	max         int                // voters at most
	maySwap     bool               // distance alone may change the group now
	mayHand     bool               // a healthy leader may hand over now
	format      uint32             // of the group's entries
	known       uint32             // the highest format that every member says it knows
}

// standing is what is known of a member, or of a server that the view does not name.
type standing struct {
	alive    bool
	dead     bool // for long enough to act
	eligible bool // alive, and may vote
	zone     string
}

// wanted is how many voters n eligible members call for. Two votes of two are needed: the rule of two nodes is what makes them safer than
// one.
func wanted(n, most int) int {
	switch {
	case n <= 1 || most == 1:
		return 1
	case n == 2:
		return 2
	case n < 5:
		return min(3, most)
	case n < 7 || most < 7:
		return min(5, most)
	}
	return 7
}

// eligible says whether a member may vote. young: nobody has been up for settle yet; former: it has voted before, with the disk that its id
// stands for.
func eligible(m Member, former, young bool, settle time.Duration) bool {
	return m.Alive && !m.NoVoter && !m.Draining && (m.Role == "" || m.Role == "full" || m.Role == "voter") && (former || young || m.For >= settle)
}

// nearest orders by distance to the placement key.
func nearest(ids []peer.ID) []peer.ID {
	return keys.Sort(keys.Of(shardKey(thisShard)), slices.Clone(ids))
}

// ideal picks n of the candidates, closest first, at most ceil(n/2)-1 of a zone while there are others; an unknown zone is no zone.
func ideal(sorted []peer.ID, zone func(peer.ID) string, n int) []peer.ID {
	most := max(1, (n+1)/2-1)
	used := map[string]int{}
	var picked []peer.ID
	for _, id := range sorted {
		z := zone(id)
		if len(picked) == n || z != "" && used[z] >= most {
			continue
		}
		used[z]++
		picked = append(picked, id)
	}
	for _, id := range sorted {
		if len(picked) < n && !slices.Contains(picked, id) {
			picked = append(picked, id)
		}
	}
	return nearest(picked)
}

// groups is a situation sorted out.
type groups struct {
	good    []peer.ID // voters that may stay
	bad     []peer.ID // voters that must go: dead, draining, not eligible
	healthy bool      // all voters are alive
	want    int
	ideal   []peer.ID
	missing []peer.ID // ideal ones that do not vote
	second  peer.ID   // of two nodes with one voter at most: the one that learns
}

func (s *situation) sort() groups {
	var g groups
	var can []peer.ID
	for id, m := range s.members {
		if m.eligible {
			can = append(can, id)
		}
	}
	can = nearest(can)
	n := len(can)
	g.healthy = true
	for _, id := range s.voters {
		m := s.members[id]
		switch {
		case m.eligible:
			g.good = append(g.good, id)
		case m.dead || m.alive:
			g.bad = append(g.bad, id)
		default: // suspect, or not in the view yet: neither counted out nor relied on
			g.good = append(g.good, id)
			n++
		}
		g.healthy = g.healthy && m.alive
	}
	g.want = wanted(n, s.max)
	g.ideal = ideal(can, func(id peer.ID) string { return s.members[id].zone }, g.want)
	for _, id := range g.ideal {
		if !slices.Contains(s.voters, id) {
			g.missing = append(g.missing, id)
		}
	}
	if g.want == 1 && len(can) == 2 {
		g.second = can[0]
		if len(g.good) > 0 && g.good[0] == can[0] || len(g.good) == 0 {
			g.second = can[1]
		}
	}
	return g
}

// next decides what to do now: replace and grow first, then take out, then swap, then see to learners, coordinator and leadership. While the
// rule of two nodes holds, no vote changes before it has ended: the third node or the one that is left could otherwise acknowledge with
// one of two what the other, still going by the rule, overrides (consistency.md §3.6).
func (s *situation) next() step {
	g := s.sort()
	if st := s.takeOut(g); planted.Bug("remove-first") && st.kind != stepNone {
		return st
	}
	for _, rule := range []func(groups) step{s.fill, s.takeOut, s.shrink, s.swap, s.pair, s.learn, s.tidy, s.name, s.raise, s.hand} {
		st := rule(g)
		if s.primary != "" && !planted.Bug("two-among-three") && (st.kind == stepVoter || st.kind == stepDemote || st.kind == stepRemove && slices.Contains(s.voters, st.id)) {
			return s.unpair(st)
		}
		if st.kind != stepNone {
			return st
		}
	}
	return step{}
}

// unpair ends the rule for the sake of another step. That takes both: with one of them gone there is nothing to commit it with.
func (s *situation) unpair(sake step) step {
	for _, id := range s.voters {
		if !s.members[id].alive {
			return step{}
		}
	}
	return step{stepUnpair, sake.id, sake.why}
}

// pair lets either of two go on alone; the one that has voted for longer is primary.
func (s *situation) pair(g groups) step {
	if len(s.voters) != 2 || g.want != 2 || len(g.good) != 2 || !g.healthy || s.primary != "" {
		return step{}
	}
	return step{stepPair, s.voters[0], "two nodes"}
}

// bring adds a voter: learner first, voter when it has caught up.
func (s *situation) bring(id peer.ID, why string) step {
	switch {
	case !s.reached(id):
		return step{stepWait, id, why} // it is passed over from now on
	case !slices.Contains(s.learners, id) && !planted.Bug("vote-without-learning"):
		return step{stepLearner, id, why}
	case !s.ready(id) && !planted.Bug("vote-without-learning"):
		return step{stepWait, id, why}
	}
	return step{stepVoter, id, why}
}

// fill replaces voters that are to go, and grows the group; the latter only when the wanted number can be reached at once.
func (s *situation) fill(g groups) step {
	if len(g.good) >= g.want || len(g.missing) == 0 {
		return step{}
	}
	if len(g.bad) > 0 {
		st := s.bring(g.missing[0], fmt.Sprintf("in place of %s", g.bad[0]))
		if st.kind == stepWait && len(g.good) >= len(s.voters)/2+1 {
			return step{} // rather without the bad one than waiting with it
		}
		return st
	}
	need := g.want - len(g.good)
	if need > len(g.missing) {
		need = len(g.missing)
	}
	for _, id := range g.missing[:need] {
		if st := s.bring(id, fmt.Sprintf("%d voters are wanted", g.want)); st.kind != stepVoter {
			return st
		}
	}
	return s.bring(g.missing[0], fmt.Sprintf("%d voters are wanted", g.want))
}

// takeOut removes voters that are dead or must not vote.
func (s *situation) takeOut(g groups) step {
	if len(g.bad) == 0 {
		return step{}
	}
	id := g.bad[len(g.bad)-1]
	if id == s.self && len(g.bad) > 1 {
		id = g.bad[0]
	}
	left := len(s.voters) - 1
	alive := 0
	for _, v := range s.voters {
		// Who is silent, or came back and does not take part (an emptied disk), would be waited for for ever.
		if v != id && s.members[v].alive && (v == s.self || s.ready(v)) {
			alive++
		}
	}
	switch {
	case left == 0:
		return step{} // the last voter stays, whatever it is
	case alive < left/2+1:
		return step{} // could not be committed
	case id == s.self:
		return s.handTo(g, "this node is to stop voting")
	}
	return step{stepRemove, id, "dead or not to vote"}
}

// shrink drops the farthest voter beyond the wanted number.
func (s *situation) shrink(g groups) step {
	if len(g.bad) > 0 || len(s.voters) <= g.want {
		return step{}
	}
	order := nearest(g.good)
	id := order[len(order)-1]
	for i := len(order) - 1; i >= 0; i-- {
		if !slices.Contains(g.ideal, order[i]) {
			id = order[i]
			break
		}
	}
	why := fmt.Sprintf("%d voters are wanted", g.want)
	if !s.members[id].alive {
		return step{} // suspect: it will be alive or dead soon
	}
	if id == s.self {
		return s.handTo(g, why)
	}
	if g.want == 1 && g.second != "" {
		return step{stepDemote, id, why}
	}
	return step{stepRemove, id, why}
}

// swap brings in a closer voter; shrink then drops the farthest.
func (s *situation) swap(g groups) step {
	if len(g.bad) > 0 || len(s.voters) != g.want || len(g.missing) == 0 || !g.healthy || !s.maySwap {
		return step{}
	}
	return s.bring(g.missing[0], "closer to "+PlacementKey)
}

// learn keeps the second of two nodes up to date.
func (s *situation) learn(g groups) step {
	if g.second == "" || slices.Contains(s.learners, g.second) || slices.Contains(s.voters, g.second) {
		return step{}
	}
	return step{stepLearner, g.second, "the second of two nodes"}
}

// tidy removes learners that nobody needs.
func (s *situation) tidy(g groups) step {
	for _, id := range s.learners {
		coming := slices.Contains(g.missing, id) && (s.maySwap || len(g.good) < g.want)
		if id != g.second && !coming && (s.members[id].alive || s.members[id].dead) {
			return step{stepRemove, id, "a learner that is not needed"}
		}
	}
	return step{}
}

// chosen is the voter that is to coordinate: the closest eligible one.
func (s *situation) chosen(g groups) peer.ID {
	for _, id := range nearest(g.good) {
		if s.members[id].eligible {
			return id
		}
	}
	return ""
}

func (s *situation) name(g groups) step {
	if id := s.chosen(g); id != "" && id != s.coordinator {
		return step{stepName, id, "closest to " + PlacementKey}
	}
	return step{}
}

// raise lets entries be of the highest format that all know, when nothing else changes. It never goes back.
func (s *situation) raise(g groups) step {
	if !g.healthy || len(g.bad) > 0 || s.format == 0 || s.known <= s.format {
		return step{}
	}
	return step{stepRaise, s.self, fmt.Sprintf("every member knows format %d, the group has %d", s.known, s.format)}
}

func (s *situation) hand(g groups) step {
	if id := s.chosen(g); id != "" && id != s.self && s.mayHand && s.ready(id) {
		return step{stepHand, id, "it is the coordinator"}
	}
	return step{}
}

// handTo hands over to the best other voter.
func (s *situation) handTo(g groups, why string) step {
	for _, id := range nearest(g.good) {
		if id != s.self && s.members[id].alive && s.ready(id) {
			return step{stepHand, id, why}
		}
	}
	return step{}
}
