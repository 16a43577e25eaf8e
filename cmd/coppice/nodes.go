package main

import (
	"context"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) nodesCmd() *cobra.Command {
	var wide bool
	cmd := c.command(spec{
		group: groupNode, use: "nodes [NODE]", short: "List the members with their state, round-trip time and connection",
		long: "List the members as the node that answers sees them. States: alive, suspect (silent), dead (confirmed), left (said goodbye),\n" +
			"quarantined (died again and again: not used for 30 s, longer each time up to 10 min, or until it is readmitted). Why a node is not alive is\n" +
			"in the column EVIDENCE.",
		example: examples(
			"coppice nodes", "",
			"coppice nodes --wide", "with ids, addresses, labels, who watches it and the evidence for the state",
			`coppice nodes -o json | jq -r '.[] | select(.state == "alive") | .name'`, "names of those that live"),
		max: 1, timeout: readTimeout, args: c.nodeNames(0),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			req := &apiv1.NodesRequest{}
			if len(args) > 0 {
				req.Node = args[0]
			}
			res, err := cl.Nodes(ctx, req)
			if err != nil {
				return err
			}
			return showList(c, res.Nodes, func(w io.Writer) { c.nodesTable(res.Nodes, wide || len(args) > 0).write(w) })
		},
	})
	cmd.Flags().BoolVar(&wide, "wide", false, "show everything")
	return cmd
}

func (c *cli) nodesTable(nodes []*apiv1.Node, wide bool) *table {
	head := []string{"NAME", "STATE", "RTT", "CONNECTION", "ROLE", "ZONE", "INSTANCES", "VERSION", "SINCE"}
	if wide {
		head = append(head, "CPU", "MEMORY", "DISK", "PLATFORM", "LABELS", "ADDRESSES", "ID", "WATCHED BY", "EVIDENCE")
	}
	why := !wide && slices.ContainsFunc(nodes, func(n *apiv1.Node) bool { return n.State != "alive" })
	if why {
		head = append(head, "EVIDENCE")
	}
	t := c.table(head...)
	for _, n := range nodes {
		row := []any{n.Name, stateCell(n.State), optMS(n.RttMs), n.Connection, nodeRole(n), n.Zone, n.Instances, n.Version, c.sinceText(n.Since)}
		if wide {
			row = append(row, cpuText(n.CpuMillis), sizeOr(n.MemoryBytes), sizeOr(n.DiskBytes), n.Platform, pairs(n.Labels), join(n.Addrs), n.Id, join(n.Watchers), n.Evidence)
		}
		if why {
			row = append(row, troubleOf(n))
		}
		t.row(row...)
	}
	return t
}

// troubleOf is the evidence for a state that is not what it should be.
func troubleOf(n *apiv1.Node) string {
	if n.State == "alive" {
		return ""
	}
	return n.Evidence
}

// nodeRole is what the node is to the cluster now.
func nodeRole(n *apiv1.Node) string {
	role := n.Role
	if n.Coordinator {
		role += ",coordinator"
	} else if n.Voter {
		role += ",voter"
	}
	if n.Draining {
		role += ",draining"
	}
	return strings.TrimPrefix(role, ",")
}
