package placement

import (
	"slices"
	"testing"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// Who is named first stays so where it keeps a process ready, whatever order noise gives, unless another one is in another zone, or it is not to be named at all.
func TestWhoKeepsAProcessReadyStaysFirst(t *testing.T) {
	d := &decider{nodes: map[string]Node{}}
	for id, zone := range map[string]string{"o": "x", "a": "x", "b": "x", "c": "y", "e": "y"} {
		d.nodes[id] = Node{Node: &placementv1.Node{Id: id, Zone: zone}}
	}
	for _, c := range []struct {
		standby         string
		was, next, want []string
	}{
		{components.StandbyHot, []string{"a", "b"}, []string{"b", "a"}, []string{"a", "b"}},
		{components.StandbyHot, []string{"c", "a"}, []string{"e", "a", "c"}, []string{"c", "e", "a"}},
		{components.StandbyHot, []string{"a", "b"}, []string{"c", "a"}, []string{"c", "a"}}, // it is in another zone than the owner
		{components.StandbyHot, []string{"a", "b"}, []string{"b"}, []string{"b"}},
		{components.StandbyHot, nil, []string{"b", "a"}, []string{"b", "a"}},
		{components.StandbyWarm, []string{"a", "b"}, []string{"b", "a"}, []string{"b", "a"}},
		{components.StandbyCold, []string{"a", "b"}, []string{"b", "a"}, []string{"b", "a"}},
	} {
		spec := components.InstanceSpec{Component: &components.Effective{Standby: c.standby}}
		r := Register{Owner: "o", Body: &componentsv1.InstanceBody{Successors: c.was}}
		if got := d.steady(spec, r, slices.Clone(c.next)); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v were named, the solver says %v: %v, want %v", c.standby, c.was, c.next, got, c.want)
		}
	}
}
