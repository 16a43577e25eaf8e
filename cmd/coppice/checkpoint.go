package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) checkpointCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "checkpoint COMPONENT", short: "Save a component's state on other nodes now",
		long: "Save a component's state now. It prints when the checkpoint is acknowledged: durable on enough nodes and committed. It is kept in the\n" +
			"component's history (coppice checkpoints) under the id that is printed.",
		example: examples("coppice checkpoint shop/store", ""),
		min:     1, max: 1, timeout: actTimeout + transferSlack, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Checkpoint(ctx, &apiv1.CheckpointRequest{Component: args[0], TimeoutMs: c.waitMS(actTimeout)})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				kept := ""
				if res.Id != "" {
					kept = ", kept as " + res.Id
				}
				fmt.Fprintf(w, "%s: checkpoint %d, %s, on %s, in %s%s\n", res.Component, res.Seq, bytesText(res.Bytes), join(res.Replicas), msText(res.TookMs), kept)
			})
		},
	})
}
