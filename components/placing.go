package components

import (
	"fmt"
	"strconv"
	"strings"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// Rule is a named constraint as an expression over a node.
type Rule struct{ Name, Expression string }

// Rules are the constraints that a component's named ones say of each node.
func Rules(spec *componentsv1.ComponentSpec) []Rule {
	var out []Rule
	if w := spec.GetWithin(); w != nil {
		values := make([]string, len(w.GetOf()))
		for i, v := range w.GetOf() {
			values[i] = strconv.Quote(v)
		}
		in := " in [" + strings.Join(values, ", ") + "]"
		switch w.GetLabel() {
		case "zone":
			out = append(out, Rule{"within", "node.zone" + in})
		case "node":
			out = append(out, Rule{"within", "node.name" + in + " || node.id" + in})
		default:
			out = append(out, Rule{"within", "node.labels[" + strconv.Quote(w.GetLabel()) + "]" + in})
		}
	}
	if l := spec.GetLightLoad(); l != nil {
		if l.Load5 != nil {
			out = append(out, Rule{"light_load", "node.load5 <= " + decimal(l.GetLoad5())})
		}
		if l.MemoryPercent != nil {
			out = append(out, Rule{"light_load", "100.0 * (1.0 - node.free_mib / node.memory_mib) <= " + decimal(l.GetMemoryPercent())})
		}
	}
	return out
}

func decimal(v float64) string {
	s := strconv.FormatFloat(v, 'f', -1, 64)
	if !strings.Contains(s, ".") {
		s += ".0"
	}
	return s
}

// Terms are the terms of utility that a component's named ones stand for, besides its objective.
func Terms(spec *componentsv1.ComponentSpec) []*componentsv1.Term {
	var out []*componentsv1.Term
	prefer := func(all []*componentsv1.Preference, better string) {
		for _, p := range all {
			value := p.GetWhere()
			if value == "" {
				names := make([]string, len(p.GetNodes()))
				for i, n := range p.GetNodes() {
					names[i] = strconv.Quote(n)
				}
				list := "[" + strings.Join(names, ", ") + "]"
				value = fmt.Sprintf("node.name in %s || node.id in %s", list, list)
			}
			out = append(out, &componentsv1.Term{Value: value, From: 0, To: 1, Weight: p.GetWeight(), Better: better})
		}
	}
	prefer(spec.GetPrefer(), "high")
	prefer(spec.GetAvoid(), "low")
	if p := spec.GetPrice(); p != nil {
		out = append(out, &componentsv1.Term{Value: "node.price", From: p.GetFrom(), To: p.GetTo(), Weight: p.GetWeight(), Better: "low"})
	}
	if a := spec.GetAnchors(); a != nil {
		from, errFrom := parseRange(a.GetFrom())
		to, errTo := parseRange(a.GetTo())
		if errFrom == nil && errTo == nil { // a parsed manifest has both
			out = append(out, &componentsv1.Term{Value: "group.anchor_ms", From: from, To: to, Weight: a.GetWeight(), Better: "low"})
		}
	}
	return out
}
