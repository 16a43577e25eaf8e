package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) planCmd() *cobra.Command {
	return c.command(spec{
		group: groupApp, use: "plan FILE", short: "Show what deploy would do, and change nothing",
		long: "Show where deploy would put each instance, with its score, and why every other node was refused. Nothing is changed and nothing is\n" +
			"pushed. Ends with status 1 when no node is feasible for some instance.",
		example: examples("coppice plan app.yaml", "", "coppice plan app.yaml -o json | jq .feasible", "in a check before a merge", "coppice plan - < app.yaml", ""),
		min:     1, max: 1, timeout: actTimeout,
		run: func(ctx context.Context, args []string) error {
			m, err := c.readManifest(args[0])
			if err != nil {
				return err
			}
			local, err := m.describe()
			if err != nil {
				return err
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Plan(ctx, &apiv1.PlanRequest{File: m.name, Manifest: m.data, Artifacts: local})
			if err != nil {
				return err
			}
			if err := c.show(res, func(w io.Writer) { c.planText(w, res) }); err != nil || res.Feasible {
				return err
			}
			return &failure{what: "plan " + args[0], why: "no node is feasible for " + unplaced(res)}
		},
	})
}

func unplaced(res *apiv1.PlanResponse) string {
	n, first := 0, ""
	for _, i := range res.Components {
		if i.Node == "" {
			if n == 0 {
				first = i.Instance
			}
			n++
		}
	}
	if n > 1 {
		return fmt.Sprintf("%s and %d more", first, n-1)
	}
	return first
}

func (c *cli) planText(w io.Writer, res *apiv1.PlanResponse) {
	t := c.table("INSTANCE", "NODE", "NOW", "SCORE", "RUNNER-UP", "SUCCESSORS", "WHY")
	for _, i := range res.Components {
		node := cell{i.Node, ""}
		if i.Node == "" {
			node = cell{"nowhere", red}
		}
		up := i.RunnerUp
		if up != "" {
			up += fmt.Sprintf(" %.3f", i.RunnerUpScore)
		}
		t.row(i.Instance, node, i.Current, fmt.Sprintf("%.3f", i.Score), up, join(i.Successors), i.Reason)
	}
	t.write(w)
	for _, i := range res.Components {
		c.refusals(w, i.Instance, i.Refused)
		for _, o := range i.Overlay {
			fmt.Fprintf(w, "%s: a command laid over the manifest: %s\n", i.Instance, oneLine(o))
		}
	}
	fmt.Fprintf(w, "\nobjective %.4f (now %.4f, no plan is better than %.4f)\n", res.Objective, res.ObjectiveBefore, res.Bound)
	for _, ch := range res.Changes {
		fmt.Fprintln(w, "would", oneLine(ch))
	}
	if len(res.Changes) == 0 {
		fmt.Fprintln(w, "would change nothing")
	}
	for _, x := range res.Warnings {
		fmt.Fprintln(w, c.paint(stateColor("warning"))("warning:"), oneLine(x))
	}
}

// refusals lists the nodes that were not taken.
func (c *cli) refusals(w io.Writer, instance string, refused []*apiv1.Refusal) {
	if len(refused) == 0 {
		return
	}
	fmt.Fprintf(w, "%s was refused by\n", instance)
	t := c.fields()
	for _, r := range refused {
		t.rows = append(t.rows, []cell{{"  " + r.Node, ""}, {oneLine(r.Constraint), ""}, {oneLine(r.Detail), dim}})
	}
	t.write(w)
}
