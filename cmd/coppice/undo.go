package main

import (
	"context"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) undoCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "undo COMPONENT", short: "Go back to the previous version with the state it had",
		long:    "Go back to the version before the last swap, with the state that version had at the swap, or the present state where it can read it.",
		example: examples("coppice undo shop/store", ""),
		min:     1, max: 1, timeout: actTimeout + transferSlack, args: c.componentNames(false),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Undo(ctx, &apiv1.UndoRequest{Component: args[0], TimeoutMs: c.waitMS(actTimeout)})
			if err != nil {
				return err
			}
			return c.replaced(res)
		},
	})
}
