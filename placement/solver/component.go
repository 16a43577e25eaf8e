package solver

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/coppice-project/coppice/components"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// newComp evaluates what a component's constraints and objective say of each node.
func (p *problem) newComp(c *placementv1.Component) comp {
	out := comp{Component: c, static: make([]refusal, len(p.nodes)), utility: make([]float64, len(p.nodes))}
	out.moveCost, out.mibCost = p.policy.GetMoveCost(), p.policy.GetMoveCostPerMib()
	if c.MoveCost != nil {
		out.moveCost = c.GetMoveCost()
	}
	if c.MoveCostPerMib != nil {
		out.mibCost = c.GetMoveCostPerMib()
	}
	app, name, _ := strings.Cut(c.GetKey(), "/")
	facts := &components.ComponentFacts{
		Key: c.GetKey(), Application: app, Name: name, Artifact: c.GetArtifact(), Count: int64(c.GetCount()),
		CPU: float64(c.GetCpuMillis()) / 1000, MemoryMiB: float64(c.GetMemoryBytes()) / mib, DiskMiB: float64(c.GetDiskBytes()) / mib,
	}
	requires := compileAll(c.GetRequire())
	terms := compileTerms(c.GetObjective())
	if len(terms) == 0 {
		out.balance = defaultBalance
	}
	for n := range p.nodes {
		out.static[n] = refused(&p.nodes[n], c, requires, facts)
		if len(terms) == 0 {
			out.utility[n] = defaultUtility(&p.nodes[n])
		} else {
			out.utility[n] = weighted(terms, p.nodes[n].facts, facts)
		}
	}
	return out
}

// constraint is a compiled require, or why it does not compile.
type constraint struct {
	source string
	expr   *components.Expression
	err    error
}

func compileAll(sources []string) []constraint {
	out := make([]constraint, len(sources))
	for i, s := range sources {
		out[i].source = s
		out[i].expr, out[i].err = components.CompileConstraint(s)
	}
	return out
}

// anyPlatform is what the registry calls the platform of a script.
const anyPlatform = "any"

// refused is why a node is not for a component whatever else runs where; zero: it is.
func refused(n *node, c *placementv1.Component, requires []constraint, facts *components.ComponentFacts) refusal {
	if !n.receives {
		return n.refusal
	}
	if p := c.GetPlatforms(); len(p) > 0 && !slices.Contains(p, n.GetPlatform()) && !slices.Contains(p, anyPlatform) {
		return refusal{"platform", fmt.Sprintf("it is %s, the artifact has %s", n.GetPlatform(), strings.Join(c.GetPlatforms(), ", "))}
	}
	if r, ok := fits(n, c.GetCpuMillis(), c.GetMemoryBytes(), c.GetDiskBytes()); !ok {
		return r
	}
	for _, r := range requires {
		if r.err != nil {
			return refusal{"require " + r.source, "it does not compile: " + r.err.Error()}
		}
		switch ok, err := r.expr.Holds(n.facts, facts); {
		case err != nil:
			return refusal{"require " + r.source, err.Error()}
		case !ok:
			return refusal{"require " + r.source, "it is false there"}
		}
	}
	if c.GetSpread() != "" {
		if _, ok := spreadValue(n, c.GetSpread()); !ok {
			return refusal{"spread", "it has no label " + c.GetSpread()}
		}
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

// weighted is the weighted mean of bounded deviations, in [0,1]. What is unknown of a node counts as the worst: an unobserved node is
// no candidate to prefer.
func weighted(terms []term, n *components.NodeFacts, c *components.ComponentFacts) float64 {
	var sum, weights float64
	for _, t := range terms {
		weights += t.weight
		v, err := t.expr.Value(n, c)
		if err != nil {
			continue
		}
		sum += t.weight * deviation(v, t.from, t.to, t.high)
	}
	return sum / weights
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
	load, memory := 0.5, 0.5
	facts := n.GetFacts()
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
	return (2*load + memory) / 3
}
