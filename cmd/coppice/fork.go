package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// forkTimeout is long: a state may be large, and its pages are brought to where they are needed.
const forkTimeout = 10 * time.Minute

func (c *cli) forkCmd() *cobra.Command {
	var at, as, export string
	cmd := c.command(spec{
		group: groupOne, use: "fork COMPONENT [--at ID|TIME] (--as NAME | --export FILE)", short: "Make a copy of a component beside it, or in a file",
		long: "Make a new component that begins with the state of an earlier checkpoint of another one, or with its state now. It is what the other\n" +
			"one is, as one instance and without its paths at the gateway, and goes its own way from there. With --as NAME it is part of the same\n" +
			"application until a file is deployed that does not name it; with --as APPLICATION/NAME it is in an application of its own, which\n" +
			"coppice remove takes away.\n\n" +
			"With --export it is written into one file with a checksum: state, manifest and artifact. coppice up --import FILE takes it in elsewhere, on\n" +
			"a lone node as well. The file is for its owner alone (mode 0600): it holds the component's state.",
		example: examples(
			"coppice fork shop/store --at c7 --as store-then", "beside it, as shop/store-then",
			"coppice fork shop/store --at 90m --as try/store", "in an application of its own",
			"coppice fork shop/store --at @branch-n2-1 --as store-n2", "a branch, to look at what it holds",
			"coppice fork shop/store --export store.coppice", "its state now, for another cluster",
			"coppice up --profile local --name lab --import store.coppice", "there"),
		min: 1, max: 1, timeout: forkTimeout + transferSlack, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			if export == "" && as == "" {
				return &usageError{why: "want --as NAME, or --export FILE"}
			}
			var m *apiv1.Moment
			if at != "" {
				var err error
				if m, err = c.earlier(at); err != nil {
					return err
				}
			}
			if export != "" {
				return c.export(ctx, &apiv1.ExportRequest{Component: args[0], At: m, As: as}, export)
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Fork(ctx, &apiv1.ForkRequest{Component: args[0], At: m, As: as, TimeoutMs: c.waitMS(forkTimeout)})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				fmt.Fprintf(w, "%s runs on %s with the state of %s of %s (checkpoint %d, %s), version %s, in %s\n", res.Component, res.Node, res.Id, res.From, res.Seq,
					bytesText(res.Bytes), res.Version, msText(res.TookMs))
			})
		},
	})
	c.atFlag(cmd, &at)
	cmd.Flags().Lookup("at").Usage += " (default: its state now)"
	cmd.Flags().StringVar(&as, "as", "", "what the copy is to be: NAME in the same application, or APPLICATION/NAME")
	cmd.Flags().StringVar(&export, "export", "", "write it into this file instead")
	return cmd
}

// export writes the file; an older one is replaced when the new one is whole.
func (c *cli) export(ctx context.Context, req *apiv1.ExportRequest, path string) (err error) {
	cl, err := c.client()
	if err != nil {
		return err
	}
	out, err := createBeside(path)
	if err != nil {
		return &failure{what: "export", why: err.Error(), try: "another FILE", cause: err}
	}
	defer func() { err = errors.Join(err, out.drop()) }()
	st, err := cl.Export(ctx, req)
	if err != nil {
		return err
	}
	p := c.progress()
	var done *apiv1.ExportSummary
	for st.Receive() {
		switch k := st.Msg().GetKind().(type) {
		case *apiv1.ExportChunk_State:
			p.state("%s", k.State)
		case *apiv1.ExportChunk_Data:
			if _, werr := out.Write(k.Data); werr != nil {
				p.clear()
				return &failure{what: "export", why: werr.Error(), try: "another FILE, where there is room", cause: werr}
			}
		case *apiv1.ExportChunk_Done:
			done = k.Done
		}
	}
	p.clear()
	if err := st.Err(); err != nil {
		return err
	}
	if done == nil || hex.EncodeToString(out.sum.Sum(nil)) != done.GetSha256() {
		return &failure{what: "export", why: "what arrived is not what the node sent", try: "the same command again"}
	}
	if err := out.settle(path); err != nil {
		return &failure{what: "export", why: err.Error(), try: "another FILE", cause: err}
	}
	if done.File, err = filepath.Abs(path); err != nil {
		return err
	}
	return c.show(done, func(w io.Writer) {
		fmt.Fprintf(w, "%s as of %s (%s of %s), version %s for %s: %s in %s, in %s\n", done.GetComponent(), done.GetTime().AsTime().Format(time.RFC3339), done.GetId(), done.GetFrom(),
			done.GetVersion(), join(done.GetPlatforms()), bytesText(done.GetBytes()), done.GetFile(), msText(done.GetTookMs()))
		fmt.Fprintf(w, "take it in elsewhere with: coppice up --import %s\n", filepath.Base(path))
	})
}
