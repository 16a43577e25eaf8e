package main

import (
	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

func (c *cli) stopCmd() *cobra.Command {
	return c.lifecycle(spec{
		use: "stop COMPONENT", short: "Stop a component and keep its state",
		long:    "Checkpoint a component and stop it. It stays stopped, over failovers and deploys, until start or unpin.",
		example: examples("coppice stop shop/store", "", "coppice start shop/store", "again"),
	}, apiv1connect.ControlClient.Stop)
}
