package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// drillTimeout is for everything to come back.
const drillTimeout = 2 * time.Minute

func (c *cli) drillCmd() *cobra.Command {
	var zone string
	var really bool
	cmd := c.command(spec{
		group: groupNode, use: "drill [NODE]", short: "Say what the loss of a node or a zone would do, or cause it",
		long: "Say what the loss of a node, or of all nodes of a zone, would do: whether writes go on, where each component would restart, in what\n" +
			"time, and what would be lost. With --really the nodes and what runs on them are killed (kill -9), and what came of it is printed\n" +
			"beside what was predicted: ask a node that is to stay. Start the others again afterwards.",
		example: examples("coppice drill n2", "", "coppice drill --zone attic", "would writes go on without these?", "coppice drill n2 --really", "see it happen"),
		max:     1, timeout: drillTimeout + transferSlack, args: c.nodeNames(0),
		run: func(ctx context.Context, args []string) error {
			req := &apiv1.DrillRequest{Zone: zone, Really: really, TimeoutMs: c.waitMS(drillTimeout)}
			if len(args) == 1 {
				req.Node = args[0]
			}
			if (req.Node == "") == (zone == "") {
				return usagef("drill wants one of NODE and --zone")
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			st, err := cl.Drill(ctx, req)
			if err != nil {
				return err
			}
			p := c.progress()
			last := &apiv1.DrillUpdate{}
			for st.Receive() {
				if last = st.Msg(); !last.Done {
					p.state("%s killed, waiting for what they ran", join(last.Lost))
				}
			}
			p.clear()
			if err := st.Err(); err != nil {
				return err
			}
			if !last.Done {
				return &failure{what: "drill", why: "the node that watches went away before it was done", try: "coppice ps"}
			}
			return c.show(last, func(w io.Writer) { c.drillText(w, last, really) })
		},
	})
	cmd.Flags().StringVar(&zone, "zone", "", "all nodes of this zone")
	cmd.Flags().BoolVar(&really, "really", false, "kill them")
	return cmd
}

func (c *cli) drillText(w io.Writer, res *apiv1.DrillUpdate, really bool) {
	verb := "would be lost"
	if really {
		verb = "killed"
	}
	fmt.Fprintf(w, "%s: %s\n", verb, join(res.Lost))
	switch {
	case res.WritesStop:
		fmt.Fprintf(w, "%s: %d of %d voters would be left, which is no majority\n", c.paint(red)("writes would stop"), res.VotersLeft, res.Voters)
		fmt.Fprintf(w, "%s %s\n", c.paint(dim)("try:"), oneLine(res.Cure))
	case res.Coordinator != "":
		fmt.Fprintf(w, "writes go on: %d of %d voters are left, coordinator %s\n", res.VotersLeft, res.Voters, res.Coordinator)
	}
	if res.CommitMs != nil {
		fmt.Fprintf(w, "the next commit came after %s\n", msText(*res.CommitMs))
	}
	if len(res.Instances) == 0 {
		fmt.Fprintln(w, "no component runs there")
		return
	}
	head := []string{"INSTANCE", "FROM", "WOULD RESTART ON", "PREDICTED", "WOULD LOSE", "COPIES LEFT"}
	if really {
		head = append(head, "CAME BACK ON", "AFTER")
	}
	t := c.table(append(head, "REASON")...)
	for _, i := range res.Instances {
		row := []any{i.Instance, i.From, i.To, optMS(i.PredictedMs), loses(i), i.CopiesLeft}
		if really {
			row = append(row, i.CameTo, optMS(i.TookMs))
		}
		t.row(append(row, i.Reason)...)
	}
	t.write(w)
}

// loses says what of the answered writes would be lost.
func loses(i *apiv1.DrillInstance) string {
	switch {
	case i.Durable == "none":
		return "has no state"
	case i.WouldLoseMs == nil:
		return ""
	case *i.WouldLoseMs == 0:
		return "nothing"
	}
	return "the last " + msText(float64(*i.WouldLoseMs))
}
