package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) logsCmd() *cobra.Command {
	var follow bool
	var tail uint32
	var since time.Duration
	cmd := c.command(spec{
		group: groupKnow, use: "logs COMPONENT [-f]", short: "Show what a component wrote",
		long: "Show what an instance wrote on the node that owns it now; what it wrote elsewhere before is in the logs folder of that node. With -f\n" +
			"what comes, until interrupted.",
		example: examples("coppice logs shop/store", "", "coppice logs shop/store -f --tail 10", "", "coppice logs shop/web-1 --since 5m", ""),
		min:     1, max: 1, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			st, err := cl.Logs(ctx, &apiv1.LogsRequest{Component: args[0], Follow: follow, Tail: tail, Since: c.ago(since)})
			if err != nil {
				return err
			}
			return follows(ctx, st, follow, func(l *apiv1.LogLine) error {
				return c.showLine(l, func(w io.Writer) { c.logText(w, l) })
			})
		},
	})
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	cmd.Flags().Uint32Var(&tail, "tail", 0, "only the last lines (default 1000)")
	cmd.Flags().DurationVar(&since, "since", 0, "only of this last time")
	return cmd
}

func (c *cli) logText(w io.Writer, l *apiv1.LogLine) {
	mark := ""
	switch {
	case l.Stream == "stderr":
		mark = c.paint(yellow)("! ")
	case l.Level != "" && l.Level != "info":
		mark = c.paint(yellow)(l.Level + " ")
	}
	fmt.Fprintf(w, "%s %s %s%s\n", c.paint(dim)(clockText(l.Time)), c.paint(blue)(l.Instance+"@"+l.Node), mark, printable(l.Text))
}

// ago is a moment of the past for a request; 0 is none.
func (c *cli) ago(d time.Duration) *timestamppb.Timestamp {
	if d <= 0 {
		return nil
	}
	return timestamppb.New(c.now().Add(-d))
}

// follows reads a stream to its end. That the user ends a stream which has no end is no failure.
func follows[T any, M interface {
	*T
	proto.Message
}](ctx context.Context, st *connect.ServerStreamForClient[T], endless bool, each func(M) error,
) error {
	for st.Receive() {
		if err := each(M(st.Msg())); err != nil {
			return err
		}
	}
	err := st.Err()
	if endless && errors.Is(ctx.Err(), context.Canceled) {
		return nil
	}
	return err
}
