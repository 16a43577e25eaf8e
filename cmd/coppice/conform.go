package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/internal/conform"
)

func (c *cli) conformCmd() *cobra.Command {
	var given []string
	var only string
	cmd := c.command(spec{
		group: groupTool, use: "conform FILE [--call 'METHOD {JSON}']…", short: "Play every rule of the contract with a component's binary",
		long: "Run a component's binary as a node would, play every rule of the contract between a node and a component with it, and say which hold: what it\n" +
			"says of itself, its process, lease and lifecycle, attributes, state, calls that are transactions, and the journal. No cluster is needed. What the\n" +
			"component does not offer is skipped, and said. The rules of calls are tried with calls that you give: each must succeed on an empty state, at least\n" +
			"one should write and one should only read. Ends with status 1 when a rule does not hold.",
		example: examples(
			"coppice conform ./counter --call 'Add {\"n\": 5}' --call Get", "",
			"coppice conform ./kv.pyz --call 'Put {\"key\": \"a\", \"value\": \"1\"}' -o json", "for a script"),
		min: 1, max: 1,
		run: func(ctx context.Context, args []string) error {
			if st, err := os.Stat(args[0]); err != nil || !st.Mode().IsRegular() {
				return usagef("%s is no file that can be read; want a component's binary or script", args[0])
			}
			cfg := conform.Config{File: args[0], Only: only}
			for _, g := range given {
				method, request, some := strings.Cut(g, " ")
				if some && !json.Valid([]byte(request)) {
					return usagef("--call %q: want the method, a space, and the request as JSON", g)
				}
				cfg.Calls = append(cfg.Calls, conform.Call{Method: method, JSON: request})
			}
			if !c.json() {
				cfg.Each = c.conformLine()
			}
			report, err := conform.Run(ctx, cfg)
			if err != nil {
				return err
			}
			if err := c.conformed(report); err != nil {
				return err
			}
			if n := report.Count(conform.Failed); n > 0 {
				return &failure{what: "conform " + args[0], why: plural(n, "rule does", "rules do") + " not hold", try: "docs/writing-a-component.md says what a component has to do"}
			}
			return nil
		},
	})
	cmd.Flags().StringArrayVar(&given, "call", nil, "a call of the component's own services to try the rules of calls with: the method, a space, the request as JSON (several: again)")
	cmd.Flags().StringVar(&only, "only", "", "play only the rules with this text, such as lease, or txn-calls:")
	return cmd
}

// conformLine prints results as they come, under a heading for each group.
func (c *cli) conformLine() func(conform.Result) {
	group := ""
	colours := map[conform.Outcome]string{conform.Passed: green, conform.Failed: red, conform.Skipped: dim}
	return func(r conform.Result) {
		if r.Group != group {
			group = r.Group
			fmt.Fprintln(c.out, group)
		}
		fmt.Fprintf(c.out, "  %s  %s\n", c.paint(colours[r.Outcome])(fmt.Sprintf("%-7s", r.Outcome)), r.Check)
		if r.Why != "" {
			fmt.Fprintf(c.out, "           %s\n", c.paint(dim)(oneLine(r.Why)))
		}
	}
}

func (c *cli) conformed(r *conform.Report) error {
	if c.json() {
		raw, err := json.Marshal(r)
		if err != nil {
			return err
		}
		return c.document(raw)
	}
	return c.text(func(w io.Writer) {
		fmt.Fprintf(w, "%s %s: %d passed, %d failed, %d skipped\n", r.Type, r.Version, r.Count(conform.Passed), r.Count(conform.Failed), r.Count(conform.Skipped))
	})
}
