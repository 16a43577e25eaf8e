package main

import (
	"context"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) leaveCmd() *cobra.Command {
	return c.command(spec{
		group: groupNode, use: "leave", short: "Drain the node that answers, say goodbye and stop it",
		long: "Drain the node that answers, take it out of the cluster and stop it. Its data directory is still a member's: up brings it back, until\n" +
			"it is revoked. For a stop and a start of the same node, use down.",
		example: examples("coppice leave", "the only node here", "coppice --api n2 leave", "one of several"),
		timeout: drainTimeout + transferSlack,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			st, err := cl.Leave(ctx, &apiv1.LeaveRequest{TimeoutMs: c.waitMS(drainTimeout)})
			if err != nil {
				return err
			}
			return c.drained(st, "leave")
		},
	})
}
