package components

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// DefaultInterval is how often the state of a component is saved that has opaque or directory state and says nothing else.
const DefaultInterval = 5 * time.Second

// Bounds of an interval in "durable: 5s".
const (
	MinInterval = 100 * time.Millisecond
	MaxInterval = 24 * time.Hour
)

// How many nodes keep each checkpoint, the owner among them, where the manifest says nothing, and at most.
const (
	DefaultReplicas = 3
	MaxReplicas     = 7
)

// How ready its likely next owners keep an instance (manifest: state.standby).
const (
	StandbyCold = "cold" // they hold its pages, as holders; the first two its artifact, too
	StandbyWarm = "warm" // each of them holds both
	StandbyHot  = "hot"  // and the first of them a process that has been given the state
)

// EachNode is the count of a component that runs on every node.
const EachNode = "each-node"

// ParseDurable reads the manifest's durable: each-call, on-demand, none or an interval ("5s"). "" is unspecified.
func ParseDurable(s string) (componentsv1.Durability, time.Duration, error) {
	switch s {
	case "":
		return componentsv1.Durability_DURABILITY_UNSPECIFIED, 0, nil
	case "each-call":
		return componentsv1.Durability_DURABILITY_EACH_CALL, 0, nil
	case "on-demand":
		return componentsv1.Durability_DURABILITY_ON_DEMAND, 0, nil
	case "none":
		return componentsv1.Durability_DURABILITY_NONE, 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < MinInterval || d > MaxInterval {
		return 0, 0, fmt.Errorf("found %q, expected each-call, on-demand, none or an interval from %s to 24h such as 5s", shorten(s), MinInterval)
	}
	return componentsv1.Durability_DURABILITY_INTERVAL, d, nil
}

// DurableName is the word for a durability, as people write and read it; every is the interval.
func DurableName(d componentsv1.Durability, every time.Duration) string {
	switch d {
	case componentsv1.Durability_DURABILITY_EACH_CALL:
		return "each-call"
	case componentsv1.Durability_DURABILITY_INTERVAL:
		if every <= 0 {
			every = DefaultInterval
		}
		return every.String()
	case componentsv1.Durability_DURABILITY_ON_DEMAND:
		return "on-demand"
	case componentsv1.Durability_DURABILITY_NONE:
		return "none"
	}
	return ""
}

// DefaultDurability is what a component gets that says nothing, by the kind of its state: each-call where each call is one transaction
// with its reply (the SDK's state), else every 5 s where there is state, else none. run is the manifest's run, nil for a component; d is
// the artifact's description, nil for a program.
func DefaultDurability(d *componentv1.Description, run *componentsv1.Run) componentsv1.Durability {
	switch {
	case d == nil && run.GetStateDir() != "":
		return componentsv1.Durability_DURABILITY_INTERVAL
	case !d.GetState().GetStateful():
		return componentsv1.Durability_DURABILITY_NONE
	case slices.Contains(d.GetFeatures(), componentv1.FeatureTxnCalls):
		return componentsv1.Durability_DURABILITY_EACH_CALL
	}
	return componentsv1.Durability_DURABILITY_INTERVAL
}

// ResolveDurability is what a deploy pins: the manifest's word, else the default by the description. It fails where the artifact cannot carry the
// component's policy out.
func ResolveDurability(spec *componentsv1.ComponentSpec, d *componentv1.Description) (componentsv1.Durability, error) {
	said, _, err := ParseDurable(spec.GetDurable())
	if err != nil {
		return 0, fmt.Errorf("durable of %s: %w", spec.GetName(), err)
	}
	durable := said
	if said == componentsv1.Durability_DURABILITY_UNSPECIFIED {
		durable = DefaultDurability(d, spec.GetRun())
		p := PolicyOf(spec)
		switch {
		case spec.GetGuarantee() == AlwaysOn && !slices.Contains(d.GetFeatures(), componentv1.FeatureMerge):
			durable = componentsv1.Durability_DURABILITY_NONE
		case durable == componentsv1.Durability_DURABILITY_EACH_CALL && !p.keepsCalls():
			durable = componentsv1.Durability_DURABILITY_INTERVAL
		}
	}
	return durable, checkReconcile(spec, d, durable)
}

// LeasedBody says of a register's body whether its owner runs the instance under a lease of the arbiter (arbiter.Config.Leased).
func LeasedBody(key string, body []byte) bool {
	if !strings.HasPrefix(key, InstancePrefix) {
		return false
	}
	var b componentsv1.InstanceBody
	return proto.Unmarshal(body, &b) == nil && b.GetLeased()
}
