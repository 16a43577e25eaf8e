package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) registryCmd() *cobra.Command {
	return c.groupCommand(groupApp, "registry", "Publish component binaries and see what there is",
		examples("coppice registry push bin/components/kv", "", "coppice registry list", ""),
		c.registryPushCmd(), c.registryListCmd(), c.registryShowCmd())
}

func (c *cli) artifactsTable(artifacts []*apiv1.Artifact) *table {
	t := c.table("NAME", "VERSION", "STATE", "KIND", "SIZE", "PLATFORMS", "HOLDERS", "PUSHED", "DIGEST")
	for _, a := range artifacts {
		name := a.Name
		if name == "" {
			name = a.File
		}
		state := stateCell(a.State)
		if a.Reason != "" {
			state.text += ": " + a.Reason
		}
		pushed := c.sinceText(a.Pushed)
		if pushed != "" {
			pushed += " ago"
		}
		t.row(name, a.Version, state, a.Kind, sizeOr(a.Bytes), join(a.Platforms), join(a.Holders), pushed, shortDigest(a.Digest))
	}
	return t
}

func (c *cli) interfacesText(w io.Writer, title string, list []*apiv1.Interface) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintln(w, c.paint(bold)(title))
	for _, i := range list {
		notes := ""
		if i.Optional {
			notes += " optional"
		}
		if i.Many {
			notes += " many"
		}
		if i.Path != "" {
			notes += " at " + i.Path
		}
		service := ""
		if i.Service != "" {
			service = " " + i.Service
		}
		fmt.Fprintf(w, "  %s  %s%s%s\n", i.Name, i.Kind, service, c.paint(dim)(notes))
		for _, m := range i.Methods {
			in, out := m.Input, m.Output
			if m.ClientStreaming {
				in = "stream " + in
			}
			if m.ServerStreaming {
				out = "stream " + out
			}
			fmt.Fprintf(w, "    %s(%s) → %s %s\n", m.Name, in, out, c.paint(dim)(m.Idempotency))
		}
	}
}
