package main

import (
	"context"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) undoCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "undo COMPONENT", short: "Go back to what was before the last swap, restore or undo",
		long: "After a swap: go back to the version before, with today's state where that version can read it, else with the state it had at the swap.\n" +
			"After a restore: go back to the state that was left. What an undo leaves is kept as an earlier checkpoint (coppice checkpoints), and\n" +
			"another undo returns to it.",
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
