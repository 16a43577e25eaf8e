package placement

import (
	"context"
	"fmt"

	"github.com/coppice-project/coppice/placement/solver"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// InProcess is our solver without a process of its own, for simulations and tests. A node asks the component system/placement.
type InProcess struct{}

// Solve implements Solver. A solve is not interrupted: its budget bounds it.
func (InProcess) Solve(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("solve: %w", err)
	}
	return solver.Solve(req)
}
