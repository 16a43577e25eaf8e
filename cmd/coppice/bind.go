package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) bindCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "bind COMPONENT ITF TARGET", short: "Lead a required interface to another component",
		example: examples("coppice bind shop/web store shop/store-test", "", "coppice bind web store kv/main", "from another application"),
		min:     3, max: 3, timeout: actTimeout, args: c.componentNames(false),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Bind(ctx, &apiv1.BindRequest{Component: args[0], Interface: args[1], Target: args[2]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { c.bindingsText(w, res.Bindings) })
		},
	})
}
