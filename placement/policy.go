package placement

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/placement/solver"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// Policy is the knobs in force: the attributes of system/placement in desired state over solver.DefaultPolicy. A value that makes no
// sense is left at its default and named in problems.
func Policy(apps []*componentsv1.Application) (policy *placementv1.Policy, problems []string) {
	policy = solver.DefaultPolicy()
	for _, app := range apps {
		if app.GetName() != components.SystemApplication {
			continue
		}
		e, err := components.EffectiveOf(app, "placement")
		if err != nil || e == nil {
			continue // Snapshot reports it
		}
		for _, name := range slices.Sorted(maps.Keys(e.Spec.GetAttributes())) {
			if err := setKnob(policy, name, e.Spec.GetAttributes()[name]); err != nil {
				problems = append(problems, fmt.Sprintf("attribute %s of %s: %v", name, components.PlacementComponent, err))
			}
		}
	}
	return policy, problems
}

// setKnob sets one field of the policy by its name from JSON text.
func setKnob(policy *placementv1.Policy, name, value string) error {
	field := policy.ProtoReflect().Descriptor().Fields().ByTextName(name)
	if field == nil {
		return nil // an attribute of a solver of the user's own
	}
	text, err := json.Marshal(map[string]json.RawMessage{name: json.RawMessage(value)})
	if err != nil {
		return fmt.Errorf("found %s, expected a number", value)
	}
	var one placementv1.Policy
	if err := protojson.Unmarshal(text, &one); err != nil {
		return fmt.Errorf("found %s, expected a number", value)
	}
	v := one.ProtoReflect().Get(field)
	if one.GetMoveCost() < 0 || one.GetMoveCostPerMib() < 0 || one.GetMinSettledMs() < 0 || one.GetFreshMs() < 0 || one.GetStaleMs() < 0 {
		return fmt.Errorf("found %s, expected a number that is not negative", value)
	}
	next := proto.CloneOf(policy)
	next.ProtoReflect().Set(field, v)
	proto.Reset(policy)
	proto.Merge(policy, next)
	return nil
}
