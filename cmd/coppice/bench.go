package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/internal/bench"
	"github.com/coppice-project/coppice/internal/cluster"
)

func (c *cli) benchCmd() *cobra.Command {
	var runs, nodes int
	var profile, size, standby string
	var place bench.PlacementConfig
	var about strings.Builder
	for _, n := range bench.Names() {
		fmt.Fprintf(&about, "  %-10s %s\n", n, bench.About(n))
	}
	cmd := c.command(spec{
		group: groupTool, use: "bench WHAT", short: "Measure what the platform promises, on this machine",
		long: "Measure what the platform promises in time, with real processes and beside a baseline where there is one. Figures count on a quiet\n" +
			"machine only; ratios compare. A benchmark that loses or doubles an answered write fails.\n\n" + about.String() +
			"  placement  the solvers of placement: value, bound, gap, proof, time and memory for each instance; solutions where asked\n" +
			"  all        all of them but scale and placement, which take many minutes; one document each",
		example: examples(
			"coppice bench failover", "",
			"coppice bench swap --runs 20 -o json", "for a script",
			"coppice bench checkpoint --size 1GiB --runs 3", "how much memory it takes",
			"coppice bench failover --size 256MiB --standby hot", "with a process that waits with the state",
			"coppice bench placement --generate --deadline 500ms", "instances of its own",
			"coppice bench placement --instances in --solutions out", "those of a folder",
			"coppice bench placement --trace day.json.gz", "policies of redeployment, played on a trace",
			"coppice bench placement --generate --trace calm.json.gz --trace event.json.gz", "on drawn ones",
			"coppice bench all", ""),
		min: 1, max: 1, args: func(context.Context, []string) []string { return append(bench.Names(), "placement", "all") },
		run: func(ctx context.Context, args []string) error {
			if args[0] == "placement" {
				return c.benchPlacement(ctx, place)
			}
			bytes, err := benchSize(args[0], size)
			if err != nil {
				return err
			}
			return c.bench(ctx, args[0], bench.Config{Runs: runs, Nodes: nodes, Profile: profile, Size: bytes, Standby: standby})
		},
	})
	cmd.Flags().StringVar(&place.Instances, "instances", "", "of placement: folder of instances, .json and .json.gz; with --generate they are written there")
	cmd.Flags().StringVar(&place.Solutions, "solutions", "", "of placement: folder to write solutions to")
	cmd.Flags().BoolVar(&place.Generate, "generate", false, "of placement: draw instances, or traces where some are named")
	cmd.Flags().StringSliceVar(&place.Traces, "trace", nil, "of placement: play policies of redeployment on this trace, .json or .json.gz, instead (several: again)")
	cmd.Flags().IntVar(&place.Starts, "starts", 3, "of placement with --trace: groups to begin from; the figures are means")
	cmd.Flags().Uint64Var(&place.Seed, "seed", 1, "of placement: what is drawn, and the order in which the solvers search")
	cmd.Flags().DurationVar(&place.Deadline, "deadline", time.Second, "of placement: time for each instance")
	cmd.Flags().BoolVar(&place.CPUTime, "cpu-time", false, "of placement: count CPU time instead, on a machine that is busy with other things")
	cmd.Flags().IntVar(&runs, "runs", 10, "samples of each figure")
	cmd.Flags().StringVar(&profile, "profile", "", "lan or wan, of traffic (default both) and scale (default lan)")
	cmd.Flags().StringVar(&size, "size", "", "of failover, checkpoint and move: the component's state, such as 256MiB (default 1MiB, 64MiB, 64MiB)")
	cmd.Flags().StringVar(&standby, "standby", "", "of failover: how ready the next owner is, cold, warm or hot (default cold)")
	cmd.Flags().IntVar(&nodes, "nodes", 0, "of scale (default 250, which take a minute of CPU; time and memory grow with their square)")
	return cmd
}

func (c *cli) bench(ctx context.Context, what string, cfg bench.Config) error {
	names := []string{what}
	if what == "all" {
		names = slices.DeleteFunc(bench.Names(), func(n string) bool { return n == "scale" }) // which takes many minutes
	} else if bench.About(what) == "" {
		return usagef("there is no benchmark %q: want %s, placement or all", what, strings.Join(bench.Names(), ", "))
	}
	if cfg.Runs < 1 || cfg.Runs > 1000 {
		return usagef("--runs %d: want 1 to 1000", cfg.Runs)
	}
	if cfg.Nodes != 0 && (cfg.Nodes < 8 || what != "scale") {
		return usagef("--nodes %d: it is for scale, and at least 8", cfg.Nodes)
	}
	if cfg.Profile != "" && (what != "scale" && what != "traffic" || cfg.Profile != "lan" && cfg.Profile != "wan") {
		return usagef("--profile %q: it is lan or wan, for traffic and scale", cfg.Profile)
	}
	if cfg.Standby != "" && (what != "failover" || !slices.Contains([]string{components.StandbyCold, components.StandbyWarm, components.StandbyHot}, cfg.Standby)) {
		return usagef("--standby %q: it is cold, warm or hot, for failover", cfg.Standby)
	}
	bin, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this binary: %w", err)
	}
	if err := cluster.EnterUserNamespace(bin); err != nil {
		return err
	}
	cfg.Binary, cfg.Progress = bin, c.err
	if c.json() {
		cfg.Progress = io.Discard
	}
	var failures []string
	for _, n := range names {
		rep, err := bench.Run(ctx, n, cfg)
		if rep != nil && len(rep.Results) > 0 {
			if err := c.benchReport(rep); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			failures = append(failures, n+": "+err.Error())
		}
	}
	if len(failures) > 0 {
		return &failure{what: "bench", why: fmt.Sprintf("%d of %d failed", len(failures), len(names)), details: failures}
	}
	return nil
}

func (c *cli) benchReport(rep *bench.Report) error {
	if c.json() {
		raw, err := json.Marshal(rep)
		if err != nil {
			return fmt.Errorf("print the report: %w", err)
		}
		return c.document(raw)
	}
	t := c.table("FIGURE", "UNIT", "MEDIAN", "P99", "MIN", "MAX", "BASELINE", "RATIO")
	for _, r := range rep.Results {
		base, ratio := "-", "-"
		if r.Baseline != nil && r.Ratio != nil {
			base, ratio = fmt.Sprintf("%s (%s)", figure(*r.Baseline), r.Against), figure(*r.Ratio)
		}
		t.row(r.Name, r.Unit, figure(r.Median), figure(r.P99), figure(r.Min), figure(r.Max), base, ratio)
	}
	return c.text(func(w io.Writer) {
		fmt.Fprintf(w, "bench %s · %s · %d runs\n", rep.Bench, rep.Machine, rep.Runs)
		t.write(w)
	})
}

// figure is a number as people read it.
func figure(x float64) string {
	switch {
	case x == float64(int64(x)):
		return fmt.Sprintf("%.0f", x)
	case x >= 100:
		return fmt.Sprintf("%.0f", x)
	}
	return fmt.Sprintf("%.3g", x)
}

// benchSize reads --size.
func benchSize(what, size string) (int64, error) {
	if size == "" {
		return 0, nil
	}
	if !slices.Contains([]string{"failover", "checkpoint", "move"}, what) {
		return 0, usagef("--size %s: it is for failover, checkpoint and move", size)
	}
	n, err := components.ParseSize(size)
	if err != nil {
		return 0, usagef("--size %q: want a size such as 256MiB", size)
	}
	if n < 64<<10 || n > 4<<30 {
		return 0, usagef("--size %s: want 64KiB to 4GiB", size)
	}
	return int64(n), nil
}
