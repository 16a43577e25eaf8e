package main

import (
	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

func (c *cli) freezeCmd() *cobra.Command {
	return c.lifecycle(spec{
		use: "freeze COMPONENT", short: "Hold a component's calls and stop its own activity",
		long:    "Hold a component's calls and bring it to rest; calls wait, as long as their deadlines allow, until it is thawed.",
		example: examples("coppice freeze shop/store", "", "coppice thaw shop/store", "and go on"),
	}, apiv1connect.ControlClient.Freeze)
}
