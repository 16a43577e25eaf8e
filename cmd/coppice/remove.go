package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) removeCmd() *cobra.Command {
	var wait bool
	cmd := c.command(spec{
		group: groupApp, use: "remove APP [--wait]", short: "Stop an application and forget it with its state",
		example: examples("coppice remove shop", "", "coppice remove shop --wait", "until nothing of it runs"),
		min:     1, max: 1, timeout: actTimeout + transferSlack, args: c.applicationNames,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Remove(ctx, &apiv1.RemoveRequest{Application: args[0], Wait: wait, TimeoutMs: c.waitMS(actTimeout)})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				word := "is being removed"
				if res.Done {
					word = "is removed"
				}
				fmt.Fprintf(w, "%s %s: %s\n", res.Application, word, join(res.Components))
			})
		},
	})
	cmd.Flags().BoolVar(&wait, "wait", false, "until nothing of it runs")
	return cmd
}
