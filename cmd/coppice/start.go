package main

import (
	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

func (c *cli) startCmd() *cobra.Command {
	return c.lifecycle(spec{
		use: "start COMPONENT", short: "Start a stopped component, with the state it had",
		example: examples("coppice start shop/store", ""),
	}, apiv1connect.ControlClient.Start)
}
