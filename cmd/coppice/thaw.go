package main

import (
	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

func (c *cli) thawCmd() *cobra.Command {
	return c.lifecycle(spec{
		use: "thaw COMPONENT", short: "Let a frozen component go on",
		example: examples("coppice thaw shop/store", ""),
	}, apiv1connect.ControlClient.Thaw)
}
