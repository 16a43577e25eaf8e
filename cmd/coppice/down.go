package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) downCmd() *cobra.Command {
	var all bool
	cmd := c.command(spec{
		group: groupNode, use: "down [--all]", short: "Stop the node that answers, or the whole cluster",
		long: "Stop the node that answers: the components it ran start again elsewhere from their last checkpoints. With --all the whole\n" +
			"cluster: it is committed as paused, final checkpoints are taken, every node stops, and the next `up` of the nodes resumes in place.",
		example: examples("coppice down", "this node", "coppice down --all", "every node; nothing moves"),
		timeout: drainTimeout + transferSlack,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Down(ctx, &apiv1.DownRequest{All: all, TimeoutMs: c.waitMS(drainTimeout)})
			if err != nil {
				return err
			}
			if err := c.show(res, func(w io.Writer) { c.downText(w, res) }); err != nil {
				return err
			}
			for _, n := range res.Nodes {
				if !n.Stopped {
					return &failure{what: "stop " + n.Node, why: n.Reason, try: "coppice nodes"}
				}
			}
			return nil
		},
	})
	cmd.Flags().BoolVar(&all, "all", false, "every node of the cluster")
	return cmd
}

func (c *cli) downText(w io.Writer, res *apiv1.DownResponse) {
	for _, n := range res.Nodes {
		if n.Stopped {
			fmt.Fprintln(w, n.Node, "stops")
		}
	}
	if res.Checkpoints > 0 {
		fmt.Fprintf(w, "%s taken in %s\n", plural(int(res.Checkpoints), "final checkpoint", "final checkpoints"), msText(res.TookMs))
	}
}
