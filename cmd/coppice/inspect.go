package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) inspectCmd() *cobra.Command {
	return c.command(spec{
		group: groupOne, use: "inspect COMPONENT", short: "Show a component's membrane",
		long: "Show a component's membrane: interfaces provided and required, attributes, bindings, content, state, call statistics, and what\n" +
			"commands laid over the manifest.",
		example: examples("coppice inspect shop/store", "", "coppice inspect store-0", "one instance, by its short name"),
		min:     1, max: 1, timeout: readTimeout, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Inspect(ctx, &apiv1.InspectRequest{Component: args[0]})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { c.inspectText(w, res) })
		},
	})
}

func (c *cli) inspectText(w io.Writer, r *apiv1.InspectResponse) {
	t := c.fields()
	t.field("component", r.Component)
	t.field("state", stateCell(r.State))
	t.field("artifact", r.Artifact+" "+r.Version+" "+shortDigest(r.Digest))
	t.field("type", r.Type)
	t.field("kind", r.Kind)
	durable := r.Durable
	if r.DurableBy != "" && r.DurableBy != r.Durable {
		durable += " by " + r.DurableBy
	}
	t.field("durable", durable)
	t.field("guarantee", r.Guarantee)
	t.field("features", join(r.Features))
	t.field("content", join(r.Content))
	t.field("calls", callsText(r.Calls))
	t.write(w)
	c.interfacesText(w, "provides", r.Provides)
	c.interfacesText(w, "requires", r.Requires)
	c.bindingsText(w, r.Bindings)
	c.attributesText(w, r.Attributes)
	c.overlayText(w, r.Overlay)
	for _, i := range r.Instances {
		fmt.Fprintln(w, c.paint(bold)(i.Instance))
		c.inspectInstance(w, i)
	}
}

func (c *cli) inspectInstance(w io.Writer, i *apiv1.InspectInstance) {
	t := c.fields()
	state := stateCell(i.State)
	if i.Reason != "" {
		state.text += ": " + i.Reason
	}
	t.field("  state", state)
	t.field("  node", i.Node)
	epoch := fmt.Sprintf("%d.%d", i.Incarnation, i.Epoch)
	if !i.Settled {
		epoch += ", not settled"
	}
	if i.Trigger != "" {
		epoch += ", by " + i.Trigger
	}
	if i.Cause != "" {
		epoch += ": " + i.Cause
	}
	t.field("  epoch", epoch)
	t.field("  version", i.Version)
	t.field("  undo to", i.PreviousVersion)
	if i.Pid != 0 {
		t.field("  process", fmt.Sprintf("pid %d, up %s, %s", i.Pid, uptimeText(i.UptimeMs), plural(int(i.Restarts), "restart", "restarts")))
	}
	t.field("  listens on", i.Listen)
	t.field("  calls", callsText(i.Calls))
	t.field("  called by", join(i.Callers))
	if k := i.Checkpoint; k != nil && k.Seq > 0 {
		on := join(k.Replicas)
		if w := i.ReplicasWanted; w > 0 {
			on += fmt.Sprintf(" (%d of %d", k.ReplicasAlive, w)
			if i.MinReplicas > 0 {
				on += fmt.Sprintf(", %d acknowledge", i.MinReplicas)
			}
			on += ")"
		}
		t.field("  checkpoint", fmt.Sprintf("%d, %s, %s ago, on %s", k.Seq, bytesText(k.Bytes), optAge(k.AgeMs), on))
		if k.GetCallsSince() > 0 {
			t.field("  since then", plural(int(k.GetCallsSince()), "call", "calls")+" answered")
		}
	}
	if i.EarlierCheckpoints > 0 {
		t.field("  earlier", fmt.Sprintf("%s, the oldest %s old", plural(int(i.EarlierCheckpoints), "checkpoint", "checkpoints"), optAge(i.OldestCheckpointAgeMs)))
	}
	t.field("  successors", join(i.Successors))
	t.field("  standby", standbyText(i.Standby, i.StandbyNode, i.StandbyBehind))
	t.write(w)
}

// standbyText says how ready the next owner is; "" as usual.
func standbyText(kind, node string, behind *uint64) string {
	switch {
	case kind == "" || kind == "cold":
		return ""
	case kind != "hot":
		return kind
	case node == "":
		return "hot: none is ready"
	case behind != nil && *behind > 0:
		return fmt.Sprintf("hot on %s, %s behind", node, plural(int(*behind), "checkpoint", "checkpoints"))
	}
	return "hot on " + node
}

func callsText(s *apiv1.CallStats) string {
	if s == nil {
		return ""
	}
	out := fmt.Sprintf("%d, %d failed, %d retried, %d held, %d now, %.1f/s", s.Total, s.Failed, s.Retried, s.Held, s.InFlight, s.PerSecond)
	if s.P50Ms != nil && s.P99Ms != nil {
		out += ", p50/p99 " + msText(*s.P50Ms) + "/" + msText(*s.P99Ms)
	}
	return out
}

func (c *cli) bindingsText(w io.Writer, list []*apiv1.Binding) {
	if len(list) == 0 {
		return
	}
	t := c.table("BINDING", "TARGET", "NODE", "STATE", "SERVICE", "FROM")
	for _, b := range list {
		state := cell{"bound", green}
		switch {
		case !b.Bound && b.Optional:
			state = cell{"unbound, optional", ""}
		case !b.Bound:
			state = cell{"unbound", red}
		}
		t.row(b.Interface, join(b.Targets), b.Node, state, b.Service, b.From)
	}
	t.write(w)
}

func (c *cli) attributesText(w io.Writer, list []*apiv1.AttributeInfo) {
	if len(list) == 0 {
		return
	}
	t := c.table("ATTRIBUTE", "VALUE", "TYPE", "FROM", "NOTES")
	for _, a := range list {
		value, notes := cell{a.Value, ""}, ""
		if a.Secret {
			value = cell{"(secret)", dim}
		}
		if a.ReadOnly {
			notes = "read only"
		}
		if a.RestartToApply {
			notes = "a change restarts it"
		}
		t.row(a.Name, value, a.Type, a.From, notes)
	}
	t.write(w)
}

func (c *cli) overlayText(w io.Writer, o *apiv1.Overlay) {
	if o == nil {
		return
	}
	t := c.fields()
	if o.Version != "" || o.Digest != "" {
		t.field("  version", o.Version+" "+shortDigest(o.Digest))
	}
	t.field("  nodes", pairs(o.Nodes))
	if o.Stopped {
		t.field("  stopped", "yes")
	}
	if o.Frozen {
		t.field("  frozen", "yes")
	}
	t.field("  attributes", pairs(o.Attributes))
	t.field("  bindings", pairs(o.Bindings))
	if len(t.rows) > 0 {
		fmt.Fprintln(w, c.paint(bold)("laid over the manifest by commands")+" (coppice unpin clears it)")
		t.write(w)
	}
}
