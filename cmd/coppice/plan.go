package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) planCmd() *cobra.Command {
	var without, with []string
	var prices map[string]string
	var replay string
	cmd := c.command(spec{
		group: groupApp, use: "plan [FILE]", short: "Show what deploy would do, and change nothing",
		long: "Show where deploy would put each instance, with its score, and why every other node was refused. Nothing is changed and nothing is\n" +
			"pushed. --without, --with and --price ask how it would be if other things were different: for FILE, or for what is deployed now.\n" +
			"Where no node is feasible it says which constraints no node holds together, and what would help. Ends with status 1 then.\n" +
			"--replay solves a recorded decision again (its digest is in why -o json and in the table decisions) and compares the plans byte for byte.",
		example: examples("coppice plan app.yaml", "", "coppice plan app.yaml -o json | jq .feasible", "in a check before a merge", "coppice plan - < app.yaml", "",
			"coppice plan --without n2", "what would be where if n2 were dead?", "coppice plan --with n9.json", "and with a node more?", "coppice plan --price n1=0.9", "and if n1 cost more?"),
		max: 1, timeout: actTimeout,
		run: func(ctx context.Context, args []string) error {
			req := &apiv1.PlanRequest{Without: without, Replay: replay}
			if err := readWhatif(req, with, prices); err != nil {
				return err
			}
			asks := len(without)+len(with)+len(prices) > 0
			switch {
			case replay != "" && (len(args) > 0 || asks):
				return usagef("plan --replay wants nothing else")
			case len(args) == 0 && !asks && replay == "":
				return usagef("plan wants FILE, or one of --without, --with, --price and --replay")
			case len(args) == 1:
				m, err := c.readManifest(args[0])
				if err != nil {
					return err
				}
				if req.Artifacts, err = m.describe(); err != nil {
					return err
				}
				req.File, req.Manifest = m.name, m.data
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Plan(ctx, req)
			if err != nil {
				return err
			}
			if res.Replay != nil {
				if err := c.show(res.Replay, func(w io.Writer) { c.replayText(w, res.Replay) }); err != nil || res.Replay.Same {
					return err
				}
				return &failure{what: "plan --replay " + replay, why: "the plan is not what it was", try: "coppice events /system/placement"}
			}
			if err := c.show(res, func(w io.Writer) { c.planText(w, res, asks) }); err != nil || res.Feasible {
				return err
			}
			return &failure{what: strings.TrimSpace("plan " + join(args)), why: "no node is feasible for " + unplaced(res)}
		},
	})
	cmd.Flags().StringSliceVar(&without, "without", nil, "as if this node were dead, repeatable")
	cmd.Flags().StringSliceVar(&with, "with", nil, "as if there were the node that this JSON file describes, repeatable")
	cmd.Flags().StringToStringVar(&prices, "price", nil, "NODE=PRICE: as if a node had this price, repeatable")
	cmd.Flags().StringVar(&replay, "replay", "", "solve the decision of this digest again")
	return cmd
}

// readWhatif reads what the flags name.
func readWhatif(req *apiv1.PlanRequest, with []string, prices map[string]string) error {
	for _, file := range with {
		data, err := os.ReadFile(file)
		if err != nil {
			return &failure{what: "plan --with " + file, why: err.Error()}
		}
		req.With = append(req.With, &apiv1.NodeFile{Name: file, Data: data})
	}
	for node, text := range prices {
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return usagef("plan --price wants NODE=PRICE, got %s=%s", node, text)
		}
		if req.Prices == nil {
			req.Prices = map[string]float64{}
		}
		req.Prices[node] = v
	}
	return nil
}

func (c *cli) replayText(w io.Writer, r *apiv1.Replay) {
	verdict := "the same plan, byte for byte"
	if !r.Same {
		verdict = c.paint(red)("another plan")
	}
	fmt.Fprintf(w, "%s of %s on %s: %s\n", r.Digest, r.Time.AsTime().Local().Format("15:04:05.000"), r.Node, verdict)
	fmt.Fprintf(w, "%s of cluster in, %s of plan out in %s, objective %.4f\n", bytesText(r.RequestBytes), bytesText(r.PlanBytes), msText(r.TookMs), r.Objective)
}

func unplaced(res *apiv1.PlanResponse) string {
	n, first := 0, ""
	for _, i := range res.Components {
		if i.Node == "" {
			if n == 0 {
				first = i.Instance
			}
			n++
		}
	}
	if n > 1 {
		return fmt.Sprintf("%s and %d more", first, n-1)
	}
	return first
}

func (c *cli) planText(w io.Writer, res *apiv1.PlanResponse, asks bool) {
	t := c.table("INSTANCE", "NODE", "NOW", "SCORE", "RUNNER-UP", "SUCCESSORS", "WHY")
	for _, i := range res.Components {
		node := cell{i.Node, ""}
		if i.Node == "" {
			node = cell{"nowhere", red}
		}
		up := i.RunnerUp
		if up != "" {
			up += fmt.Sprintf(" %.3f", i.RunnerUpScore)
		}
		t.row(i.Instance, node, i.Current, fmt.Sprintf("%.3f", i.Score), up, join(i.Successors), i.Reason)
	}
	t.write(w)
	for _, i := range res.Components {
		c.refusals(w, i.Instance, i.Refused)
		conflictText(w, i.Instance, i.Conflict, i.Remedies)
		for _, o := range i.Overlay {
			fmt.Fprintf(w, "%s: a command laid over the manifest: %s\n", i.Instance, oneLine(o))
		}
	}
	fmt.Fprintf(w, "\nobjective %.4f (now %.4f, %s)\n", res.Objective, res.ObjectiveBefore, gapText(res.Objective, res.Bound, res.Optimal))
	for _, ch := range res.Changes {
		fmt.Fprintln(w, "would", oneLine(ch))
	}
	if len(res.Changes) == 0 && !asks {
		fmt.Fprintln(w, "would change nothing")
	}
	for _, x := range res.Warnings {
		fmt.Fprintln(w, c.paint(stateColor("warning"))("warning:"), oneLine(x))
	}
}

// gapText says how far a plan may be from the best one.
func gapText(objective, bound float64, optimal bool) string {
	switch {
	case optimal:
		return "optimal: no plan is better"
	case objective > 0:
		return fmt.Sprintf("no plan is better than %.4f, a gap of %.1f %%", bound, 100*(bound-objective)/objective)
	}
	return fmt.Sprintf("no plan is better than %.4f", bound)
}

// conflictText says why an instance has no node at all.
func conflictText(w io.Writer, instance string, conflict, remedies []string) {
	if len(conflict) == 0 {
		return
	}
	fmt.Fprintf(w, "%s: no node holds together: %s\n", instance, oneLine(strings.Join(conflict, " + ")))
	for _, r := range remedies {
		fmt.Fprintf(w, "  it would be feasible %s\n", oneLine(r))
	}
}

// refusals lists the nodes that were not taken.
func (c *cli) refusals(w io.Writer, instance string, refused []*apiv1.Refusal) {
	if len(refused) == 0 {
		return
	}
	fmt.Fprintf(w, "%s was refused by\n", instance)
	t := c.fields()
	for _, r := range refused {
		t.rows = append(t.rows, []cell{{"  " + r.Node, ""}, {oneLine(r.Constraint), ""}, {oneLine(r.Detail), dim}})
	}
	t.write(w)
}
