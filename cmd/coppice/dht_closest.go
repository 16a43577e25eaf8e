package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) dhtClosestCmd() *cobra.Command {
	var count uint32
	cmd := c.command(spec{
		use: "closest KEY", short: "List the members responsible for a key, in order",
		long: "List the members closest to a key by XOR distance. The first eligible of /system/placement is the coordinator; the first ones of a\n" +
			"record's key hold the record.",
		example: examples("coppice dht closest /system/placement", "who places components", "coppice dht closest /kb/ckpt/shop/store-0 --count 3", ""),
		min:     1, max: 1, timeout: readTimeout,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.DhtClosest(ctx, &apiv1.DhtClosestRequest{Key: args[0], Count: count})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				fmt.Fprintf(w, "%s is at %s\n", res.Key, res.Hash)
				c.dhtNodes(w, res.Nodes)
			})
		},
	})
	cmd.Flags().Uint32Var(&count, "count", 8, "how many")
	return cmd
}

func (c *cli) dhtNodes(w io.Writer, nodes []*apiv1.DhtNode) {
	t := c.dhtTable()
	for _, n := range nodes {
		t.row(n.Rank, n.Name, stateCell(n.State), n.Distance, yesNo(n.Eligible), yesNo(n.Voter), yesNo(n.Holds), shortID(n.Id))
	}
	t.write(w)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return ""
}
