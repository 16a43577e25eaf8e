package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) whyCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "why COMPONENT", short: "Show why a component is where it is",
		long: "Show the recorded decision: the objective before and after, the runner-up, and every refused node with its reason.\n" +
			"Where no node is feasible it says which constraints no node holds together, and what would help.",
		example: examples("coppice why shop/store", "", "coppice why shop/web-2 -o json", ""),
		min:     1, max: 1, timeout: readTimeout, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Why(ctx, &apiv1.WhyRequest{Component: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				for _, d := range res.Decisions {
					c.decisionText(w, d)
				}
				if len(res.Decisions) == 0 {
					fmt.Fprintln(w, res.Component, "has never been placed")
				}
			})
		},
	})
}

func (c *cli) decisionText(w io.Writer, d *apiv1.Decision) {
	node := d.Node
	if node == "" {
		node = "no node"
	}
	fmt.Fprintf(w, "%s is on %s: %s\n", c.paint(bold)(d.Instance), c.paint(bold)(node), oneLine(d.Reason))
	t := c.fields()
	decided := "by " + d.Trigger
	if d.DecidedBy != "" {
		decided += " on " + d.DecidedBy
	}
	if d.Time != nil {
		decided += ", " + c.sinceText(d.Time) + " ago"
	}
	if d.Cause != "" {
		decided += ": " + d.Cause
	}
	t.field("  decided", decided)
	if d.PreviousNode != "" && d.PreviousNode != d.Node {
		t.field("  came from", d.PreviousNode)
	}
	t.field("  epoch", d.Epoch)
	objective := fmt.Sprintf("%.4f → %.4f", d.ObjectiveBefore, d.Objective)
	if d.Optimal || d.Bound > 0 {
		objective += ", " + gapText(d.Objective, d.Bound, d.Optimal)
	}
	t.field("  objective", objective)
	t.field("  score", fmt.Sprintf("%.4f", d.Score))
	if d.RunnerUp != "" {
		t.field("  runner-up", fmt.Sprintf("%s with %.4f", d.RunnerUp, d.RunnerUpScore))
	}
	t.field("  successors", join(d.Successors))
	t.write(w)
	c.refusals(w, "  it", d.Refused)
	conflictText(w, "  it", d.Conflict, d.Remedies)
}
