package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) doctorCmd() *cobra.Command {
	return c.command(spec{
		group: groupNode, use: "doctor", short: "Look for what is wrong, its cause and how to mend it",
		long: "Look for what is wrong with the node that answers and with the cluster as it sees it. Ends with status 1 when there is an error\n" +
			"among the findings.",
		example: examples("coppice doctor", "", "coppice doctor -o json", "for a monitor"),
		timeout: actTimeout,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Doctor(ctx, &apiv1.DoctorRequest{})
			if err != nil {
				return err
			}
			if err := c.show(res, func(w io.Writer) { c.doctorText(w, res) }); err != nil || res.Healthy {
				return err
			}
			n := 0
			for _, f := range res.Findings {
				if f.Severity == "error" {
					n++
				}
			}
			return &failure{what: "doctor", why: plural(n, "error", "errors") + " found"}
		},
	})
}

func (c *cli) doctorText(w io.Writer, res *apiv1.DoctorResponse) {
	for _, f := range res.Findings {
		fmt.Fprintf(w, "%s  %s: %s\n", c.paint(stateColor(f.Severity))(fmt.Sprintf("%-7s", f.Severity)), f.Subject, oneLine(f.Finding))
		if f.Cause != "" {
			fmt.Fprintf(w, "         %s %s\n", c.paint(dim)("because"), oneLine(f.Cause))
		}
		if f.Fix != "" {
			fmt.Fprintf(w, "         %s %s\n", c.paint(dim)("try:"), oneLine(f.Fix))
		}
	}
	if len(res.Findings) == 0 {
		fmt.Fprintln(w, "nothing found")
	}
}
