package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/coppice-project/coppice/internal/bench"
)

func (c *cli) benchPlacement(ctx context.Context, cfg bench.PlacementConfig) error {
	if err := cfg.Check(); err != nil {
		return usagef("%v: --instances DIR or --generate, --deadline up to 1h", err)
	}
	if !c.json() {
		cfg.Progress = func(r bench.PlacementRow) { fmt.Fprintf(c.err, "%s: %.3f s\n", r.Instance, r.Time) }
	}
	rep, err := bench.Placement(ctx, cfg)
	if rep != nil && len(rep.Rows) > 0 {
		if err := c.placementReport(rep); err != nil {
			return err
		}
	}
	if err != nil {
		return &failure{what: "bench placement", why: err.Error()}
	}
	return nil
}

func (c *cli) placementReport(rep *bench.PlacementReport) error {
	if c.json() {
		raw, err := json.Marshal(rep)
		if err != nil {
			return fmt.Errorf("print the report: %w", err)
		}
		return c.document(raw)
	}
	t := c.table("INSTANCE", "NODES", "REPLICAS", "VALUE", "BOUND", "GAP", "PROVEN", "FIRST", "BEST", "TIME", "CPU", "MEMORY", "AFTER A DEATH")
	for _, r := range rep.Rows {
		value, bound, gap, proven, replicas, death := "infeasible", "", "", "no", "", ""
		if r.Feasible {
			value, bound, gap = fmt.Sprintf("%.9f", *r.Value), fmt.Sprintf("%.6f", *r.Bound), fmt.Sprintf("%.2f %%", *r.Gap*100)
		}
		if r.Proven {
			proven = "yes"
		}
		if r.Replicas > 0 {
			replicas = fmt.Sprint(r.Replicas)
		}
		if r.Resolve != nil {
			death = fmt.Sprintf("%s, %d others moved", seconds(*r.Resolve), *r.Moved)
		}
		t.row(r.Instance, r.Nodes, replicas, value, bound, gap, proven, seconds(r.First), seconds(r.Best), seconds(r.Time), seconds(r.CPU),
			fmt.Sprintf("%.0f MiB", r.Memory), death)
	}
	return c.text(func(w io.Writer) {
		kind := ""
		if rep.CPUTime {
			kind = " of CPU time"
		}
		fmt.Fprintf(w, "bench placement · %s · %g s%s each\n", rep.Machine, rep.Deadline, kind)
		t.write(w)
	})
}

// seconds is a short time as people read it.
func seconds(v float64) string {
	if v < 1 {
		return figure(v*1000) + " ms"
	}
	return figure(v) + " s"
}
