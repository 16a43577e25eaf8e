package arbiter

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// The model goes through every interleaving of what can happen to two nodes, and to a third that joins and dies: messages late or lost,
// links cut in either direction and mended, processes killed and started, time passing, elections, and every step of the keeper. Nodes
// decide with the product's own loner.alone. Bounds on how often each thing happens make the space finite; within them it is searched
// whole. A violation is an acknowledged operation that a node going alone, or a leader acknowledging another one, does not have, or
// two nodes alone in one incarnation.

// An entry of a log in the model is two bytes: what it is and its term.
const (
	opBase   = '0' // operation n is opBase+n
	onlyA    = 'a' // the group is {A}
	onlyB    = 'b'
	both     = 'm' // {A, B}
	three    = 't' // {A, B, C}
	ruleA    = 'P' // the rule of two nodes holds, A is primary
	ruleB    = 'Q'
	ruleNone = 'O'
)

const (
	nodeA, nodeB, nodeC = 0, 1, 2
	nobody              = int8(-1)
	modelLimit          = 2          // ticks; the secondary's window is then one
	oldest              = modelLimit // older makes no difference
)

type modelNode struct {
	up      bool
	inc     uint8
	commit  uint8 // entries
	log     string
	met     bool
	age     uint8 // of the contact, in ticks
	leaving bool  // it has decided to go alone
}

// beatState is the one beat under way between A and B: whence, how old, and whether it is the answer that travels.
type beatState struct {
	from   int8 // nobody: none
	age    uint8
	answer bool
}

type modelState struct {
	n                        [3]modelNode
	cut                      [2]bool // A to B, B to A
	leader                   int8
	term                     uint8
	beat                     beatState
	acked                    uint8 // operations, as bits
	ops, kills, cuts, joined uint8
}

// modelRules switches conditions off, one at a time, to show what each is for.
type modelRules struct {
	noPrimaryMet, noSecondaryMet, noProof, noWindow, fromAnswer, noLeaving, noUnpair, offOnApply, noPending bool

	unpaired                           bool // the search begins before the rule does
	third                              bool
	ops, kills, cuts, elections, turns uint8
}

type model struct {
	rules  modelRules
	seen   map[modelState]modelStep
	queue  []modelState
	broken string
	last   modelState
}

type modelStep struct {
	from modelState
	what string
}

func (n *modelNode) entries() int { return len(n.log) / 2 }

// lastOf returns the last entry of one of the kinds among the first k, and its position from 1; 0, 0: none.
func (n *modelNode) lastOf(kinds string, k int) (byte, int) {
	for i := k - 1; i >= 0; i-- {
		if strings.IndexByte(kinds, n.log[2*i]) >= 0 {
			return n.log[2*i], i + 1
		}
	}
	return 0, 0
}

func (n *modelNode) group() []int {
	switch g, _ := n.lastOf("abmt", n.entries()); g {
	case onlyA:
		return []int{nodeA}
	case onlyB:
		return []int{nodeB}
	case both:
		return []int{nodeA, nodeB}
	case three:
		return []int{nodeA, nodeB, nodeC}
	}
	return nil
}

// primary returns who is primary as applied, and whether the log behind that touches the rule.
func (n *modelNode) primary() (who int8, pendingOn, pending bool) {
	who = nobody
	switch r, _ := n.lastOf("PQO", int(n.commit)); r {
	case ruleA:
		who = nodeA
	case ruleB:
		who = nodeB
	}
	for i := int(n.commit); i < n.entries(); i++ {
		switch n.log[2*i] {
		case ruleA, ruleB:
			pendingOn, pending = true, true
		case ruleNone:
			pending = true
		}
	}
	return who, pendingOn, pending
}

func (n *modelNode) has() uint8 { return n.hasAmong(n.entries()) }

// hasAmong returns the operations among the first k entries, as bits.
func (n *modelNode) hasAmong(k int) (ops uint8) {
	for i := range k {
		if c := n.log[2*i]; c >= opBase && c < opBase+8 {
			ops |= 1 << (c - opBase)
		}
	}
	return ops
}

func (n *modelNode) lastTerm() byte {
	if n.log == "" {
		return 0
	}
	return n.log[len(n.log)-1]
}

// reaches says whether what x sends gets to y now.
func (m *model) reaches(s *modelState, x, y int) bool {
	switch {
	case !s.n[x].up || !s.n[y].up:
		return false
	case x == nodeA && y == nodeB:
		return !s.cut[0]
	case x == nodeB && y == nodeA:
		return !s.cut[1]
	}
	return x == nodeA || y == nodeA // B and C never meet: who could tell B of C is gone
}

func (m *model) talk(s *modelState, x, y int) bool { return m.reaches(s, x, y) && m.reaches(s, y, x) }

// add queues a state that was not seen yet.
func (m *model) add(from modelState, s modelState, format string, args ...any) {
	if _, known := m.seen[s]; known || m.broken != "" {
		return
	}
	m.seen[s] = modelStep{from, fmt.Sprintf(format, args...)}
	m.queue = append(m.queue, s)
}

func (m *model) fail(from, s modelState, what, why string) {
	if m.broken == "" {
		m.seen[s] = modelStep{from, what}
		m.broken, m.last = why, s
	}
}

// loner is the situation of a node as the product would describe it.
func (m *model) loner(s *modelState, x int, proven bool) loner {
	n := &s.n[x]
	who, _, pending := n.primary()
	if m.rules.offOnApply {
		pending = false
	}
	g := n.group()
	l := loner{
		on: who != nobody && !pending && slices.Equal(g, []int{nodeA, nodeB}), primary: int(who) == x, met: n.met,
		silent: time.Duration(n.age) * time.Second, proven: proven, limit: modelLimit * time.Second,
	}
	switch {
	case l.primary:
		l.met = l.met || m.rules.noPrimaryMet
		if m.rules.noPrimaryMet && !n.met {
			l.silent = oldest * time.Second
		}
	default:
		l.met = l.met || m.rules.noSecondaryMet
		if m.rules.noSecondaryMet && !n.met {
			l.silent = 0
		}
		l.proven = l.proven || m.rules.noProof
		if m.rules.noWindow {
			l.silent = 0
		}
	}
	return l
}

// expand tries everything that can happen next.
func (m *model) expand(s modelState) {
	m.worldSteps(s)
	m.beatSteps(s)
	m.raftSteps(s)
	m.keeperSteps(s)
	m.aloneSteps(s)
	m.meetSteps(s)
}

func (m *model) worldSteps(s modelState) {
	t := s
	for i := range t.n {
		t.n[i].age = min(t.n[i].age+1, oldest)
		if !t.n[i].met {
			t.n[i].age = 0
		}
	}
	if t.beat.from != nobody {
		t.beat.age = min(t.beat.age+1, oldest)
	}
	m.add(s, t, "a second passes")
	for i := range s.cut {
		t := s
		if m.rules.third { // both directions at once keep the space small
			if i == 1 {
				break
			}
			t.cut[1] = !t.cut[1]
		}
		if t.cut[i] = !t.cut[i]; t.cut[i] {
			if t.cuts++; t.cuts > m.rules.cuts {
				continue
			}
		}
		m.add(s, t, "the link %s is now %s", [...]string{"A to B", "B to A"}[i], map[bool]string{true: "cut", false: "up"}[t.cut[i]])
	}
	for x := range s.n {
		if x == nodeC && (!m.rules.third || s.joined == 0) {
			continue
		}
		t := s
		n := &t.n[x]
		if n.up = !n.up; !n.up {
			if x != nodeC { // the third dies once
				t.kills++
			}
			if t.kills > m.rules.kills {
				continue
			}
			n.met, n.leaving, n.age = false, false, 0
			if x != nodeC {
				t.beat = beatState{from: nobody}
			}
			if int(t.leader) == x {
				t.leader = nobody
			}
		} else if x == nodeC {
			continue // the third stays away
		}
		m.add(s, t, "%c is %s", 'A'+x, map[bool]string{true: "started", false: "killed"}[n.up])
	}
}

// beatSteps: the secondary beats, the primary answers.
func (m *model) beatSteps(s modelState) {
	for x := range 2 {
		y := 1 - x
		who, _, _ := s.n[x].primary()
		if s.beat.from == nobody && s.n[x].up && int(who) == y && len(s.n[x].group()) == 2 && (!s.n[x].leaving || m.rules.noLeaving) && s.n[y].up {
			t := s
			t.beat = beatState{from: int8(x)}
			m.add(s, t, "%c sends a beat", 'A'+x)
		}
	}
	if s.beat.from == nobody {
		return
	}
	x := int(s.beat.from)
	y := 1 - x
	t := s
	t.beat = beatState{from: nobody}
	m.add(s, t, "the beat is lost")
	t = s
	switch {
	case !s.beat.answer && m.reaches(&s, x, y) && s.n[x].inc == s.n[y].inc && (!s.n[y].leaving || m.rules.noLeaving):
		t.n[y].met, t.n[y].age, t.beat.answer = true, 0, true
		m.add(s, t, "%c gets the beat", 'A'+y)
	case s.beat.answer && m.reaches(&s, y, x) && (!s.n[x].leaving || m.rules.noLeaving):
		t.n[x].met, t.n[x].age = true, t.beat.age
		if m.rules.fromAnswer {
			t.n[x].age = 0
		}
		t.beat = beatState{from: nobody}
		m.add(s, t, "%c gets the answer", 'A'+x)
	}
}

// speak says whether the raft of x and y talk.
func (m *model) speak(s *modelState, x, y int) bool {
	return x == y && s.n[x].up || m.talk(s, x, y) && s.n[x].inc == s.n[y].inc
}

func (m *model) raftSteps(s modelState) {
	for x := range s.n { // elections
		n := &s.n[x]
		g := n.group()
		if !n.up || !slices.Contains(g, x) || len(g) > 1 && s.term > m.rules.elections || int(s.leader) == x {
			continue
		}
		votes := 0
		for _, v := range g {
			o := &s.n[v]
			if m.speak(&s, x, v) && (o.lastTerm() < n.lastTerm() || o.lastTerm() == n.lastTerm() && len(o.log) <= len(n.log)) {
				votes++
			}
		}
		if votes > len(g)/2 {
			t := s
			t.leader = int8(x)
			if len(g) > 1 {
				t.term++
			}
			m.add(s, t, "%c is elected", 'A'+x)
		}
	}
	if s.leader == nobody {
		return
	}
	x := int(s.leader)
	l := &s.n[x]
	if s.ops < m.rules.ops {
		t := s
		t.append(x, opBase+s.ops)
		t.ops++
		m.add(s, t, "%c appends operation %d", 'A'+x, s.ops)
	}
	matched := []int{l.entries()} // of each of the group, ascending: how far its log is the leader's
	for _, y := range l.group() {
		o := &s.n[y]
		if y == x {
			continue
		}
		same := 0
		if strings.HasPrefix(l.log, o.log) {
			same = o.entries()
		}
		matched = append(matched, same)
		if !m.speak(&s, x, y) {
			continue
		}
		if o.log != l.log {
			t := s
			t.n[y].log, t.n[y].inc = l.log, l.inc
			t.n[y].commit = min(o.commit, uint8(l.entries()))
			m.add(s, t, "%c gets the log of %c", 'A'+y, 'A'+x)
		}
		if k := min(int(l.commit), same); k > int(o.commit) {
			t := s
			t.n[y].commit = uint8(k)
			m.add(s, t, "%c applies what is committed", 'A'+y)
		}
	}
	slices.Sort(matched)
	k := matched[(len(matched)-1)/2] // a majority has that much
	if len(matched) < len(l.group()) {
		k = 0 // it does not vote itself
	}
	if k > int(l.commit) {
		t := s
		t.n[x].commit = uint8(k)
		t.acked |= l.hasAmong(k)
		if s.acked&^l.has() != 0 && t.acked != s.acked {
			m.fail(s, t, fmt.Sprintf("%c acknowledges", 'A'+x), "a leader acknowledges without an operation that was acknowledged before")
			return
		}
		m.add(s, t, "%c has it committed, acknowledges and applies", 'A'+x)
	}
}

func (s *modelState) append(x int, kind byte) {
	s.n[x].log += string([]byte{kind, s.term})
}

// keeperSteps are those of plan.go that change votes or the rule.
func (m *model) keeperSteps(s modelState) {
	if s.leader == nobody {
		return
	}
	x := int(s.leader)
	n := &s.n[x]
	g := n.group()
	_, at := n.lastOf("abmt", n.entries())
	if at > int(n.commit) {
		return // one change at a time
	}
	who, pendingOn, pending := n.primary()
	holds := who != nobody || pendingOn && !m.rules.noPending
	step := func(kind byte, what string) {
		t := s
		t.append(x, kind)
		if kind == three {
			t.joined, t.n[nodeC].up = 1, true
			t.n[nodeC].inc = n.inc
		}
		m.add(s, t, "%c as keeper: %s", 'A'+x, what)
	}
	switch {
	case len(g) == 1 && s.n[1-g[0]].up:
		if s.n[1-g[0]].inc == n.inc {
			step(both, "add the other of two")
		}
	case len(g) == 2:
		if m.rules.third && s.joined == 0 {
			if !holds || m.rules.noUnpair {
				step(three, "add C")
			}
			if _, ended := n.lastOf("O", n.entries()); ended == 0 && who != nobody && !pending { // once
				step(ruleNone, "end the rule of two")
			}
		}
		_, ended := n.lastOf("O", n.entries())
		if who == nobody && !pending && (!m.rules.third || s.joined == 1 && !s.n[nodeC].up || s.joined == 0 && ended == 0) {
			first := [...]byte{ruleA, ruleB}[0]
			if strings.IndexByte(n.log, onlyB) >= 0 && strings.LastIndexByte(n.log, onlyB) > strings.LastIndexByte(n.log, onlyA) {
				first = ruleB
			}
			step(first, "begin the rule of two")
		}
	case len(g) == 3 && !s.n[nodeC].up:
		step(both, "remove C, which is dead")
	}
}

// aloneSteps: deciding, and then beginning the next incarnation, with anything in between.
func (m *model) aloneSteps(s modelState) {
	for x := range 2 {
		n := &s.n[x]
		y := 1 - x
		if !n.up {
			continue
		}
		// A host refuses for a process that is dead; that takes the link in both directions.
		dead := !s.n[y].up && !s.cut[0] && !s.cut[1]
		if !n.leaving && m.loner(&s, x, dead).alone() {
			t := s
			t.n[x].leaving = true
			if !m.rules.noLeaving {
				t.beat = beatState{from: nobody}
			}
			m.add(s, t, "%c decides to go alone", 'A'+x)
		}
		if !n.leaving {
			continue
		}
		t := s
		who, _, pending := n.primary()
		if who == nobody || pending && !m.rules.offOnApply || !slices.Equal(n.group(), []int{nodeA, nodeB}) {
			t.n[x].leaving = false
			m.add(s, t, "%c finds that the rule does not hold any more", 'A'+x)
			continue
		}
		kind := byte(onlyA)
		if x == nodeB {
			kind = onlyB
		}
		t.append(x, kind)
		o := &t.n[x]
		o.inc, o.commit, o.met, o.leaving, o.age = n.inc+1, uint8(o.entries()), false, false, 0
		t.leader = int8(x) // there is nobody to compete with
		what := fmt.Sprintf("%c goes alone, in incarnation %d", 'A'+x, o.inc)
		switch {
		case s.acked&^n.has() != 0:
			m.fail(s, t, what, "a node goes alone without an operation that was acknowledged")
		case s.n[y].inc >= o.inc:
			m.fail(s, t, what, "two nodes are alone")
		case o.inc <= 1+m.rules.turns:
			t.acked |= o.has()
			m.add(s, t, "%s", what)
		}
	}
}

// meetSteps: a node of a lower incarnation meets one of a higher and gives up what it holds.
func (m *model) meetSteps(s modelState) {
	for x := range s.n {
		for y := range s.n {
			if x == y || !m.talk(&s, x, y) || s.n[x].inc >= s.n[y].inc {
				continue
			}
			t := s
			t.n[x] = modelNode{up: true, inc: s.n[y].inc}
			if int(t.leader) == x {
				t.leader = nobody
			}
			m.add(s, t, "%c meets incarnation %d and gives its log up", 'A'+x, s.n[y].inc)
		}
	}
}

// run searches the whole space; it returns how many states there are, and the trace of the first violation.
func (m *model) run() (states int, trace string) {
	begin := modelState{leader: nodeA, beat: beatState{from: nobody}, term: 1}
	for i := range 2 {
		begin.n[i] = modelNode{up: true, inc: 1, log: string([]byte{onlyA, 1, both, 1, ruleA, 1}), commit: 3}
	}
	if m.rules.unpaired {
		for i := range 2 {
			begin.n[i].log, begin.n[i].commit = begin.n[i].log[:4], 2
		}
	}
	m.seen = map[modelState]modelStep{begin: {}}
	m.queue = []modelState{begin}
	for i := 0; i < len(m.queue) && m.broken == ""; i++ {
		m.expand(m.queue[i])
	}
	if m.broken == "" {
		return len(m.seen), ""
	}
	var steps []string
	for s := m.last; s != begin; s = m.seen[s].from {
		steps = append(steps, m.seen[s].what)
	}
	slices.Reverse(steps)
	return len(m.seen), strings.Join(append(steps, "=> "+m.broken), "\n  ")
}

// The bounds that fit into a quick run. An operation that is lost shows with one operation; lost messages need no cut, for every step may
// be late for ever.
var (
	modelOfTwo   = modelRules{ops: 1, kills: 2, cuts: 2, elections: 1, turns: 1}
	modelOfThree = modelRules{ops: 1, kills: 1, turns: 1, third: true}
	modelOfStart = modelRules{ops: 1, kills: 1, turns: 1, third: true, unpaired: true}
)

// TestTwoNodeModel: no interleaving breaks the rule of two nodes, transitions to and from three included.
func TestTwoNodeModel(t *testing.T) {
	if underRace {
		t.Skip("one goroutine goes through all states of a model: the race detector has nothing to see, and makes it minutes")
	}
	exhaust(t, map[string]modelRules{"two": modelOfTwo, "three": modelOfThree, "from the start": modelOfStart})
}

// TestLongTwoNodeModel is the same with wider bounds.
func TestLongTwoNodeModel(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("set COPPICE_LONG=1, or make test-long")
	}
	exhaust(t, map[string]modelRules{
		"two, more elections": {ops: 1, kills: 2, cuts: 2, elections: 2, turns: 1},
		"two, twice alone":    {ops: 1, kills: 2, cuts: 1, elections: 1, turns: 2},
		"three, a cut":        {ops: 1, kills: 1, cuts: 1, turns: 1, third: true},
		"from the start":      {ops: 1, kills: 1, cuts: 1, turns: 1, third: true, unpaired: true},
	})
}

func exhaust(t *testing.T, spaces map[string]modelRules) {
	for name, r := range spaces {
		t.Run(name, func(t *testing.T) {
			m := &model{rules: r}
			states, trace := m.run()
			if trace != "" {
				t.Fatalf("after %d states:\n  %s", states, trace)
			}
			t.Logf("%d states, no violation", states)
		})
	}
}

// TestTwoNodeModelNeedsEachRule: without any one of the conditions something is lost; the trace says how.
func TestTwoNodeModelNeedsEachRule(t *testing.T) {
	for _, c := range []struct {
		what string
		base modelRules
		drop func(*modelRules)
	}{
		{"the primary has heard the other since it was started", modelOfTwo, func(r *modelRules) { r.noPrimaryMet = true }},
		{"the secondary was answered since it was started", modelOfTwo, func(r *modelRules) { r.noSecondaryMet = true }},
		{"the secondary needs a proof", modelOfTwo, func(r *modelRules) { r.noProof = true }},
		{"the proof is obtained in time", modelOfTwo, func(r *modelRules) { r.noWindow = true }},
		{"the secondary counts from when it asked", modelOfTwo, func(r *modelRules) { r.fromAnswer = true }},
		{"no contact while leaving", modelOfTwo, func(r *modelRules) { r.noLeaving = true }},
		{"the rule ends before a third votes", modelOfThree, func(r *modelRules) { r.noUnpair = true }},
		{"the end of the rule counts from when it is in the log", modelOfThree, func(r *modelRules) { r.offOnApply = true }},
		{"a rule that is not committed yet counts for the keeper", modelOfStart, func(r *modelRules) { r.noPending = true }},
	} {
		t.Run(c.what, func(t *testing.T) {
			r := c.base
			c.drop(&r)
			m := &model{rules: r}
			states, trace := m.run()
			if trace == "" {
				t.Fatalf("%d states without a violation: what is the rule for?", states)
			}
			t.Logf("without it, after %d states:\n  %s", states, trace)
		})
	}
}
