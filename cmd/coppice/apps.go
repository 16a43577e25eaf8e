package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) appsCmd() *cobra.Command {
	return c.command(spec{
		group: groupApp, use: "apps", short: "List applications",
		example: examples("coppice apps", "", "coppice apps -o json | jq -r '.[].application'", ""),
		timeout: readTimeout,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Apps(ctx, &apiv1.AppsRequest{})
			if err != nil {
				return err
			}
			return showList(c, res.Apps, func(w io.Writer) {
				t := c.table("APPLICATION", "STATE", "RUNNING", "COMPONENTS", "VERSION", "AT", "WHY")
				for _, a := range res.Apps {
					t.row(a.Application, stateCell(a.State), fmt.Sprintf("%d of %d", a.Running, a.Instances), a.Components, a.Version, join(a.Urls), a.Reason)
				}
				t.write(w)
			})
		},
	})
}
