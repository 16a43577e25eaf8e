package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// drainTimeout is generous: a drain carries all state of a node away.
const drainTimeout = 10 * time.Minute

func (c *cli) drainCmd() *cobra.Command {
	return c.command(spec{
		group: groupNode, use: "drain NODE", short: "Move everything away from a node, with its state, and its vote",
		long: "Hand a node's leadership and vote over, then move every component of it to other nodes with its state. No call fails whose deadline\n" +
			"exceeds the pause of a move. It is done when the node neither votes nor runs anything; only where no other node may vote it goes on\n" +
			"voting, and says so. The node stays a member and gets nothing new until it is started again or readmitted.",
		example: examples("coppice drain n2", "", "coppice drain n2 --timeout 1h", "with much state"),
		min:     1, max: 1, timeout: drainTimeout + transferSlack, args: c.nodeNames(0),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			st, err := cl.Drain(ctx, &apiv1.DrainRequest{Node: args[0], TimeoutMs: c.waitMS(drainTimeout)})
			if err != nil {
				return err
			}
			return c.drained(st, "drain "+args[0])
		},
	})
}

// drained follows a drain to its end.
func (c *cli) drained(st *connect.ServerStreamForClient[apiv1.DrainUpdate], what string) error {
	p := c.progress()
	last := &apiv1.DrainUpdate{}
	for st.Receive() {
		last = st.Msg()
		switch {
		case last.Done:
		case last.State == "handing over":
			p.state("%s: its vote is being handed over", last.Node)
		case last.State == "handed over":
			p.step("%s handed the leadership over to %s", last.Node, last.To)
		case last.State == "voting":
			p.step("%s", last.Node+": "+last.Reason)
		case last.Instance == "":
			p.state("%s: %s to move", last.Node, plural(int(last.Remaining), "instance", "instances"))
		case last.State == "moving":
			p.state("%s → %s, %d left", last.Instance, last.To, last.Remaining)
		default:
			line := last.Instance + " " + last.State
			if last.To != "" {
				line += " to " + last.To
			}
			if last.Reason != "" {
				line += ": " + last.Reason
			}
			p.step("%s", line)
		}
	}
	p.clear()
	if err := st.Err(); err != nil {
		return err
	}
	if !last.Done {
		return &failure{what: what, why: "the node went away before it was done", try: "coppice ps"}
	}
	return c.show(last, func(w io.Writer) {
		fmt.Fprintf(w, "%s: %s moved in %s\n", last.Node, plural(int(last.Moved), "instance", "instances"), msText(last.TookMs))
		if last.Reason != "" {
			fmt.Fprintf(w, "%s: %s\n", last.Node, last.Reason)
		}
	})
}
