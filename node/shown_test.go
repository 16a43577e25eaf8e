package node

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// How a durability is reached is what the version can do, not what was asked for.
func TestDurableByIsWhatTheVersionCan(t *testing.T) {
	able := &componentv1.Description{Features: []string{componentv1.FeatureTxnCalls}}
	plain := &componentv1.Description{}
	for _, c := range []struct {
		durable componentsv1.Durability
		desc    *componentv1.Description
		want    string
		breaks  bool
	}{
		{componentsv1.Durability_DURABILITY_EACH_CALL, able, "txn-calls", false},
		{componentsv1.Durability_DURABILITY_EACH_CALL, plain, "interval", true},
		{componentsv1.Durability_DURABILITY_INTERVAL, plain, "interval", false},
		{componentsv1.Durability_DURABILITY_ON_DEMAND, plain, "on-demand", false},
		{componentsv1.Durability_DURABILITY_NONE, plain, "none", false},
	} {
		eff := &components.Effective{Durable: c.durable}
		if got := durableBy(eff, c.desc); got != c.want || breaksEachCall(eff, c.desc) != c.breaks {
			t.Errorf("%s with %v: %s, breaks %v", c.durable, c.desc.GetFeatures(), got, breaksEachCall(eff, c.desc))
		}
	}
}

// Corrupt pages are a warning of doctor, also when they are repaired: the disk is to be looked at.
func TestDoctorTellsOfCorruptPages(t *testing.T) {
	for _, c := range []struct {
		p    *apiv1.PageStatus
		want string
	}{
		{&apiv1.PageStatus{}, "ok"},
		{&apiv1.PageStatus{LastScrubAgeMs: proto.Uint64(1000)}, "ok"},
		{&apiv1.PageStatus{Corrupt: 2, Repaired: 2}, "warning"},
		{&apiv1.PageStatus{Corrupt: 2, Repaired: 1}, "warning"},
	} {
		got := ""
		pagesFinding(c.p, "n1", func(severity, _, _, _, _ string) { got = severity })
		if got != c.want {
			t.Errorf("%v: %s, want %s", c.p, got, c.want)
		}
	}
}
