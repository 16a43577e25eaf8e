package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) registryShowCmd() *cobra.Command {
	return c.command(spec{
		use: "show NAME[@VERSION]|DIGEST", short: "Show what an artifact says of itself",
		example: examples("coppice registry show kv", "every version", "coppice registry show kv@1.2.0", ""),
		min:     1, max: 1, timeout: readTimeout, args: c.artifactNames,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.RegistryShow(ctx, &apiv1.RegistryShowRequest{Artifact: args[0]})
			if err != nil {
				return err
			}
			return showList(c, res.Artifacts, func(w io.Writer) {
				for i, a := range res.Artifacts {
					if i > 0 {
						fmt.Fprintln(w)
					}
					c.artifactText(w, a)
				}
			})
		},
	})
}

func (c *cli) artifactText(w io.Writer, a *apiv1.Artifact) {
	t := c.fields()
	t.field("name", a.Name)
	t.field("version", a.Version)
	t.field("digest", a.Digest)
	t.field("state", stateCell(a.State))
	t.field("reason", a.Reason)
	t.field("kind", a.Kind)
	t.field("type", a.Type)
	t.field("platforms", join(a.Platforms))
	t.field("size", sizeOr(a.Bytes))
	t.field("pushed by", a.PushedBy)
	t.field("holders", join(a.Holders))
	t.field("used by", join(a.UsedBy))
	t.field("features", join(a.Features))
	t.field("file", a.File)
	t.write(w)
	c.interfacesText(w, "provides", a.Provides)
	c.interfacesText(w, "requires", a.Requires)
	c.attributesText(w, a.Attributes)
}
