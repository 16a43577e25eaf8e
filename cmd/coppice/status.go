package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) statusCmd() *cobra.Command {
	return c.command(spec{
		group: groupNode, use: "status", short: "Show the health of the cluster in one screen",
		example: examples(
			"coppice status", "",
			"coppice status -o json | jq .arbiter.leader", "the name of the leader"),
		timeout: readTimeout,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Status(ctx, &apiv1.StatusRequest{})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { c.statusText(w, res) })
		},
	})
}

// unsavedText says what the loss of every node at once would lose.
func unsavedText(u *apiv1.UnsavedStatus) cell {
	switch {
	case u.GetFewHolders() > 0:
		return cell{fmt.Sprintf("%s since the last checkpoints; %s on too few living nodes", plural(int(u.GetCalls()), "call", "calls"), plural(int(u.GetFewHolders()), "checkpoint", "checkpoints")), yellow}
	case u.GetCalls() > 0:
		return cell{fmt.Sprintf("%s of %s since the last checkpoints", plural(int(u.GetCalls()), "call", "calls"), plural(int(u.GetInstances()), "instance", "instances")), ""}
	}
	return cell{}
}

// pagesText says how the pages of the node that answers are.
func pagesText(p *apiv1.PageStatus) cell {
	text, color := "", ""
	if p.GetCorrupt() > 0 {
		text, color = fmt.Sprintf("%d were corrupt, %d are repaired; ", p.GetCorrupt(), p.GetRepaired()), yellow
	}
	if p == nil || p.LastScrubAgeMs == nil && text == "" {
		return cell{}
	}
	if p.LastScrubAgeMs == nil {
		return cell{text + "not all checked since it started", color}
	}
	return cell{text + "all checked " + optAge(p.LastScrubAgeMs) + " ago", color}
}

func (c *cli) statusText(w io.Writer, s *apiv1.StatusResponse) {
	n, a, k := s.GetNodes(), s.GetArbiter(), s.GetComponents()
	t := c.fields()
	t.field("cluster", s.Cluster)
	t.field("answered by", s.Node+" "+s.Version)
	nodes := fmt.Sprintf("%d alive", n.GetAlive())
	color := green
	for _, x := range []struct {
		n     uint32
		state string
	}{{n.GetSuspect(), "suspect"}, {n.GetDead(), "dead"}, {n.GetLeft(), "left"}, {n.GetQuarantined(), "quarantined"}} {
		if x.n > 0 {
			nodes += fmt.Sprintf(", %d %s", x.n, x.state)
			if x.state != "left" {
				color = yellow
			}
		}
	}
	t.field("nodes", cell{nodes, color})
	leader := cell{a.GetLeader(), ""}
	if leader.text == "" {
		leader = cell{"none: nothing can be committed now", red}
	}
	t.field("arbiter", leader)
	t.field("voters", join(a.GetVoters()))
	if a.GetPrimary() != "" {
		t.field("primary of two", a.GetPrimary())
	}
	t.field("learners", join(a.GetLearners()))
	t.field("coordinator", a.GetCoordinator())
	t.field("incarnation", a.GetIncarnation())
	inst := fmt.Sprintf("%d started", k.GetStarted())
	color = green
	if k.GetOther() > 0 {
		inst, color = inst+fmt.Sprintf(", %d not (coppice ps)", k.GetOther()), yellow
	}
	t.field("instances", cell{inst, color})
	if s.Paused {
		t.field("paused", cell{"yes: the cluster was stopped by `down --all`", yellow})
	}
	t.field("unsaved", unsavedText(s.GetUnsaved()))
	t.field("pages", pagesText(s.GetPages()))
	t.write(w)
	if len(s.Unsafe) > 0 {
		fmt.Fprintln(w, "\n"+c.paint(yellow)("not safe against the loss of one node:"))
		u := c.fields()
		for _, x := range s.Unsafe {
			u.rows = append(u.rows, []cell{{"  " + x.Subject, ""}, {oneLine(x.Why), ""}})
		}
		u.write(w)
	}
	for _, x := range s.Warnings {
		fmt.Fprintln(w, c.paint(yellow)("warning:"), oneLine(x))
	}
}
