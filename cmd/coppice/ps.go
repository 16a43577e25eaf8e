package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) psCmd() *cobra.Command {
	return c.command(spec{
		group: groupApp, use: "ps [APP]", short: "List instances, where they run and where they would restart",
		long: "List instances with node, version, state, epoch, uptime, the age of the last acknowledged checkpoint, the nodes that hold it, and\n" +
			"where and how fast the instance would restart if its node died now. States: pending, fetching, starting, running, frozen, degraded,\n" +
			"failed, stopped.",
		example: examples("coppice ps", "", "coppice ps shop", "", `coppice ps -o json | jq -r '.[] | "\(.instance) \(.node)"'`, ""),
		max:     1, timeout: readTimeout, args: c.applicationNames,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			req := &apiv1.PsRequest{}
			if len(args) > 0 {
				req.Application = args[0]
			}
			res, err := cl.Ps(ctx, req)
			if err != nil {
				return err
			}
			return showList(c, res.Instances, func(w io.Writer) { c.instancesTable(res.Instances).write(w) })
		},
	})
}

// restartsOn says where an instance would restart, and how far its standby there is.
func restartsOn(i *apiv1.Instance) string {
	switch behind := i.GetStandbyBehind(); {
	case i.Standby != "hot" || i.WouldRestartOn == "":
		return i.WouldRestartOn
	case i.StandbyNode != i.WouldRestartOn:
		return i.WouldRestartOn + " (hot: not ready)"
	case behind > 0:
		return fmt.Sprintf("%s (hot, %d behind)", i.WouldRestartOn, behind)
	}
	return i.WouldRestartOn + " (hot)"
}

func (c *cli) instancesTable(list []*apiv1.Instance) *table {
	t := c.table("INSTANCE", "NODE", "ARTIFACT", "STATE", "EPOCH", "UPTIME", "CHECKPOINT", "REPLICAS", "RESTARTS ON", "IN")
	for _, i := range list {
		state := stateCell(i.State)
		if i.Quarantined {
			state = cell{i.State + ",quarantined", red}
		}
		if i.Reason != "" && i.State != "running" {
			state.text += ": " + i.Reason
		}
		uptime := ""
		if i.UptimeMs > 0 {
			uptime = uptimeText(i.UptimeMs)
		}
		ckpt := optAge(i.CheckpointAgeMs)
		if ckpt != "" {
			ckpt += " ago"
			if k := i.GetCallsSinceCheckpoint(); k > 0 {
				ckpt += fmt.Sprintf(", %d calls since", k)
			}
		}
		art := i.Artifact
		if i.Version != "" {
			art += "@" + i.Version
		}
		t.row(i.Instance, i.Node, art, state, i.Epoch, uptime, ckpt, join(i.Replicas), restartsOn(i), optMS(i.PredictedRestartMs))
	}
	return t
}
