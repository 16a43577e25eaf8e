package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) registryListCmd() *cobra.Command {
	return c.command(spec{
		use: "list", short: "List artifacts, with those that are not ready and why",
		example: examples(
			"coppice registry list", "",
			`coppice registry list -o json | jq '.[] | select(.state == "refused")'`, "what was dropped and refused"),
		timeout: readTimeout,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.RegistryList(ctx, &apiv1.RegistryListRequest{})
			if err != nil {
				return err
			}
			return showList(c, res.Artifacts, func(w io.Writer) { c.artifactsTable(res.Artifacts).write(w) })
		},
	})
}
