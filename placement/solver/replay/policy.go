package replay

import (
	"context"
	"time"

	"github.com/coppice-project/coppice/placement/solver/group"
	"github.com/coppice-project/coppice/placement/solver/instance"
)

// exact takes the best group of each period, its cost included, with as many actions as that needs.
type exact struct {
	seed     uint64
	deadline time.Duration
}

// Decide implements Policy.
func (e *exact) Decide(ctx context.Context, g *instance.Group) []int {
	ctx, cancel := context.WithTimeout(ctx, e.deadline)
	defer cancel()
	res := group.Solve(ctx, g, group.Options{Seed: e.seed})
	if !res.Feasible {
		return current(g) // there is nothing to change to
	}
	return res.Nodes
}

// smoothed decides on an exponentially weighted mean of what the nodes were worth: the best of many noisy values is mostly the noisiest. What it expects lasts, so
// an added node need win only a part of its cost in one period.
type smoothed struct {
	exact
	weight float64 // of the newest value
	cost   float64 // share of the cost of an added node that decides
	mean   []float64
}

// Decide implements Policy.
func (s *smoothed) Decide(ctx context.Context, g *instance.Group) []int {
	if s.mean == nil {
		s.mean = worths(g)
	}
	for i, w := range worths(g) {
		s.mean[i] += s.weight * (w - s.mean[i])
	}
	e := *g
	e.Expected, e.AddCost = s.mean, g.AddCost*s.cost
	return s.exact.Decide(ctx, &e)
}

func worths(g *instance.Group) []float64 {
	out := make([]float64, g.N)
	for i := range out {
		out[i] = g.Worth(i)
	}
	return out
}
