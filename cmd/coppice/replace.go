package main

import (
	"fmt"
	"io"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// replaced prints what a swap, a move or an undo cost.
func (c *cli) replaced(res *apiv1.ReplaceResponse) error {
	return c.show(res, func(w io.Writer) {
		fmt.Fprintf(w, "%s: %s → %s in %s, pause %s, %s of state, %s held\n", res.Component, res.From, res.To,
			msText(res.TookMs), msText(res.PauseMs), bytesText(res.Bytes), plural(int(res.CallsHeld), "call", "calls"))
		if res.State != "" {
			fmt.Fprintln(w, "its state is", res.State)
		}
		if res.Kept != "" {
			fmt.Fprintf(w, "what was left is kept as %s; coppice undo %s returns to it\n", res.Kept, res.Component)
		}
	})
}
