package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) unpinCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "unpin COMPONENT", short: "Drop what commands laid over the manifest",
		long:    "Drop what swap, move, stop, freeze, attr and bind laid over a component's manifest; inspect and plan show it.",
		example: examples("coppice unpin shop/store", ""),
		min:     1, max: 1, timeout: actTimeout, args: c.componentNames(false),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Unpin(ctx, &apiv1.UnpinRequest{Component: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				for _, x := range res.Cleared {
					fmt.Fprintf(w, "%s: dropped %s\n", res.Component, oneLine(x))
				}
				if len(res.Cleared) == 0 {
					fmt.Fprintf(w, "%s: there was nothing over its manifest\n", res.Component)
				}
			})
		},
	})
}
