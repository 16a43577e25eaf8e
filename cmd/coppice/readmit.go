package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) readmitCmd() *cobra.Command {
	return c.command(spec{
		group: groupNode, use: "readmit NODE", short: "Use a quarantined or drained node again",
		long: "End a node's quarantine before its time, or a drain, for the whole cluster: the node tells all others, whichever node is asked. It must\n" +
			"run for that. What it dies of from then on counts anew.",
		example: examples("coppice readmit n3", "its bad cable was replaced"),
		min:     1, max: 1, timeout: actTimeout, args: c.nodeNames(0),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Readmit(ctx, &apiv1.ReadmitRequest{Node: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { fmt.Fprintf(w, "%s is %s\n", res.Node, res.State) })
		},
	})
}
