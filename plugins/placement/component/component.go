// Package component is system/placement as a component: the solver behind coppice.placement.v1, with the policy's knobs as attributes. The
// binary runs it as `coppice __component placement`, plugins/placement as a process of its own; a solver of a user's own takes its place
// by speaking the same service.
//
// It has no state: what it proposes depends on the request alone. It acts on nothing: the coordinator carries plans out.
//
// Goroutines: those of gRPC. Limits: maxConcurrent solves at once; the solver's own.
package component

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/placement/solver"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// Type is the component's type and, by convention, its artifact's name.
const Type = "placement"

// maxConcurrent solves: the coordinator asks for one at a time, what-if plans come besides.
const maxConcurrent = 2

// Run serves the component as this process. It does not return.
func Run(version string) { sdk.Serve(New(version)) }

// New makes the component.
func New(version string) *sdk.Component {
	k := newKnobs()
	s := &server{knobs: k, slots: make(chan struct{}, maxConcurrent)}
	return &sdk.Component{
		Type:       Type,
		Version:    version,
		Register:   func(r grpc.ServiceRegistrar) { placementv1.RegisterPlacementServer(r, s) },
		Attributes: k.all(),
	}
}

// knobs are the attributes. The coordinator sends the policy along with each request, read from the same attributes in desired state, so
// that a recorded request replays; they are used here for requests without a policy.
type knobs struct {
	moveCost, moveCostPerMiB, minSettled, fresh, stale *sdk.Attribute[float64]
	maxMoves, successors, budget                       *sdk.Attribute[uint32]
}

func newKnobs() *knobs {
	p := solver.DefaultPolicy()
	notNegative := sdk.Check(func(v float64) error {
		if v < 0 || v != v {
			return fmt.Errorf("found %v, expected a number that is not negative", v)
		}
		return nil
	})
	atMost := func(most uint32) sdk.AttributeOption[uint32] {
		return sdk.Check(func(v uint32) error {
			if v > most {
				return fmt.Errorf("found %d, expected at most %d", v, most)
			}
			return nil
		})
	}
	return &knobs{
		moveCost:       sdk.NewAttribute("move_cost", p.GetMoveCost(), notNegative),
		moveCostPerMiB: sdk.NewAttribute("move_cost_per_mib", p.GetMoveCostPerMib(), notNegative),
		minSettled:     sdk.NewAttribute("min_settled_ms", p.GetMinSettledMs(), notNegative),
		fresh:          sdk.NewAttribute("fresh_ms", p.GetFreshMs(), notNegative),
		stale:          sdk.NewAttribute("stale_ms", p.GetStaleMs(), notNegative),
		maxMoves:       sdk.NewAttribute("max_moves", p.GetMaxMoves(), atMost(1000)),
		successors:     sdk.NewAttribute("successors", p.GetSuccessors(), atMost(7)),
		budget:         sdk.NewAttribute("budget_ms", p.GetBudgetMs(), atMost(60_000)),
	}
}

func (k *knobs) all() []sdk.Attr {
	return []sdk.Attr{k.moveCost, k.moveCostPerMiB, k.minSettled, k.maxMoves, k.successors, k.budget, k.fresh, k.stale}
}

func (k *knobs) policy() *placementv1.Policy {
	return &placementv1.Policy{
		MoveCost: k.moveCost.Get(), MoveCostPerMib: k.moveCostPerMiB.Get(), MinSettledMs: k.minSettled.Get(),
		MaxMoves: k.maxMoves.Get(), Successors: k.successors.Get(), BudgetMs: k.budget.Get(),
		FreshMs: k.fresh.Get(), StaleMs: k.stale.Get(),
	}
}

type server struct {
	placementv1.UnimplementedPlacementServer
	knobs *knobs
	slots chan struct{}
}

// Solve implements coppice.placement.v1.Placement.
func (s *server) Solve(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if req.GetPolicy() == nil {
		req.Policy = s.knobs.policy()
	}
	plan, err := solver.Solve(req)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return plan, nil
}
