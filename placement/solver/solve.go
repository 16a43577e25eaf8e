package solver

import (
	"errors"
	"fmt"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// Limits of one request.
const (
	MaxNodes     = 10_000
	MaxInstances = 50_000
	// MaxRefusals bounds the refused nodes listed in one plan, shared evenly (at least leastRefusals an instance): a plan has to fit into a
	// message. The count of each constraint is in an instance's reason all the same.
	MaxRefusals   = 20_000
	leastRefusals = 8
)

// evaluationsPerMs is what one millisecond of the policy's budget allows: about what one slow core does.
const evaluationsPerMs = 10_000

// DefaultPolicy is used where the request has none.
func DefaultPolicy() *placementv1.Policy {
	return &placementv1.Policy{
		MoveCost:       0.012, // Rhizoma §3.3
		MoveCostPerMib: 0.0001,
		MaxMoves:       2,
		MinSettledMs:   120_000,
		Successors:     3,
		BudgetMs:       200,
	}
}

// Solve proposes where each instance of the snapshot should run. It fails only on a request that makes no sense (no snapshot, two nodes
// of one id, two instances of one name, too many); an instance without a feasible node is part of an answer.
func Solve(req *placementv1.SolveRequest) (*placementv1.Plan, error) {
	p, err := newProblem(req)
	if err != nil {
		return nil, fmt.Errorf("solve: %w", err)
	}
	s := newState(p)
	before := s.result()
	s.construct()
	optimal := s.search(req.GetSnapshot().GetSeed())
	if after := s.result(); worse(after, before) {
		s = newState(p)
	}
	return explain(p, s, before, optimal), nil
}

// result is what plans are compared by.
type result struct {
	unsatisfied int
	objective   float64
}

func worse(a, b result) bool {
	if a.unsatisfied != b.unsatisfied {
		return a.unsatisfied > b.unsatisfied
	}
	return a.unsatisfied == 0 && a.objective < b.objective-epsilon
}

// epsilon is the least improvement that counts: below it are rounding errors.
const epsilon = 1e-9

// Verify checks a plan against the hard constraints of its request, whoever made it. Instances that stay where they are are not held
// against the plan: they may be waiting for a move.
func Verify(req *placementv1.SolveRequest, plan *placementv1.Plan) error {
	p, err := newProblem(req)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	s := newState(p) // what the plan does not name stays where it is
	var errs []error
	seen := map[string]bool{}
	type placed struct{ inst, node int }
	var fresh []placed
	for _, a := range plan.GetAssignments() {
		i, ok := p.instOf[a.GetInstance()]
		if !ok || seen[a.GetInstance()] {
			errs = append(errs, fmt.Errorf("%s: named twice or not asked for", a.GetInstance()))
			continue
		}
		seen[a.GetInstance()] = true
		if a.GetNode() == "" || p.insts[i].fixed {
			continue
		}
		n, ok := p.nodeOf[a.GetNode()]
		switch {
		case !ok && a.GetNode() == p.insts[i].GetNode():
		case !ok:
			errs = append(errs, fmt.Errorf("%s: node %s is not in the snapshot", a.GetInstance(), a.GetNode()))
		case n == p.insts[i].current:
		default:
			s.put(i, n)
			fresh = append(fresh, placed{i, n})
		}
	}
	for _, f := range fresh {
		s.put(f.inst, -1)
		if r, ok := s.feasible(f.inst, f.node); !ok {
			errs = append(errs, fmt.Errorf("%s on %s: %s: %s", p.insts[f.inst].GetName(), p.nodes[f.node].name, r.constraint, r.detail))
		}
		s.put(f.inst, f.node)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("the plan breaks constraints: %w", err)
	}
	return nil
}
