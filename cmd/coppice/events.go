package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) eventsCmd() *cobra.Command {
	var follow bool
	var limit uint32
	var since time.Duration
	cmd := c.command(spec{
		group: groupKnow, use: "events [CHANNEL] [-f]", short: "Show events below a channel",
		long: "Show what happened, with who set it off (neighbour, placement, operator, crash) and why. Channels are a tree: /apps/shop/ is all of\n" +
			"an application, /nodes/n2 a node.",
		example: examples("coppice events", "", "coppice events /apps/shop/ -f", "", "coppice events --since 1h -o json | jq -r .message", ""),
		max:     1,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			req := &apiv1.EventsRequest{Channel: "/", Follow: follow, Limit: limit, Since: c.ago(since)}
			if len(args) > 0 {
				req.Channel = "/" + strings.TrimPrefix(args[0], "/")
			}
			st, err := cl.Events(ctx, req)
			if err != nil {
				return err
			}
			return follows(ctx, st, follow, func(e *apiv1.Event) error {
				return c.showLine(e, func(w io.Writer) { c.eventText(w, e) })
			})
		},
	})
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	cmd.Flags().Uint32Var(&limit, "limit", 0, "only the last of them (default 200)")
	cmd.Flags().DurationVar(&since, "since", 0, "only of this last time")
	return cmd
}

func (c *cli) eventText(w io.Writer, e *apiv1.Event) {
	line := fmt.Sprintf("%s %s %s", c.paint(dim)(clockText(e.Time)), c.paint(blue)(e.Channel), c.paint(bold)(e.Type))
	if e.Message != "" {
		line += " " + printable(oneLine(e.Message))
	}
	if e.Trigger != "" {
		line += " [" + e.Trigger + "]"
	}
	if e.Cause != "" {
		line += " because " + printable(oneLine(e.Cause))
	}
	if len(e.Fields) > 0 {
		line += " " + c.paint(dim)(printable(pairs(e.Fields)))
	}
	if e.Node != "" {
		line += c.paint(dim)(" @" + e.Node)
	}
	fmt.Fprintln(w, line)
}
