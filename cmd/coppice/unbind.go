package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) unbindCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "unbind COMPONENT ITF", short: "Cut a required interface from its target",
		example: examples("coppice unbind shop/web recommendations", ""),
		min:     2, max: 2, timeout: actTimeout, args: c.componentNames(false),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Unbind(ctx, &apiv1.UnbindRequest{Component: args[0], Interface: args[1]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { c.bindingsText(w, res.Bindings) })
		},
	})
}
