package components

import (
	"strings"
	"testing"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func TestPolicyOf(t *testing.T) {
	for _, c := range []struct {
		spec *componentsv1.ComponentSpec
		want Policy
		name string
	}{
		{&componentsv1.ComponentSpec{}, Policy{TakeoverFenced, PartitionStop, KeepMajority}, Safe},
		{&componentsv1.ComponentSpec{Run: &componentsv1.Run{}}, Policy{TakeoverLeased, PartitionStop, KeepMajority}, ExactlyOne},
		{&componentsv1.ComponentSpec{Guarantee: ExactlyOne}, Policy{TakeoverLeased, PartitionStop, KeepMajority}, ExactlyOne},
		{&componentsv1.ComponentSpec{Takeover: TakeoverLeased}, Policy{TakeoverLeased, PartitionStop, KeepMajority}, ExactlyOne},
		{&componentsv1.ComponentSpec{Guarantee: AlwaysOn}, Policy{TakeoverFenced, PartitionKeep, ReconMerge}, AlwaysOn},
		{&componentsv1.ComponentSpec{OnPartition: PartitionKeep, Reconcile: ReconMerge}, Policy{TakeoverFenced, PartitionKeep, ReconMerge}, AlwaysOn},
		{
			&componentsv1.ComponentSpec{OnPartition: PartitionKeep, Reconcile: ReconNewest},
			Policy{TakeoverFenced, PartitionKeep, ReconNewest},
			"takeover: fenced, on_partition: keep, reconcile: newest",
		},
	} {
		if got := PolicyOf(c.spec); got != c.want || got.Name() != c.name || Guarantee(c.spec) != c.name {
			t.Errorf("%v: %v (%s), want %v (%s)", c.spec, got, got.Name(), c.want, c.name)
		}
	}
}

// What an artifact cannot do is refused when it is deployed; what the user left out becomes what it can.
func TestDurabilityByThePolicy(t *testing.T) {
	plain := &componentv1.Description{Type: "kv", State: &componentv1.StateSpec{Stateful: true}, Features: []string{componentv1.FeatureTxnCalls}}
	merges := &componentv1.Description{Type: "sum", State: plain.GetState(), Features: []string{componentv1.FeatureTxnCalls, componentv1.FeatureMerge}}
	for _, c := range []struct {
		spec *componentsv1.ComponentSpec
		desc *componentv1.Description
		want string // a durability, or part of the error
	}{
		{&componentsv1.ComponentSpec{Guarantee: AlwaysOn}, merges, "each-call"},
		{&componentsv1.ComponentSpec{Guarantee: AlwaysOn}, plain, "none"},
		{&componentsv1.ComponentSpec{OnPartition: PartitionKeep}, plain, "5s"},
		{&componentsv1.ComponentSpec{OnPartition: PartitionKeep, Reconcile: ReconMerge}, merges, "each-call"},
		{&componentsv1.ComponentSpec{Name: "s", OnPartition: PartitionKeep, Reconcile: ReconMerge}, plain, "reconcile of s: found merge, expected keep_majority or newest"},
		{&componentsv1.ComponentSpec{Name: "s", Guarantee: AlwaysOn, Durable: "5s"}, plain, "guarantee of s: found always-on with durable: 5s, expected durable: none, or a component with a Merge"},
	} {
		d, err := ResolveDurability(c.spec, c.desc)
		if got := DurableName(d, 0); err == nil && got != c.want || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v = %s, %v; want %s", c.spec, got, err, c.want)
		}
	}
}
