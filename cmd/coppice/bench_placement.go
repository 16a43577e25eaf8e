package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"

	"github.com/coppice-project/coppice/internal/bench"
	"github.com/coppice-project/coppice/placement/solver/replay"
)

func (c *cli) benchPlacement(ctx context.Context, cfg bench.PlacementConfig) error {
	if err := cfg.Check(); err != nil {
		return usagef("%v: --instances DIR, --generate or --trace FILE, --deadline up to 1h", err)
	}
	if !c.json() {
		cfg.Progress = func(r bench.PlacementRow) { fmt.Fprintf(c.err, "%s: %.3f s\n", r.Instance, r.Time) }
		cfg.Played = func(r replay.Row) { fmt.Fprintf(c.err, "%s: %s\n", r.Trace, r.Policy) }
	}
	rep, err := bench.Placement(ctx, cfg)
	if rep != nil && len(rep.Rows)+len(rep.Replays) > 0 {
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
	if len(rep.Replays) > 0 {
		return c.replayReport(rep)
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

func (c *cli) replayReport(rep *bench.PlacementReport) error {
	t := c.table("TRACE", "POLICY", "NET", "AFTER", "BEFORE", "ADDS", "REDEPLOYS", "INFEASIBLE", "IN EVENT", "GHZ BEFORE/HIT/IN", "RECOVERY", "SOLVE MEAN/MAX")
	for _, r := range rep.Replays {
		event, ghz, recovery := "", fmt.Sprintf("%.2f", r.GHzBefore), ""
		if r.InEvent != nil {
			event, ghz = fmt.Sprintf("%.4f", *r.InEvent), fmt.Sprintf("%.2f / %.2f / %.2f", r.GHzBefore, *r.GHzAtHit, *r.GHzEvent)
			switch *r.NotBack {
			case 0:
				recovery = fmt.Sprintf("%.1f", *r.Recovery)
			case r.Starts:
				recovery = "never"
			default:
				recovery = fmt.Sprintf("%.1f, %d of %d never", *r.Recovery, *r.NotBack, r.Starts)
			}
		}
		t.row(r.Trace, r.Policy, fmt.Sprintf("%.4f", r.Net), fmt.Sprintf("%.4f", r.After), fmt.Sprintf("%.4f", r.Before), fmt.Sprintf("%.1f", r.Adds),
			fmt.Sprintf("%.1f", r.Redeploys), fmt.Sprintf("%.1f / %.1f", r.InfeasibleBefore, r.InfeasibleAfter), event, ghz, recovery,
			seconds(math.Round(r.SolveMean*1e5)/1e5)+" / "+seconds(math.Round(r.SolveMax*1e5)/1e5))
	}
	return c.text(func(w io.Writer) {
		fmt.Fprintf(w, "bench placement · %s · mean of %d starts\n", rep.Machine, rep.Replays[0].Starts)
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
