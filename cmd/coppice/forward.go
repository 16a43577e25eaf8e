package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) forwardCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "forward COMPONENT [ADDRESS]", short: "Reach a program's port on this node, wherever the program runs",
		long: "Listen on the node, and pass every connection on to the port of a program (run in the manifest), wherever it runs, until the command is\n" +
			"interrupted. ADDRESS is a port (of 127.0.0.1) or host:port; left out, a free port. A connection that is made while the program moves or is\n" +
			"taken over waits for it; those that are open then end, as at any restart of it.",
		example: examples("coppice forward cache/redis 6379", "then: redis-cli -p 6379", "coppice forward redis-1", "one of several, at a free port"),
		min:     1, max: 2, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			req := &apiv1.ForwardRequest{Component: args[0]}
			if len(args) > 1 {
				req.Listen = args[1]
				if !strings.Contains(req.Listen, ":") {
					req.Listen = "127.0.0.1:" + req.Listen
				}
			}
			st, err := cl.Forward(ctx, req)
			if err != nil {
				return err
			}
			return follows(ctx, st, true, func(u *apiv1.ForwardUpdate) error {
				return c.showLine(u, func(w io.Writer) {
					if u.Problem != "" {
						fmt.Fprintln(w, printable(oneLine(u.Problem)))
						return
					}
					fmt.Fprintf(w, "%s → %s\n", u.Listen, u.Instance)
				})
			})
		},
	})
}
