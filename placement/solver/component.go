package solver

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/coppice-project/coppice/components"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// newComp evaluates what a component's constraints and terms say of each node.
func (p *problem) newComp(c *placementv1.Component) comp {
	out := comp{Component: c, budget: c.Budget}
	out.moveCost, out.mibCost = p.policy.GetMoveCost(), p.policy.GetMoveCostPerMib()
	if c.MoveCost != nil {
		out.moveCost = c.GetMoveCost()
	}
	if c.MoveCostPerMib != nil {
		out.mibCost = c.GetMoveCostPerMib()
	}
	app, name, _ := strings.Cut(c.GetKey(), "/")
	if _, ok := p.apps[app]; !ok {
		p.apps[app] = len(p.apps)
	}
	out.app = p.apps[app]
	out.facts = &components.ComponentFacts{
		Key: c.GetKey(), Application: app, Name: name, Artifact: c.GetArtifact(), Count: int64(c.GetCount()),
		CPU: float64(c.GetCpuMillis()) / 1000, MemoryMiB: float64(c.GetMemoryBytes()) / mib, DiskMiB: float64(c.GetDiskBytes()) / mib,
	}
	class := classOf(c, out.facts)
	if out.class = p.classes[class]; out.class == nil {
		out.class = p.newClass(c, out.facts)
		p.classes[class] = out.class
	}
	return out
}

// class is what components have in common whose constraints and terms say the same: of thousands of components most are of few.
type class struct {
	static   []refusal    // by node; zero: none
	doubted  map[int]bool // nodes that are refused only for what old facts may be
	open     []int32      // nodes that are for it, as far as static says
	utility  []float64    // by node, in [0,1]: of the terms that do not depend on where instances are
	fixed    float64      // share of those in the utility
	balance  float64      // share of the balance term
	dynamic  float64      // share of the terms over group and link, and of being near
	terms    []term       // over group and link; their weights are shares of dynamic
	nearer   float64      // share of dynamic of being near
	grouped  []constraint
	requires []constraint // over a node
}

// classOf names the class of a component. Expressions that look at the component itself make it one of its own.
func classOf(c *placementv1.Component, facts *components.ComponentFacts) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %d %d %d %q %q %v %v", c.GetPlatforms(), c.GetCpuMillis(), c.GetMemoryBytes(), c.GetDiskBytes(), c.GetSpread(), c.GetRequire(), c.GetNear() != "", c.GetNearWeight())
	own := false
	for _, r := range c.GetRequire() {
		own = own || strings.Contains(r, "component")
	}
	for _, r := range c.GetRules() {
		fmt.Fprintf(&b, " %q %q", r.GetName(), r.GetExpression())
	}
	for i, terms := range [][]*placementv1.Term{c.GetObjective(), c.GetSoft()} {
		for _, t := range terms {
			fmt.Fprintf(&b, " %d %q %v %v %v %v", i, t.GetValue(), t.GetFrom(), t.GetTo(), t.GetWeight(), t.GetBetterHigh())
			own = own || strings.Contains(t.GetValue(), "component")
		}
	}
	if own {
		fmt.Fprintf(&b, " %q %q %d", facts.Key, facts.Artifact, facts.Count)
	}
	return b.String()
}

// defaultWeight is what the default objective weighs beside named terms.
const defaultWeight = 6

func (p *problem) newClass(c *placementv1.Component, facts *components.ComponentFacts) *class {
	out := &class{doubted: map[int]bool{}, static: make([]refusal, len(p.nodes)), utility: make([]float64, len(p.nodes))}
	for _, r := range compileAll(c) {
		if r.expr != nil && r.expr.OfGroup() {
			out.grouped = append(out.grouped, r)
		} else {
			out.requires = append(out.requires, r)
		}
	}
	objective := compileTerms(c.GetObjective())
	var ofNode []term
	var fixed, balance, dynamic float64
	if len(objective) == 0 {
		fixed, balance = (1-defaultBalance)*defaultWeight, defaultBalance*defaultWeight
	}
	ours := fixed // weight of the default objective in fixed
	for _, t := range append(objective, compileTerms(c.GetSoft())...) {
		if t.expr.OfGroup() {
			out.terms = append(out.terms, t)
			dynamic += t.weight
		} else {
			ofNode = append(ofNode, t)
			fixed += t.weight
		}
	}
	if c.GetNear() != "" && c.GetNearWeight() > 0 {
		out.nearer = c.GetNearWeight()
		dynamic += out.nearer
	}
	for i := range out.terms {
		out.terms[i].weight /= dynamic
	}
	if dynamic > 0 {
		out.nearer /= dynamic
	}
	all := fixed + balance + dynamic
	out.fixed, out.balance, out.dynamic = fixed/all, balance/all, dynamic/all
	for n := range p.nodes {
		if out.static[n] = refused(&p.nodes[n], c, out.requires, facts); out.static[n].constraint == "" && p.nodes[n].doubt > 0 {
			if out.static[n] = doubtful(&p.nodes[n], out.requires, facts); out.static[n].constraint != "" {
				out.doubted[n] = true
			}
		}
		if out.static[n].constraint == "" {
			out.open = append(out.open, int32(n))
		}
		sum := 0.0
		if ours > 0 {
			sum = ours * defaultUtility(&p.nodes[n])
		}
		if len(ofNode) > 0 {
			sum += weighted(ofNode, &p.nodes[n], facts)
		}
		if fixed > 0 {
			out.utility[n] = sum / fixed
		}
	}
	return out
}

// constraint is a compiled require or named constraint, or why it does not compile.
type constraint struct {
	name   string
	source string
	expr   *components.Expression
	err    error
}

func compileAll(c *placementv1.Component) []constraint {
	var out []constraint
	add := func(name, source, of string) {
		r := constraint{name: name, source: of}
		r.expr, r.err = components.CompileConstraint(source)
		out = append(out, r)
	}
	for _, s := range c.GetRequire() {
		add("require "+s, s, "it")
	}
	for _, r := range c.GetRules() {
		add(r.GetName(), r.GetExpression(), r.GetExpression())
	}
	return out
}

// refused is why a node is not for a component whatever else runs where; zero: it is.
func refused(n *node, c *placementv1.Component, requires []constraint, facts *components.ComponentFacts) refusal {
	if !n.receives {
		return n.refusal
	}
	if r := platform(n, c); r.constraint != "" {
		return r
	}
	if r, ok := fits(n, c.GetCpuMillis(), c.GetMemoryBytes(), c.GetDiskBytes()); !ok {
		return r
	}
	for _, r := range requires {
		if v := r.on(n.facts, facts); v.constraint != "" {
			return v
		}
	}
	if c.GetSpread() != "" {
		if _, ok := spreadValue(n, c.GetSpread()); !ok {
			return refusal{"spread", "it has no label " + c.GetSpread()}
		}
	}
	return refusal{}
}

// doubtful is why a node is refused that would not be, were its facts as they say; zero: it is not.
func doubtful(n *node, requires []constraint, facts *components.ComponentFacts) refusal {
	for _, end := range n.ends {
		for _, r := range requires {
			if v := r.on(end, facts); v.constraint != "" {
				return refusal{v.constraint, v.detail + ", as far as is known: " + n.aged()}
			}
		}
	}
	return refusal{}
}

func platform(n *node, c *placementv1.Component) refusal {
	if has := c.GetPlatforms(); len(has) > 0 && !slices.Contains(has, n.GetPlatform()) && !slices.Contains(has, components.AnyPlatform) {
		return refusal{"platform", fmt.Sprintf("it is %s, the artifact has %s", n.GetPlatform(), strings.Join(c.GetPlatforms(), ", "))}
	}
	return refusal{}
}

// on is why a constraint does not hold on a node; zero: it holds.
func (r *constraint) on(n *components.NodeFacts, facts *components.ComponentFacts) refusal {
	if r.err != nil {
		return refusal{r.name, "it does not compile: " + r.err.Error()}
	}
	switch ok, err := r.expr.Holds(n, facts); {
	case err != nil:
		return refusal{r.name, err.Error()}
	case !ok:
		return refusal{r.name, r.source + " is false there"}
	}
	return refusal{}
}

// fits compares a demand with all that a node offers.
func fits(n *node, cpu, memory, disk uint64) (refusal, bool) {
	switch {
	case cpu > n.GetCpuMillis():
		return refusal{"capacity", fmt.Sprintf("cpu: %s wanted, %s offered", cores(cpu), cores(n.GetCpuMillis()))}, false
	case memory > n.GetMemoryBytes():
		return refusal{"capacity", fmt.Sprintf("memory: %s wanted, %s offered", mibs(memory), mibs(n.GetMemoryBytes()))}, false
	case disk > n.GetDiskBytes():
		return refusal{"capacity", fmt.Sprintf("disk: %s wanted, %s offered", mibs(disk), mibs(n.GetDiskBytes()))}, false
	}
	return refusal{}, true
}

func cores(millis uint64) string { return fmt.Sprintf("%g cores", float64(millis)/1000) }
func mibs(bytes uint64) string   { return fmt.Sprintf("%d MiB", (bytes+mib-1)/mib) }

// spreadValue is the value of a node that instances are spread over.
func spreadValue(n *node, spread string) (string, bool) {
	switch spread {
	case "node":
		return n.GetId(), true
	case "zone":
		return n.GetZone(), true
	}
	v, ok := n.GetLabels()[spread]
	return v, ok
}

// spread fixes how many of a component's running instances may share a value: as even as the values that have a node for it allow. With
// as many values as instances that is one each.
func (p *problem) spread(c *comp, running int) {
	if c.GetSpread() == "" || c.GetEachNode() {
		return
	}
	ids := map[string]int{}
	c.running = running
	c.value = make([]int, len(p.nodes))
	for n := range p.nodes {
		v, _ := spreadValue(&p.nodes[n], c.GetSpread())
		id, ok := ids[v]
		if !ok {
			id = len(ids)
			ids[v] = id
			c.usable = append(c.usable, 0)
		}
		c.value[n] = id
		if c.static[n].constraint == "" {
			c.usable[id]++
		}
	}
	c.limit = c.limitWithout(-1)
}

// limitWithout is the limit as it would be without node n, -1: as it is.
func (c *comp) limitWithout(n int) int {
	values := 0
	for id, nodes := range c.usable {
		if n >= 0 && c.value[n] == id && c.static[n].constraint == "" {
			nodes--
		}
		if nodes > 0 {
			values++
		}
	}
	values = max(values, 1)
	return max((c.running+values-1)/values, 1)
}

// term is one part of an objective.
type term struct {
	expr   *components.Expression
	from   float64
	to     float64
	weight float64
	high   bool
}

// compileTerms leaves out what cannot count: a term without weight or range, and one that does not compile (a manifest with such a term
// is refused; this is for requests of others).
func compileTerms(in []*placementv1.Term) []term {
	var out []term
	for _, t := range in {
		if t.GetWeight() <= 0 || t.GetFrom() >= t.GetTo() {
			continue
		}
		expr, err := components.CompileTerm(t.GetValue())
		if err != nil {
			continue
		}
		out = append(out, term{expr, t.GetFrom(), t.GetTo(), t.GetWeight(), t.GetBetterHigh()})
	}
	return out
}

// weighted is the sum of bounded deviations by their weights. What is unknown of a node counts as the worst: an unobserved node is
// no candidate to prefer. What may be one thing or another counts as the worse of them.
func weighted(terms []term, n *node, c *components.ComponentFacts) float64 {
	sum := 0.0
	for _, t := range terms {
		v, err := t.expr.Value(n.facts, c)
		if err != nil {
			continue
		}
		worth := deviation(v, t.from, t.to, t.high)
		for _, end := range n.ends {
			if v, err = t.expr.Value(end, c); err != nil {
				worth = 0
				break
			}
			worth = math.Min(worth, deviation(v, t.from, t.to, t.high))
		}
		sum += t.weight * worth
	}
	return sum
}

// deviation maps a value to [0,1] by where it lies in its range (Rhizoma's util_value for one value).
func deviation(v, from, to float64, high bool) float64 {
	x := (math.Max(math.Min(v, to), from) - from) / (to - from)
	if !high {
		x = 1 - x
	}
	return x
}

// defaultBalance is the weight of balance in the default objective; load counts two thirds of the rest, free memory one third.
const defaultBalance = 0.5

// defaultUtility is the part of the default objective that does not depend on placement. What is unknown counts as the middle.
func defaultUtility(n *node) float64 {
	load, memory := n.ofFacts(n.facts.Facts)
	for _, end := range n.ends {
		l, m := n.ofFacts(end.Facts)
		load, memory = math.Min(load, l), math.Min(memory, m)
	}
	return (2*load + memory) / 3
}

func (n *node) ofFacts(facts map[string]float64) (load, memory float64) {
	load, memory = 0.5, 0.5
	v, ok := facts["load5"]
	if !ok {
		v, ok = facts["load1"]
	}
	if ok {
		load = deviation(v/math.Max(float64(n.GetCpuMillis())/1000, 1), 0, 2, false)
	}
	if v, ok := facts["free_mib"]; ok && n.GetMemoryBytes() > 0 {
		memory = deviation(v*mib/float64(n.GetMemoryBytes()), 0, 1, true)
	}
	return load, memory
}
