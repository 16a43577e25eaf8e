package replay

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// Policy decides about redeployment.
type Policy interface {
	// Decide is called once for each period, in order. g is the problem as it is now; g.Current is what is in force and alive. It returns the group that is
	// in force from now on.
	Decide(ctx context.Context, g *instance.Group) []int
}

// Row is what a policy did on a trace. Utilities are means over the periods.
type Row struct {
	Trace  string `json:"trace"`
	Policy string `json:"policy"`
	Starts int    `json:"starts"` // groups that it was started from; all figures are means over them

	After     float64 `json:"utility_after"`  // of the group in force once the policy has acted
	Before    float64 `json:"utility_before"` // of what was carried over
	Net       float64 `json:"utility_net"`    // After less the cost of the added nodes
	Redeploys float64 `json:"redeploys"`      // periods in which anything was changed
	Adds      float64 `json:"adds"`           // nodes added in all
	// InfeasibleBefore and InfeasibleAfter count the periods in which the group in force violated a constraint, before and after acting.
	InfeasibleBefore float64 `json:"infeasible_before"`
	InfeasibleAfter  float64 `json:"infeasible_after"`

	// Of traces with an event: the utility during it, the free clock of a member in GHz before the event, when it hits (before acting) and during it, and
	// the periods until that is back to 90 % of what it was. NotBack counts the starts from which it was not, within the event.
	InEvent   *float64 `json:"utility_in_event,omitempty"`
	GHzBefore float64  `json:"ghz_before"`
	GHzAtHit  *float64 `json:"ghz_at_hit,omitempty"`
	GHzEvent  *float64 `json:"ghz_in_event,omitempty"`
	Recovery  *float64 `json:"recovery_periods,omitempty"`
	NotBack   *int     `json:"not_recovered,omitempty"`

	SolveMean float64 `json:"solve_mean_s"`
	SolveMax  float64 `json:"solve_max_s"`
}

// back is the share of the free clock at which it counts as recovered.
const back = 0.9

// Play plays a trace from a group that is in force before the first period. Errors: the context's.
func Play(ctx context.Context, t *instance.Trace, p Policy, start []int) (Row, error) {
	row := Row{Trace: t.Name, Starts: 1}
	event := t.Event[1] > 0
	var inEvent, ghzEvent, ghzAtHit float64
	var before, calm int
	recovered := 0 // periods after the event began; 0: not yet
	force := slices.Clone(start)
	cost := 0.0
	for step := range t.Steps {
		if ctx.Err() != nil {
			return row, context.Cause(ctx)
		}
		g := t.At(step)
		force = slices.DeleteFunc(force, func(i int) bool { return !g.Nodes.Alive[i] })
		for _, i := range force {
			g.Current = append(g.Current, int32(i))
		}
		score, wrong := g.Judge(force)
		row.Before += score.Utility
		if len(wrong) > 0 {
			row.InfeasibleBefore++
		}
		if event && step == t.Event[0] {
			ghzAtHit = freeGHz(g, force)
		}
		begun := time.Now()
		next := slices.Clone(p.Decide(ctx, g))
		took := time.Since(begun).Seconds()
		row.SolveMean += took
		row.SolveMax = max(row.SolveMax, took)
		slices.Sort(next)
		adds := 0
		for _, i := range next {
			if !slices.Contains(force, i) {
				adds++
			}
		}
		if adds > 0 || len(next) != len(force) {
			row.Redeploys++
		}
		row.Adds += float64(adds)
		cost += g.AddCost * float64(adds)
		force = next
		if score, wrong = g.Judge(force); len(wrong) > 0 {
			row.InfeasibleAfter++
		}
		row.After += score.Utility
		ghz := freeGHz(g, force)
		switch {
		case event && step >= t.Event[0] && step < t.Event[1]:
			inEvent += score.Utility
			ghzEvent += ghz
			if before++; recovered == 0 && ghz >= back*row.GHzBefore/float64(max(calm, 1)) {
				recovered = step - t.Event[0] + 1
			}
		case !event || step < t.Event[0]:
			row.GHzBefore += ghz
			calm++
		}
	}
	n := float64(t.Steps)
	row.After, row.Before, row.SolveMean = row.After/n, row.Before/n, row.SolveMean/n
	row.Net = row.After - cost/n
	row.GHzBefore /= float64(max(calm, 1))
	if event {
		during := float64(before)
		inEvent, ghzEvent = inEvent/during, ghzEvent/during
		row.InEvent, row.GHzAtHit, row.GHzEvent = &inEvent, &ghzAtHit, &ghzEvent
		notBack, periods := 0, float64(recovered)
		if recovered == 0 {
			notBack, periods = 1, during
		}
		row.Recovery, row.NotBack = &periods, &notBack
	}
	return row, nil
}

// freeGHz is the mean free clock of a group's members.
func freeGHz(g *instance.Group, set []int) float64 {
	sum := 0.0
	for _, i := range set {
		sum += g.Nodes.FreeGHz(i)
	}
	return sum / float64(max(len(set), 1))
}

// Mean of rows of one policy on one trace.
func Mean(rows []Row) Row {
	out := rows[0]
	for _, r := range rows[1:] {
		for _, f := range []struct{ to, from *float64 }{
			{&out.After, &r.After},
			{&out.Before, &r.Before},
			{&out.Net, &r.Net},
			{&out.Redeploys, &r.Redeploys},
			{&out.Adds, &r.Adds},
			{&out.InfeasibleBefore, &r.InfeasibleBefore},
			{&out.InfeasibleAfter, &r.InfeasibleAfter},
			{out.InEvent, r.InEvent},
			{&out.GHzBefore, &r.GHzBefore},
			{out.GHzAtHit, r.GHzAtHit},
			{out.GHzEvent, r.GHzEvent},
			{out.Recovery, r.Recovery},
			{&out.SolveMean, &r.SolveMean},
		} {
			if f.to != nil {
				*f.to += *f.from
			}
		}
		out.SolveMax = max(out.SolveMax, r.SolveMax)
		out.Starts += r.Starts
		if out.NotBack != nil {
			*out.NotBack += *r.NotBack
		}
	}
	n := float64(len(rows))
	for _, v := range []*float64{
		&out.After, &out.Before, &out.Net, &out.Redeploys, &out.Adds, &out.InfeasibleBefore, &out.InfeasibleAfter, out.InEvent, &out.GHzBefore, out.GHzAtHit,
		out.GHzEvent, out.Recovery, &out.SolveMean,
	} {
		if v != nil {
			*v /= n
		}
	}
	return out
}

// Named is a policy of the comparison.
type Named struct {
	Name string
	New  func(seed uint64) Policy
}

// Policies are those that are compared. A solve ends after deadline, proven or not.
func Policies(deadline time.Duration) []Named {
	list := []Named{
		{"first configuration", func(uint64) Policy { return keep{} }},
		{"Rhizoma h=2", func(uint64) Policy { return &climber{actions: 2} }},
		{"optimal each step", func(seed uint64) Policy { return &exact{seed, deadline} }},
	}
	for _, o := range []struct{ weight, cost float64 }{{0.3, 0.5}, {0.5, 0.5}} {
		list = append(list, Named{fmt.Sprintf("ewma %g, cost × %g", o.weight, o.cost), func(seed uint64) Policy {
			return &smoothed{exact: exact{seed, deadline}, weight: o.weight, cost: o.cost}
		}})
	}
	return list
}
