package placement

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// Memory is what a coordinator knows besides the view.
type Memory struct {
	Now time.Time
	// Since is when the coordinator first saw an instance's current epoch. Without one an instance counts as moved now.
	Since map[string]time.Time
	// Avoid lists the nodes an instance failed on lately.
	Avoid map[string][]string
}

// Snapshot is the solver's input, and what each of its instances should be. It is pure: the same view and memory give the same
// snapshot. Applications whose desired state cannot be read are left out and named in problems.
func Snapshot(v View, m Memory) (snap *placementv1.Snapshot, expected map[string]components.InstanceSpec, problems []string) {
	snap = &placementv1.Snapshot{Incarnation: v.Incarnation, Index: v.Index, Links: slices.Clone(v.Links)}
	var members []components.Node
	for _, n := range v.Nodes {
		snap.Nodes = append(snap.Nodes, n.Node)
		if n.GetState() != "left" {
			members = append(members, components.Node{ID: n.GetId(), Name: n.GetName(), Role: n.GetRole()})
		}
	}
	slices.SortFunc(snap.Nodes, func(a, b *placementv1.Node) int { return cmp.Compare(a.GetId(), b.GetId()) })
	slices.SortFunc(snap.Links, func(a, b *placementv1.Link) int {
		return cmp.Or(cmp.Compare(a.GetFrom(), b.GetFrom()), cmp.Compare(a.GetTo(), b.GetTo()))
	})
	registers := map[string]Register{}
	for _, r := range v.Instances {
		registers[r.Instance] = r
	}
	expected = map[string]components.InstanceSpec{}
	apps := slices.Clone(v.Applications)
	slices.SortFunc(apps, func(a, b *componentsv1.Application) int { return cmp.Compare(a.GetName(), b.GetName()) })
	for _, app := range apps {
		specs, err := components.Expected(app, members)
		if err != nil {
			problems = append(problems, fmt.Sprintf("application %s: %v", app.GetName(), err))
			continue
		}
		byComponent := map[string]*placementv1.Component{}
		for _, s := range specs {
			expected[s.Name] = s
			c := byComponent[s.Component.Key()]
			if c == nil {
				c = component(s.Component)
				byComponent[c.Key] = c
			}
			c.Instances = append(c.Instances, instance(s, registers[s.Name], m))
		}
		for _, key := range slices.Sorted(maps.Keys(byComponent)) {
			c := byComponent[key]
			slices.SortFunc(c.Instances, func(a, b *placementv1.Instance) int { return cmp.Compare(a.GetName(), b.GetName()) })
			snap.Components = append(snap.Components, c)
		}
	}
	return snap, expected, problems
}

func component(e *components.Effective) *placementv1.Component {
	c := &placementv1.Component{
		Key: e.Key(), Artifact: e.Digest, Platforms: e.Platforms, Count: uint32(e.Count), EachNode: e.EachNode,
		CpuMillis: e.CPUMillis, MemoryBytes: e.MemoryBytes, DiskBytes: e.DiskBytes,
		Require: e.Spec.GetRequire(), Spread: e.Spec.GetSpread(), System: e.Application == components.SystemApplication,
	}
	c.Objective, c.Soft = terms(e.Spec.GetObjective()), terms(components.Terms(e.Spec))
	for _, r := range components.Rules(e.Spec) {
		c.Rules = append(c.Rules, &placementv1.Rule{Name: r.Name, Expression: r.Expression})
	}
	c.Apart, c.Together = keys(e.Application, e.Spec.GetApart()), keys(e.Application, e.Spec.GetTogether())
	c.Calls = keys(e.Application, slices.Sorted(maps.Values(e.Spec.GetBindings())))
	c.Anchors, c.MaxInstances, c.Budget = e.Spec.GetAnchors().GetNodes(), e.Spec.GetLightLoad().GetInstances(), e.Budget
	if d, err := components.ParseDuration(e.Spec.GetMaxDiameter()); err == nil {
		c.MaxDiameterMs = float64(d) / float64(time.Millisecond)
	}
	if e.Cost != nil {
		c.MoveCost, c.MoveCostPerMib = new(e.Cost.GetMove()), new(e.Cost.GetPerMib())
	}
	if near := e.Spec.GetNear(); near != nil {
		t, errTarget := components.ParseTargetIn(e.Application, near.GetTo())
		rtt, errRTT := components.ParseDuration(near.GetRtt())
		if errTarget == nil && errRTT == nil { // a parsed manifest has both
			c.Near, c.NearRttMs, c.NearWeight = t.Key(), float64(rtt)/float64(time.Millisecond), near.GetWeight()
		}
	}
	return c
}

func terms(all []*componentsv1.Term) []*placementv1.Term {
	var out []*placementv1.Term
	for _, t := range all {
		out = append(out, &placementv1.Term{Value: t.GetValue(), From: t.GetFrom(), To: t.GetTo(), Weight: t.GetWeight(), BetterHigh: t.GetBetter() == "high"})
	}
	return out
}

// keys are the components that names within an application mean, each once.
func keys(application string, names []string) []string {
	var out []string
	for _, name := range names {
		if t, err := components.ParseTargetIn(application, name); err == nil && !slices.Contains(out, t.Key()) { // a parsed manifest has no others
			out = append(out, t.Key())
		}
	}
	return out
}

func instance(s components.InstanceSpec, r Register, m Memory) *placementv1.Instance {
	i := &placementv1.Instance{
		Name: s.Name, Node: r.Owner, Pinned: cmp.Or(s.Node, s.Pinned), StateBytes: r.StateBytes,
		Stopped:    s.Component.Stopped || r.Body.GetQuarantined(),
		Holders:    slices.Sorted(slices.Values(r.Holders)),
		Excluded:   slices.Sorted(slices.Values(m.Avoid[s.Name])),
		Successors: r.Body.GetSuccessors(),
	}
	if since, ok := m.Since[s.Name]; ok && r.Owner != "" {
		i.SettledMs = float64(max(m.Now.Sub(since), 0) / time.Millisecond)
	}
	return i
}
