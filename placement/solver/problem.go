package solver

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"

	"github.com/coppice-project/coppice/components"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// problem is the request, indexed and with everything evaluated that does not depend on where instances are. Immutable once built.
type problem struct {
	policy   *placementv1.Policy
	nodes    []node // by id
	comps    []comp // by key
	insts    []inst // by name
	nodeOf   map[string]int
	instOf   map[string]int
	rtt      map[[2]int]float64 // ms, both directions
	classes  map[string]*class
	apps     map[string]int
	areas    map[string]int // numbers of zones
	limiting []int          // components that bound how many instances share a node with one of theirs
	active   int            // instances that want a node: N of the mean
	crowd    float64        // K: a node shared by more than this many others is worth nothing for balance
	scale    float64        // of the cost of moves
}

type node struct {
	*placementv1.Node
	name  string
	facts *components.NodeFacts
	ends  []*components.NodeFacts // the ends of the intervals that facts are in, by their age; none: they are as they say
	doubt float64                 // how wide those are, as a share of what they say
	area  int                     // number of its zone
	price float64                 // its label, or a fact; not a number: it has none
	// receives: it may be given instances. keeps: what runs there may stay. Neither: what ran there is lost.
	receives, keeps bool
	refusal         refusal // why it does not receive
}

// refusal is why a node is not for an instance.
type refusal struct{ constraint, detail string }

type comp struct {
	*placementv1.Component
	*class
	facts    *components.ComponentFacts
	insts    []int
	value    []int    // by node: the number of its spread value
	limit    int      // instances in one spread value; 0: no spread
	running  int      // instances that want a node
	usable   []int    // by spread value: nodes that are for it
	nears    []near   // components to be near to
	nearOf   []int    // components that are to be near this one
	apart    []int    // components that it shares no node with, whichever of the two says so
	anchors  []int    // nodes, -1: one that is not known
	calls    []int    // components that it is bound to
	sways    []int    // components with a utility that depends on where the instances of this one are
	app      int      // number of its application
	budget   *float64 // of its application
	moveCost float64
	mibCost  float64
}

// near is a component to be near to: each instance has one of it within limit ms, or on its own node.
type near struct {
	to    int
	limit float64
	same  bool
}

// within tells whether something at a distance is near enough.
func (r *near) within(p *problem, n, m int) bool {
	return n == m || !r.same && p.between(n, m) <= r.limit
}

type inst struct {
	*placementv1.Instance
	comp    int
	current int // node that owns it and is not lost, -1: none
	pin     int // node it is pinned to, where that node is feasible; -1: none
	fixed   bool
	free    bool // it has no owner to be moved from: choosing a node is no move
	locked  bool // it may not be moved for a better objective
	must    bool // it must leave current now
	why     string
	mib     float64
	holders map[int]bool
	avoid   map[int]bool
	pinNote string
}

func newProblem(req *placementv1.SolveRequest) (*problem, error) {
	snap := req.GetSnapshot()
	if snap == nil {
		return nil, errors.New("the request has no snapshot")
	}
	p := &problem{policy: req.GetPolicy(), nodeOf: map[string]int{}, instOf: map[string]int{}, rtt: map[[2]int]float64{}, classes: map[string]*class{}, apps: map[string]int{}, areas: map[string]int{}}
	if p.policy == nil {
		p.policy = DefaultPolicy()
	}
	if len(snap.GetNodes()) > MaxNodes {
		return nil, fmt.Errorf("%d nodes, at most %d", len(snap.GetNodes()), MaxNodes)
	}
	if err := p.addNodes(snap.GetNodes()); err != nil {
		return nil, err
	}
	for _, l := range snap.GetLinks() {
		a, okA := p.nodeOf[l.GetFrom()]
		b, okB := p.nodeOf[l.GetTo()]
		if okA && okB && l.GetRttMs() >= 0 { // the worse of what both ends measured
			v := math.Max(l.GetRttMs(), p.rtt[[2]int{a, b}])
			p.rtt[[2]int{a, b}], p.rtt[[2]int{b, a}] = v, v
		}
	}
	if err := p.addComponents(snap.GetComponents()); err != nil {
		return nil, err
	}
	p.measure()
	for i := range p.insts {
		p.classify(&p.insts[i])
	}
	return p, nil
}

func (p *problem) addNodes(in []*placementv1.Node) error {
	sorted := slices.Clone(in)
	slices.SortFunc(sorted, func(a, b *placementv1.Node) int { return cmp.Compare(a.GetId(), b.GetId()) })
	for _, n := range sorted {
		if _, twice := p.nodeOf[n.GetId()]; twice || n.GetId() == "" {
			return fmt.Errorf("node id %q is empty or there twice", n.GetId())
		}
		p.nodeOf[n.GetId()] = len(p.nodes)
		node := newNode(n, p.policy)
		if _, ok := p.areas[n.GetZone()]; !ok {
			p.areas[n.GetZone()] = len(p.areas)
		}
		node.area = p.areas[n.GetZone()]
		p.nodes = append(p.nodes, node)
	}
	return nil
}

const mib = 1 << 20

func newNode(n *placementv1.Node, policy *placementv1.Policy) node {
	out := node{Node: n, name: cmp.Or(n.GetName(), n.GetId()), price: math.NaN()}
	facts := finite(n.GetFacts())
	if v, err := strconv.ParseFloat(n.GetLabels()["price"], 64); err == nil && v >= 0 && !math.IsInf(v, 0) {
		facts = maps.Clone(facts)
		if facts == nil {
			facts = map[string]float64{}
		}
		facts["price"] = v
	}
	if v, ok := facts["price"]; ok {
		out.price = v
	}
	out.facts = nodeFacts(n, facts)
	out.stale(policy, facts)
	switch {
	case n.GetState() == "dead" || n.GetState() == "left":
		out.refusal = refusal{"alive", "it is " + n.GetState()}
	case n.GetState() != "alive":
		out.keeps = true
		out.refusal = refusal{"alive", "it is " + cmp.Or(n.GetState(), "of unknown state")}
	case n.GetRole() == components.RoleVoter:
		out.refusal = refusal{"role", "it votes only and runs no components"}
		out.keeps = true
	case n.GetDraining():
		out.refusal = refusal{"draining", "it is being drained"}
		out.keeps = true
	default:
		out.keeps, out.receives = true, true
	}
	return out
}

func nodeFacts(n *placementv1.Node, facts map[string]float64) *components.NodeFacts {
	return &components.NodeFacts{
		ID: n.GetId(), Name: n.GetName(), Zone: n.GetZone(), Role: n.GetRole(), Platform: n.GetPlatform(), State: n.GetState(),
		Draining: n.GetDraining(), Labels: n.GetLabels(), Facts: facts,
		CPU: float64(n.GetCpuMillis()) / 1000, MemoryMiB: float64(n.GetMemoryBytes()) / mib, DiskMiB: float64(n.GetDiskBytes()) / mib,
	}
}

// finite leaves out facts that are no numbers.
func finite(facts map[string]float64) map[string]float64 {
	wrong := func(_ string, v float64) bool { return math.IsNaN(v) || math.IsInf(v, 0) }
	for k, v := range facts {
		if wrong(k, v) {
			facts = maps.Clone(facts)
			maps.DeleteFunc(facts, wrong)
			break
		}
	}
	return facts
}

// stale widens what is known of a node by its age: each fact may be less or more than it says.
func (n *node) stale(policy *placementv1.Policy, facts map[string]float64) {
	age, fresh, stale := math.Abs(n.GetFactAgeMs()), policy.GetFreshMs(), policy.GetStaleMs()
	if fresh <= 0 || !(age > fresh) || len(facts) == 0 {
		return
	}
	n.doubt = 1
	if age < stale {
		n.doubt = (age - fresh) / (stale - fresh)
	}
	for _, f := range []float64{1 - n.doubt, 1 + n.doubt} {
		scaled := make(map[string]float64, len(facts))
		for k, v := range facts {
			scaled[k] = v * f
		}
		if !math.IsNaN(n.price) { // what a node costs does not age
			scaled["price"] = n.price
		}
		n.ends = append(n.ends, nodeFacts(n.Node, scaled))
	}
}

// aged says how old what is known of a node is, where that makes a difference; "": it does not.
func (n *node) aged() string {
	if n.doubt == 0 {
		return ""
	}
	age := math.Round(math.Abs(n.GetFactAgeMs()) / 1000)
	when := fmt.Sprintf("%g s old", age)
	if n.GetFactAgeMs() < 0 {
		when = fmt.Sprintf("dated %g s in the future", age)
	}
	return fmt.Sprintf("what is known of %s is %s and counts at its worse end, ±%.0f %%", n.name, when, 100*n.doubt)
}

func (p *problem) addComponents(in []*placementv1.Component) error {
	sorted := slices.Clone(in)
	slices.SortFunc(sorted, func(a, b *placementv1.Component) int { return cmp.Compare(a.GetKey(), b.GetKey()) })
	byKey := map[string]int{}
	var all []inst
	for _, c := range sorted {
		if _, twice := byKey[c.GetKey()]; twice || c.GetKey() == "" {
			return fmt.Errorf("component key %q is empty or there twice", c.GetKey())
		}
		at := len(p.comps)
		byKey[c.GetKey()] = at
		p.comps = append(p.comps, p.newComp(c))
		for _, i := range c.GetInstances() {
			all = append(all, inst{Instance: i, comp: at})
		}
	}
	if len(all) > MaxInstances {
		return fmt.Errorf("%d instances, at most %d", len(all), MaxInstances)
	}
	slices.SortFunc(all, func(a, b inst) int { return cmp.Compare(a.GetName(), b.GetName()) })
	for i := range all {
		name := all[i].GetName()
		if _, twice := p.instOf[name]; twice || name == "" {
			return fmt.Errorf("instance name %q is empty or there twice", name)
		}
		p.instOf[name] = i
		c := &p.comps[all[i].comp]
		c.insts = append(c.insts, i)
	}
	p.insts = all
	for i := range p.comps {
		p.relate(i, byKey)
	}
	return nil
}

// relate finds the components and nodes that component i names. Names of what is not there say nothing.
func (p *problem) relate(i int, byKey map[string]int) {
	c := &p.comps[i]
	nearTo := func(key string, limit float64, same bool) {
		if to, ok := byKey[key]; ok && to != i {
			c.nears = append(c.nears, near{to, limit, same})
			p.comps[to].nearOf = append(p.comps[to].nearOf, i)
		}
	}
	nearTo(c.GetNear(), c.GetNearRttMs(), false)
	for _, key := range c.GetTogether() {
		nearTo(key, 0, true)
	}
	for _, key := range c.GetApart() {
		if o, ok := byKey[key]; ok && !slices.Contains(c.apart, o) {
			c.apart = append(c.apart, o)
			if o != i {
				p.comps[o].apart = append(p.comps[o].apart, i)
			}
		}
	}
	for _, key := range c.GetCalls() {
		if to, ok := byKey[key]; ok && to != i {
			c.calls = append(c.calls, to)
		}
	}
	for _, name := range c.GetAnchors() {
		c.anchors = append(c.anchors, p.named(name))
	}
	if c.dynamic == 0 && len(c.grouped) == 0 {
		return
	}
	p.comps[i].sways = append(p.comps[i].sways, i)
	for _, to := range slices.Concat(c.calls, c.targets()) {
		if !slices.Contains(p.comps[to].sways, i) {
			p.comps[to].sways = append(p.comps[to].sways, i)
		}
	}
}

func (c *comp) targets() []int {
	out := make([]int, len(c.nears))
	for i, r := range c.nears {
		out[i] = r.to
	}
	return out
}

// named is the node of a name or id, the first by id; -1: none.
func (p *problem) named(name string) int {
	if n, ok := p.nodeOf[name]; ok {
		return n
	}
	for n := range p.nodes {
		if p.nodes[n].GetName() == name {
			return n
		}
	}
	return -1
}

// measure fixes the numbers that depend on how many instances and nodes there are.
func (p *problem) measure() {
	receiving := 0
	for i := range p.nodes {
		if p.nodes[i].receives {
			receiving++
		}
	}
	for i := range p.comps {
		c := &p.comps[i]
		if c.GetSystem() {
			continue
		}
		running := 0
		for _, j := range c.insts {
			if !p.insts[j].GetStopped() && !p.apart(&p.insts[j]) {
				running++
			}
		}
		p.active += running
		p.spread(c, running)
		c.running = running
		if c.GetMaxInstances() > 0 {
			p.limiting = append(p.limiting, i)
		}
	}
	p.crowd = float64(2*((p.active+max(receiving, 1)-1)/max(receiving, 1)) + 2)
	p.scale = CostScale / math.Max(float64(p.active), 1)
}

// CostScale is the number of instances for which the cost of a move is meant: what Rhizoma's groups had (6 to 10).
const CostScale = 8

// classify says what may be done with an instance.
func (p *problem) classify(i *inst) {
	c := &p.comps[i.comp]
	i.mib = float64(i.GetStateBytes()) / mib
	i.current, i.pin = -1, -1
	i.holders, i.avoid = p.set(i.GetHolders()), p.set(i.GetExcluded())
	if n, ok := p.nodeOf[i.GetNode()]; ok && p.nodes[n].keeps {
		i.current = n
	}
	i.free = i.current < 0
	if c.GetSystem() || i.GetStopped() || p.apart(i) {
		i.fixed = true
		return
	}
	p.pin(i, c)
	if i.current < 0 {
		return
	}
	n := &p.nodes[i.current]
	kept := c.static[i.current]
	switch {
	case i.pin >= 0 && i.pin != i.current:
		i.must, i.why = true, "it is pinned to "+p.nodes[i.pin].name
	case c.GetEachNode() && i.GetPinned() != "" && i.GetPinned() != i.GetNode():
		i.must, i.why = true, "it belongs to another node"
	case i.avoid[i.current]:
		i.must, i.why = true, "it failed there lately"
	case n.refusal.constraint == "draining" || n.refusal.constraint == "role":
		i.must, i.why = true, n.name+": "+n.refusal.detail
	case kept.constraint != "" && (!n.receives || c.doubted[i.current]): // suspect or quarantined, or only facts that grew old speak against it: may keep
	case kept.constraint != "":
		i.why = kept.constraint + ": " + kept.detail
	}
	settled := i.GetSettledMs() >= p.policy.GetMinSettledMs()
	if i.why != "" && settled {
		i.must = true
	}
	i.locked = !settled || i.pin >= 0 || c.GetEachNode() || !n.receives
}

// apart tells whether i belongs to a node that is not for it now: it waits for that node, and no other is asked.
func (p *problem) apart(i *inst) bool {
	c := &p.comps[i.comp]
	if !c.GetEachNode() {
		return false
	}
	n, ok := p.nodeOf[i.GetPinned()]
	return !ok || c.static[n].constraint != "" && !(p.nodes[n].keeps && i.GetNode() == i.GetPinned())
}

// pin settles where an instance is pinned to. A pin that cannot be kept is reported and does not keep the instance from running.
func (p *problem) pin(i *inst, c *comp) {
	if i.GetPinned() == "" {
		return
	}
	n, ok := p.nodeOf[i.GetPinned()]
	switch {
	case !ok:
		i.pinNote = "pinned to " + i.GetPinned() + ", which is no member"
	case c.GetEachNode():
		i.pin = n
	case n == i.current && c.doubted[n]:
		i.pin = n
	case n == i.current && p.nodes[n].keeps && !p.nodes[n].receives && p.nodes[n].refusal.constraint == "alive":
		i.pin = n
	case c.static[n].constraint != "":
		i.pinNote = fmt.Sprintf("pinned to %s, which is refused: %s: %s", p.nodes[n].name, c.static[n].constraint, c.static[n].detail)
	case i.avoid[n]:
		i.pinNote = "pinned to " + p.nodes[n].name + ", where it failed lately"
	default:
		i.pin = n
	}
}

func (p *problem) set(ids []string) map[int]bool {
	if len(ids) == 0 {
		return nil
	}
	out := make(map[int]bool, len(ids))
	for _, id := range ids {
		if n, ok := p.nodeOf[id]; ok {
			out[n] = true
		}
	}
	return out
}
