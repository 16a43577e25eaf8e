package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) registryPushCmd() *cobra.Command {
	var name, ver string
	cmd := c.command(spec{
		use: "push FILE… [--name N] [--version V]", short: "Publish a component binary, one file per os/arch",
		long: "Publish a component binary. Its os and architecture are read from its header; Describe is run once in the sandbox for its name,\n" +
			"version and interfaces. A binary that does not speak to us is kept as a program. Several files are one version for several\n" +
			"platforms. Dropping a file into a node's drop folder does the same.",
		example: examples(
			"coppice registry push bin/components/kv", "",
			"coppice registry push dist/kv-amd64 dist/kv-arm64 --version 1.2.0", "one version, two platforms",
			"coppice registry push ./myserver --name web --version 0.1.0", "an ordinary program"),
		min: 1, max: -1,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := c.push(ctx, cl, name, ver, args)
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { fmt.Fprintln(w, pushedText(res)) })
		},
	})
	cmd.Flags().StringVar(&name, "name", "", "its name (default: what it says it is, else the file's name)")
	cmd.Flags().StringVar(&ver, "version", "", "its version (default: what it says)")
	return cmd
}

func pushedText(r *apiv1.RegistryPushResponse) string {
	word := "pushed"
	if r.Existed {
		word = "was there already"
	}
	return fmt.Sprintf("%s %s %s: %s, %s, held by %s, %s", r.Name, r.Version, word, bytesText(r.Bytes), join(r.Platforms), join(r.Holders), shortDigest(r.Digest))
}
