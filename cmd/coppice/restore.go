package main

import (
	"context"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) restoreCmd() *cobra.Command {
	var at string
	cmd := c.command(spec{
		group: groupOne, use: "restore COMPONENT --at ID|TIME", short: "Go back to an earlier checkpoint, or to a branch",
		long: "Go back to the state of an earlier checkpoint, in the version that runs now where that can read it, else in the version that wrote it.\n" +
			"Calls are held meanwhile, none is lost halfway: each is in the state that is left, or in the one that goes on. The state that is left is\n" +
			"kept as an earlier checkpoint itself, and coppice undo returns to it. Works on a component that does not run, too.",
		example: examples(
			"coppice restore shop/store --at c7", "an id of coppice checkpoints",
			"coppice restore shop/store --at 2026-11-22T10:00:00Z", "as it was then",
			"coppice restore shop/store --at 90m", "as it was an hour and a half ago",
			"coppice restore shop/store --at @branch-n2-1", "what n2 did while it was cut off",
			"coppice undo shop/store", "no: back again"),
		min: 1, max: 1, timeout: actTimeout + transferSlack, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			m, err := c.earlier(at)
			if err != nil {
				return err
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Restore(ctx, &apiv1.RestoreRequest{Component: args[0], At: m, TimeoutMs: c.waitMS(actTimeout)})
			if err != nil {
				return err
			}
			return c.replaced(res)
		},
	})
	c.atFlag(cmd, &at)
	return cmd
}

// atFlag adds --at.
func (c *cli) atFlag(cmd *cobra.Command, at *string) {
	cmd.Flags().StringVar(at, "at", "", atUsage)
	err := cmd.RegisterFlagCompletionFunc("at", func(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
		component := ""
		if len(args) > 0 {
			component = args[0]
		}
		return c.completer(func(ctx context.Context, _ []string) []string { return c.earlierIDs(component)(ctx) })(cmd, args, typed)
	})
	if err != nil {
		panic(err) // the flag does not exist: a mistake found by any run
	}
}
