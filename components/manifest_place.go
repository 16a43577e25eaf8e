package components

import (
	"fmt"
	"slices"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// placing checks the named constraints and terms of a component: what they name has to be there, numbers have to make sense, and what
// contradicts itself whatever the nodes are like is refused.
func (c *checker) placing(spec *componentsv1.ComponentSpec, path string, eachNode bool) {
	c.others("", spec.GetApart(), path+".apart")
	c.others(spec.GetName(), spec.GetTogether(), path+".together")
	for i, name := range spec.GetTogether() {
		if slices.Contains(spec.GetApart(), name) {
			c.problem(fmt.Sprintf("%s.together[%d]", path, i), "found %q here and under apart, expected it under one of them: no node could do both", shorten(name))
		}
	}
	c.nodesWithin(spec.GetWithin(), path+".within")
	c.duration(path+".max_diameter", spec.GetMaxDiameter())
	c.anchors(spec.GetAnchors(), path+".anchors")
	c.lightLoad(spec.GetLightLoad(), path+".light_load")
	c.preferences(spec.GetPrefer(), path+".prefer")
	c.preferences(spec.GetAvoid(), path+".avoid")
	if p := spec.GetPrice(); p != nil {
		c.span(path+".price", p.GetFrom(), p.GetTo())
		c.weight(path+".price", p.GetWeight())
	}
	if w := spec.GetNear().GetWeight(); w < 0 {
		c.notNegative(path+".near.weight", w)
	}
	if !eachNode {
		return
	}
	for _, key := range []string{"apart", "together", "max_diameter", "anchors"} {
		if c.said(path + "." + key) {
			c.problem(path+"."+key, "found %s with count: each-node, expected one of them: where its instances are is not chosen", key)
		}
	}
}

// others checks a list of components, without the component itself.
func (c *checker) others(itself string, names []string, path string) {
	for i, name := range names {
		p := fmt.Sprintf("%s[%d]", path, i)
		if name == itself {
			c.problem(p, "found the component itself, expected another one")
			continue
		}
		c.target(p, name, false)
	}
}

func (c *checker) nodesWithin(w *componentsv1.Within, path string) {
	if w == nil {
		return
	}
	if !labelName.MatchString(w.GetLabel()) {
		c.problem(path+".label", "found %q, expected node, zone or the name of a label", shorten(w.GetLabel()))
	}
	if len(w.GetOf()) == 0 {
		c.problem(path+".of", "found no values, expected a list such as [eu, us]")
	}
}

func (c *checker) anchors(a *componentsv1.Anchors, path string) {
	if a == nil {
		return
	}
	if len(a.GetNodes()) == 0 {
		c.problem(path+".nodes", "found no nodes, expected a list of names or ids")
	}
	from, errFrom := parseRange(a.GetFrom())
	c.wrap(path+".from", errFrom)
	to, errTo := parseRange(a.GetTo())
	c.wrap(path+".to", errTo)
	if errFrom == nil && errTo == nil && c.said(path+".to") {
		c.span(path, from, to)
	} else if !c.said(path + ".to") {
		c.problem(path+".to", "found no to, expected the duration from which on it is worth nothing, such as 500ms")
	}
	c.weight(path, a.GetWeight())
}

func (c *checker) lightLoad(l *componentsv1.LightLoad, path string) {
	if l == nil {
		return
	}
	c.notNegative(path+".load5", l.GetLoad5())
	if m := l.GetMemoryPercent(); m < 0 || m > 100 {
		c.problem(path+".memory_percent", "found %v, expected a number from 0 to 100", m)
	}
	c.atLeastOne(path+".instances", l.GetInstances())
	if l.Load5 == nil && l.MemoryPercent == nil && l.Instances == nil {
		c.problem(path, "found nothing in it, expected load5, memory_percent or instances")
	}
}

func (c *checker) preferences(all []*componentsv1.Preference, path string) {
	for i, p := range all {
		at := fmt.Sprintf("%s[%d]", path, i)
		if c.bad[at] {
			continue
		}
		switch {
		case len(p.GetNodes()) > 0 && p.GetWhere() != "" || len(p.GetNodes()) == 0 && p.GetWhere() == "":
			c.problem(at, "found both or none of nodes and where, expected one of them: nodes: [NAME, …] or where: an expression over node")
		case p.GetWhere() != "":
			c.expression(at+".where", p.GetWhere(), compileOfNode)
		}
		c.weight(at, p.GetWeight())
	}
}

// compileOfNode compiles a constraint over node.
func compileOfNode(source string) (*Expression, error) {
	e, err := CompileConstraint(source)
	if err == nil && e.OfGroup() {
		return nil, &ExpressionError{Source: source, Issues: []ExpressionIssue{{Line: 1, Col: 1, Message: "found group or link, expected an expression over node"}}}
	}
	return e, err
}

func (c *checker) span(path string, from, to float64) {
	if from >= to {
		c.problem(path+".to", "found from: %v and to: %v, expected from below to: between them the value counts from best to worst", from, to)
	}
}

func (c *checker) weight(path string, w float64) {
	if w <= 0 {
		c.problem(path+".weight", "found %v, expected a weight above zero", w)
	}
}

// parseRange reads an end of a range of durations, in milliseconds; "" and "0" are 0.
func parseRange(s string) (float64, error) {
	if s == "" || s == "0" || s == "0ms" || s == "0s" {
		return 0, nil
	}
	d, err := ParseDuration(s)
	if err != nil {
		return 0, err
	}
	return float64(d.Microseconds()) / 1000, nil
}
