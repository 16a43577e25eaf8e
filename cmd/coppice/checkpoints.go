package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) checkpointsCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "checkpoints COMPONENT", short: "List the earlier checkpoints and branches that a component can go back to",
		long: "List the earlier checkpoints that are kept of a component, oldest first: those made by coppice checkpoint, the states that swaps, undos\n" +
			"and restores left, and one a minute at most while something changes, thinned with age. How many and for how long: state.history and\n" +
			"state.history_age in the manifest. The last column says how many of the nodes that hold it are alive. After them come its branches: what\n" +
			"an owner did that was cut off and went on alone, and was taken over from on the other side (on_partition: keep). The newest 16 of an\n" +
			"instance are kept.",
		example: examples("coppice checkpoints shop/store", "", `coppice checkpoints shop/store -o json | jq -r '.checkpoints[].id'`, ""),
		min:     1, max: 1, timeout: readTimeout, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Checkpoints(ctx, &apiv1.CheckpointsRequest{Component: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { c.checkpointsTable(res).write(w) })
		},
	})
}

func (c *cli) checkpointsTable(res *apiv1.CheckpointsResponse) *table {
	several := false
	for _, k := range res.Checkpoints {
		several = several || k.Instance != res.Checkpoints[0].Instance
	}
	head := []string{"ID", "SEQ", "TIME", "AGE", "VERSION", "SIZE", "WHY", "HOLDERS"}
	if several {
		head = append([]string{"INSTANCE"}, head...)
	}
	t := c.table(head...)
	for _, k := range res.Checkpoints {
		holders := cell{text: fmt.Sprintf("%d of %d alive", k.HoldersAlive, len(k.Holders))}
		switch {
		case k.HoldersAlive == 0:
			holders.color = red
		case int(k.HoldersAlive) < len(k.Holders):
			holders.color = yellow
		}
		why := k.Why
		if k.Present {
			why += ", the present state"
		}
		row := []any{k.Id, k.Seq, k.Time.AsTime().Format(time.RFC3339), uptimeText(k.AgeMs), k.Version, bytesText(k.Bytes), why, holders}
		if several {
			row = append([]any{k.Instance}, row...)
		}
		t.row(row...)
	}
	return t
}

// earlierIDs completes --at: the ids of the component that is named.
func (c *cli) earlierIDs(component string) func(ctx context.Context) []string {
	return func(ctx context.Context) []string {
		cl, err := c.client()
		if err != nil || component == "" {
			return nil
		}
		res, err := cl.Checkpoints(ctx, &apiv1.CheckpointsRequest{Component: component})
		if err != nil {
			return nil
		}
		var out []string
		for _, k := range res.Checkpoints {
			out = append(out, k.Id)
		}
		return out
	}
}

const (
	atUsage = "which one: an id (c7) or a checkpoint's number (42) of coppice checkpoints; a branch (@branch-n2-1); or a time: 2026-11-22T10:00:00Z,\n\"2026-11-22 10:00\", 10:00 (today, here), or 90m (ago): the last one until then"
	atWants = "want an id (c7), a checkpoint's number (42), a branch (@branch-n2-1), a time (2026-11-22T10:00:00Z, 10:00) or how long ago (90m)"
)

// earlier is what --at means.
func (c *cli) earlier(at string) (*apiv1.Moment, error) {
	at = strings.TrimSpace(at)
	if at == "" {
		return nil, &usageError{why: "--at is missing: " + atWants}
	}
	if d, err := time.ParseDuration(strings.TrimSuffix(at, " ago")); err == nil && d >= 0 && at != "0" {
		ago := uint64(d.Milliseconds())
		return &apiv1.Moment{AgoMs: &ago}, nil
	}
	if t, ok := c.clockTime(at); ok {
		return &apiv1.Moment{Time: timestamppb.New(t)}, nil
	}
	if strings.ContainsAny(at, ":- /") && !strings.Contains(at, "@branch-") {
		return nil, &usageError{why: fmt.Sprintf("--at %q: %s", at, atWants)}
	}
	return &apiv1.Moment{Id: at}, nil
}

// clockTime reads a time, in this machine's zone where it does not say one.
func (c *cli) clockTime(s string) (time.Time, bool) {
	for _, f := range []string{time.RFC3339Nano, time.RFC3339} {
		if t, err := time.Parse(f, s); err == nil {
			return t, true
		}
	}
	for _, f := range []string{"2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02T15:04", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(f, s, time.Local); err == nil {
			return t, true
		}
	}
	for _, f := range []string{"15:04:05", "15:04"} {
		if t, err := time.ParseInLocation(f, s, time.Local); err == nil {
			y, m, d := c.now().In(time.Local).Date()
			return time.Date(y, m, d, t.Hour(), t.Minute(), t.Second(), 0, time.Local), true
		}
	}
	return time.Time{}, false
}
