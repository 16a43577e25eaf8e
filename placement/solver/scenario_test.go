package solver

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/golden"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// scenario is the snapshot a file builds up. Commands:
//
//	set              input: node, component, instance, link, policy lines (name, then key=value); a second line of a name changes it
//	solve [refused]  prints the plan, with each refused node
//	apply            like solve, and the plan becomes the current one
type scenario struct {
	req   *placementv1.SolveRequest
	nodes map[string]*placementv1.Node
	comps map[string]*placementv1.Component
	insts map[string]*placementv1.Instance
}

// TestScenarios runs testdata. Rewrite with: go test ./placement/solver -run TestScenarios -rewrite
func TestScenarios(t *testing.T) {
	golden.Run(t, "testdata", func(t *testing.T) func(*testing.T, golden.Case) string {
		s := &scenario{
			req:   &placementv1.SolveRequest{Snapshot: &placementv1.Snapshot{}, Policy: DefaultPolicy()},
			nodes: map[string]*placementv1.Node{}, comps: map[string]*placementv1.Component{}, insts: map[string]*placementv1.Instance{},
		}
		return s.run
	})
}

func (s *scenario) run(t *testing.T, c golden.Case) string {
	t.Helper()
	switch c.Cmd {
	case "set":
		for line := range strings.Lines(c.Input) {
			s.set(t, c.Pos, strings.TrimSpace(line))
		}
		return "ok"
	case "solve", "apply":
		plan, err := Solve(s.req)
		if err != nil {
			return "error: " + err.Error()
		}
		checkPlan(t, s.req, plan)
		out := planText(plan, len(c.Args) > 0 && c.Args[0] == "refused")
		if c.Cmd == "apply" {
			apply(s.req, plan)
		}
		return out
	}
	t.Fatalf("%s: unknown command %s", c.Pos, c.Cmd)
	return ""
}

// apply makes a plan the current one: what moved or was placed has just settled, successors hold the state.
func apply(req *placementv1.SolveRequest, plan *placementv1.Plan) {
	by := map[string]*placementv1.Assignment{}
	for _, a := range plan.GetAssignments() {
		by[a.GetInstance()] = a
	}
	for _, c := range req.GetSnapshot().GetComponents() {
		for _, i := range c.GetInstances() {
			a := by[i.GetName()]
			if a == nil || i.GetStopped() {
				continue
			}
			if i.GetNode() != a.GetNode() {
				i.SettledMs = 0
			}
			i.Node, i.Successors = a.GetNode(), a.GetSuccessors()
			if i.GetStateBytes() > 0 && a.GetNode() != "" {
				i.Holders = append([]string{a.GetNode()}, a.GetSuccessors()...)
			}
		}
	}
}

func planText(p *placementv1.Plan, refused bool) string {
	var b strings.Builder
	fmt.Fprintf(&b, "feasible=%v objective=%.4f before=%.4f bound=%.4f optimal=%v\n", p.GetFeasible(), p.GetObjective(), p.GetObjectiveBefore(), p.GetBound(), p.GetOptimal())
	for _, a := range p.GetAssignments() {
		node := a.GetNode()
		if node == "" {
			node = "-"
		}
		fmt.Fprintf(&b, "%s -> %s (successors %s): %s\n", a.GetInstance(), node, strings.Join(a.GetSuccessors(), " "), a.GetReason())
		if len(a.GetConflict()) > 0 {
			fmt.Fprintf(&b, "  no node holds together: %s\n", strings.Join(a.GetConflict(), " + "))
			for _, r := range a.GetRemedies() {
				fmt.Fprintf(&b, "  feasible %s\n", r)
			}
		}
		if refused {
			for _, r := range a.GetRefused() {
				fmt.Fprintf(&b, "  not %s: %s: %s\n", r.GetNode(), r.GetConstraint(), r.GetDetail())
			}
		}
	}
	return b.String()
}

// set reads one line. Values with blanks stand in double quotes.
func (s *scenario) set(t *testing.T, pos, line string) {
	t.Helper()
	if line == "" {
		return
	}
	words := fields(t, pos, line)
	kind, name := words[0], ""
	var pairs [][2]string
	for _, w := range words[1:] {
		k, v, ok := strings.Cut(w, "=")
		if !ok && name == "" && kind != "policy" {
			name = w
			continue
		}
		pairs = append(pairs, [2]string{k, v})
	}
	switch kind {
	case "node":
		s.setNode(t, pos, name, pairs)
	case "component":
		s.setComponent(t, pos, name, pairs)
	case "instance":
		s.setInstance(t, pos, name, pairs)
	case "link":
		s.req.Snapshot.Links = append(s.req.Snapshot.Links, &placementv1.Link{From: name, To: pairs[0][0], RttMs: number(t, pos, pairs[1][1])})
	case "policy":
		for _, kv := range pairs {
			setField(t, pos, s.req.Policy, kv[0], kv[1])
		}
	default:
		t.Fatalf("%s: unknown %s", pos, kind)
	}
}

func (s *scenario) setNode(t *testing.T, pos, name string, pairs [][2]string) {
	n := s.nodes[name]
	if n == nil {
		n = &placementv1.Node{
			Id: name, Name: name, State: "alive", Role: "full", Platform: "linux/amd64", CpuMillis: 4000, MemoryBytes: 8 << 30, DiskBytes: 50 << 30,
			Labels: map[string]string{}, Facts: map[string]float64{},
		}
		s.nodes[name] = n
		s.req.Snapshot.Nodes = append(s.req.Snapshot.Nodes, n)
	}
	for _, kv := range pairs {
		k, v := kv[0], kv[1]
		if label, ok := strings.CutPrefix(k, "label."); ok {
			n.Labels[label] = v
		} else if fact, ok := strings.CutPrefix(k, "fact."); ok {
			n.Facts[fact] = number(t, pos, v)
		} else {
			setField(t, pos, n, k, v)
		}
	}
}

func (s *scenario) setComponent(t *testing.T, pos, name string, pairs [][2]string) {
	c := s.comps[name]
	if c == nil {
		c = &placementv1.Component{Key: name, Count: 1}
		s.comps[name] = c
		s.req.Snapshot.Components = append(s.req.Snapshot.Components, c)
	}
	for _, kv := range pairs {
		switch k, v := kv[0], kv[1]; k {
		case "require":
			c.Require = append(c.Require, v)
		case "near":
			to, rtt, _ := strings.Cut(v, ":")
			d, err := time.ParseDuration(rtt)
			if err != nil {
				t.Fatalf("%s: %v", pos, err)
			}
			c.Near, c.NearRttMs = to, float64(d)/float64(time.Millisecond)
		case "term", "soft": // value;from;to;weight;better
			p := strings.Split(v, ";")
			one := &placementv1.Term{Value: p[0], From: number(t, pos, p[1]), To: number(t, pos, p[2]), Weight: number(t, pos, p[3]), BetterHigh: p[4] == "high"}
			if k == "term" {
				c.Objective = append(c.Objective, one)
			} else {
				c.Soft = append(c.Soft, one)
			}
		case "rule": // name;expression
			name, expression, _ := strings.Cut(v, ";")
			c.Rules = append(c.Rules, &placementv1.Rule{Name: name, Expression: expression})
		case "apart":
			c.Apart = strings.Split(v, ",")
		case "together":
			c.Together = strings.Split(v, ",")
		case "anchors":
			c.Anchors = strings.Split(v, ",")
		case "calls":
			c.Calls = strings.Split(v, ",")
		case "platforms":
			c.Platforms = strings.Split(v, ",")
		default:
			setField(t, pos, c, k, v)
		}
	}
	if c.GetEachNode() {
		for _, n := range s.req.GetSnapshot().GetNodes() {
			in := s.instance(c, name+"@"+n.GetName())
			in.Pinned = n.GetId()
		}
		return
	}
	for i := range int(c.GetCount()) {
		s.instance(c, name+"-"+strconv.Itoa(i))
	}
}

func (s *scenario) instance(c *placementv1.Component, name string) *placementv1.Instance {
	if in := s.insts[name]; in != nil {
		return in
	}
	in := &placementv1.Instance{Name: name, SettledMs: 1e9}
	s.insts[name] = in
	c.Instances = append(c.Instances, in)
	return in
}

func (s *scenario) setInstance(t *testing.T, pos, name string, pairs [][2]string) {
	in := s.insts[name]
	if in == nil {
		t.Fatalf("%s: no instance %s", pos, name)
	}
	for _, kv := range pairs {
		switch k, v := kv[0], kv[1]; k {
		case "holders":
			in.Holders = strings.Split(v, ",")
		case "excluded":
			in.Excluded = strings.Split(v, ",")
		default:
			setField(t, pos, in, k, v)
		}
	}
}

// setField sets a scalar field by its protobuf name; sizes may have units.
func setField(t *testing.T, pos string, m proto.Message, name, value string) {
	t.Helper()
	if err := setByName(m, name, value); err != nil {
		t.Fatalf("%s: %v", pos, err)
	}
}

func number(t *testing.T, pos, s string) float64 {
	t.Helper()
	if v, err := strconv.ParseFloat(s, 64); err == nil {
		return v
	}
	v, err := components.ParseSize(s)
	if err != nil {
		t.Fatalf("%s: %v", pos, err)
	}
	return float64(v)
}

// fields splits at blanks outside double quotes.
func fields(t *testing.T, pos, line string) []string {
	t.Helper()
	var out []string
	var b strings.Builder
	quoted := false
	for _, r := range line + " " {
		switch {
		case r == '"':
			quoted = !quoted
		case r == ' ' && !quoted:
			if b.Len() > 0 {
				out = append(out, b.String())
			}
			b.Reset()
		default:
			b.WriteRune(r)
		}
	}
	if quoted {
		t.Fatalf("%s: a quote is open", pos)
	}
	return out
}
