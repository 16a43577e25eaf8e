package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) swapCmd() *cobra.Command {
	var force bool
	cmd := c.command(spec{
		group: groupOne, use: "swap COMPONENT@VERSION", short: "Replace a running component by another version, keeping its state",
		long: "Replace a running component by another version of its artifact, with its state and without a failed call: callers wait for the pause.\n" +
			"If the new version does not become healthy, the old one goes on. VERSION is a version, a constraint or sha256:….\n" +
			"A version that cannot keep what `durable` promises (each-call without txn-calls), or that lacks an interface, a method or the form of a message\n" +
			"that the running one has, is refused, unless --force says that it may be. One that would leave another component's binding without what it\n" +
			"requires is refused in any case.",
		example: examples(
			"coppice swap shop/store@1.1", "",
			"coppice swap store@^2", "the newest 2.x",
			"coppice undo shop/store", "back again"),
		min: 1, max: 1, timeout: actTimeout + transferSlack, args: c.componentNames(false),
		run: func(ctx context.Context, args []string) error {
			i := strings.LastIndexByte(args[0], '@')
			if i <= 0 || i == len(args[0])-1 {
				return usagef("%q: want COMPONENT@VERSION", args[0])
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Swap(ctx, &apiv1.SwapRequest{Component: args[0][:i], Version: args[0][i+1:], TimeoutMs: c.waitMS(actTimeout), Force: force})
			if err != nil {
				return err
			}
			return c.replaced(res)
		},
	})
	cmd.Flags().BoolVar(&force, "force", false, "also to a version that cannot keep what durable promises (it is shown as degraded then), or that lacks what callers may call")
	return cmd
}
