package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) moveCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "move COMPONENT NODE", short: "Move a running component to another node, with its state",
		long: "Move a running component to another node while it serves; prints the pause, the bytes and the calls delayed. It stays there until\n" +
			"unpin.",
		example: examples("coppice move shop/store n3", "", "coppice move shop/web-1 n2", "one instance of several"),
		min:     2, max: 2, timeout: actTimeout + transferSlack, args: both(c.componentNames(true), c.nodeNames(1)),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Move(ctx, &apiv1.MoveRequest{Component: args[0], Node: args[1], TimeoutMs: c.waitMS(actTimeout)})
			if err != nil {
				return err
			}
			if res.GetFrom() == res.GetTo() {
				return c.show(res, func(w io.Writer) {
					fmt.Fprintf(w, "%s: runs on %s already, and stays there until unpin\n", res.Component, res.To)
				})
			}
			return c.replaced(res)
		},
	})
}
