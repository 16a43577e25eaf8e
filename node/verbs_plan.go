package node

import (
	"context"
	"fmt"
	"strings"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/placement"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// Plan says what a deploy would do, or what would be if other things were different, and changes nothing.
func (v *verbs) Plan(ctx context.Context, r *apiv1.PlanRequest) (*apiv1.PlanResponse, error) {
	n, what := v.n, strings.TrimSpace("plan "+r.GetFile())
	if r.GetReplay() != "" {
		replay, err := n.replay(ctx, r.GetReplay())
		return &apiv1.PlanResponse{Feasible: true, Replay: replay}, err
	}
	q := placement.Whatif{Without: r.GetWithout(), Prices: r.GetPrices()}
	for _, f := range r.GetWith() {
		nodes, err := placement.ParseNodes(f.GetName(), f.GetData())
		if err != nil {
			return nil, api.Fail(connect.CodeInvalidArgument, what, err.Error(), "")
		}
		q.With = append(q.With, nodes...)
	}
	var apps []*desired
	if len(r.GetManifest()) > 0 {
		var err error
		if apps, err = n.desire(ctx, r.GetFile(), r.GetManifest(), r.GetArtifacts()); err != nil {
			return nil, fail(what, err)
		}
	}
	out := &apiv1.PlanResponse{Feasible: true}
	for _, u := range n.zoneRisks() {
		out.Warnings = append(out.Warnings, u.GetSubject()+": "+u.GetWhy())
	}
	out.Warnings = append(out.Warnings, n.changedTypes(ctx, apps)...)
	if len(apps) == 0 {
		return out, n.planFor(ctx, what, q, "", out)
	}
	for _, d := range apps {
		q.Application = d.next
		if err := n.planFor(ctx, what, q, d.next.GetName(), out); err != nil {
			return nil, err
		}
		out.Changes = append(out.Changes, changes(d)...)
	}
	return out, nil
}

// planFor adds the plan for a what-if, of one application or "": of all.
func (n *Node) planFor(ctx context.Context, what string, q placement.Whatif, application string, out *apiv1.PlanResponse) error {
	_, plan, err := n.coord.Plan(ctx, q)
	if err != nil {
		return api.Fail(connect.CodeUnavailable, what, err.Error(), "coppice status")
	}
	out.Feasible = out.Feasible && plan.GetFeasible()
	out.Objective, out.Bound, out.ObjectiveBefore, out.Optimal = plan.GetObjective(), plan.GetBound(), plan.GetObjectiveBefore(), plan.GetOptimal()
	for _, a := range plan.GetAssignments() {
		t, err := components.ParseTarget(a.GetInstance())
		if err == nil && (application == "" || t.Application == application) {
			out.Components = append(out.Components, n.planned(a))
		}
	}
	return nil
}

func (n *Node) planned(a *placementv1.Assignment) *apiv1.PlannedInstance {
	p := &apiv1.PlannedInstance{
		Instance: a.GetInstance(), Node: n.nameText(a.GetNode()), Score: a.GetScore(), RunnerUp: n.nameText(a.GetRunnerUp()), RunnerUpScore: a.GetRunnerUpScore(), Reason: a.GetReason(),
		Conflict: a.GetConflict(), Remedies: a.GetRemedies(),
	}
	for _, s := range a.GetSuccessors() {
		p.Successors = append(p.Successors, n.nameText(s))
	}
	for _, r := range a.GetRefused() {
		p.Refused = append(p.Refused, &apiv1.Refusal{Node: n.nameText(r.GetNode()), Constraint: r.GetConstraint(), Detail: r.GetDetail()})
	}
	if reg, ok := n.arbiter.Get(components.InstanceRegister(a.GetInstance())); ok {
		p.Current = n.nameOf(reg.Owner)
	}
	t, err := components.ParseTarget(a.GetInstance())
	if err != nil {
		return p
	}
	if app, ok := n.application(t.Application); ok {
		for _, it := range components.Overlays(app.Application) {
			if it.Component == t.Key() {
				p.Overlay = append(p.Overlay, it.Key+"="+it.Value)
			}
		}
	}
	return p
}

// changes says what a deploy would change, a line each.
func changes(d *desired) []string {
	if !d.changed {
		return nil
	}
	var out []string
	for _, c := range d.deployed().GetComponents() {
		switch c.GetChange() {
		case "added":
			out = append(out, fmt.Sprintf("add %s: %s@%s", c.GetComponent(), c.GetArtifact(), c.GetVersion()))
		case "updated":
			out = append(out, fmt.Sprintf("update %s to %s@%s", c.GetComponent(), c.GetArtifact(), c.GetVersion()))
		case "removed":
			out = append(out, "remove "+c.GetComponent())
		}
	}
	for _, it := range d.cleared {
		out = append(out, fmt.Sprintf("clear %s %s=%s, which a command laid over it", it.Component, it.Key, it.Value))
	}
	return out
}
