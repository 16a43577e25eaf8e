package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) revokeCmd() *cobra.Command {
	return c.command(spec{
		group: groupNode, use: "revoke NODE", short: "Expel a node and forbid it to come back",
		long: "Expel a node and forbid its identity to come back, with whatever token. What it ran starts elsewhere from the last acknowledged\n" +
			"checkpoints. To take a healthy node out, use drain and leave.",
		example: examples("coppice revoke n4", "its machine was stolen"),
		min:     1, max: 1, timeout: actTimeout, args: c.nodeNames(0),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Revoke(ctx, &apiv1.RevokeRequest{Node: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { fmt.Fprintf(w, "%s (%s) is expelled\n", res.Node, res.Id) })
		},
	})
}
