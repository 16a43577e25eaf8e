package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) dhtGetCmd() *cobra.Command {
	return c.command(spec{
		use: "get KEY", short: "Get a record as kad-dht's own lookup finds it",
		long:    "Get a record by kad-dht's own lookup, as any stock client would, with the hops it took and the copies there are.",
		example: examples("coppice dht get /kb/ckpt/shop/store-0", "", "coppice dht get /kb/nodes/ID -o json | jq .copies", ""),
		min:     1, max: 1, timeout: readTimeout,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.DhtGet(ctx, &apiv1.DhtGetRequest{Key: args[0]})
			if err != nil {
				return err
			}
			if err := c.show(res, func(w io.Writer) { c.dhtGetText(w, res) }); err != nil || res.Found {
				return err
			}
			return &failure{what: "dht get " + args[0], why: "no such record", try: "coppice dht closest " + args[0]}
		},
	})
}

func (c *cli) dhtGetText(w io.Writer, r *apiv1.DhtGetResponse) {
	if !r.Found {
		return
	}
	t := c.fields()
	t.field("key", r.Key)
	t.field("value", fmt.Sprintf("%s %s", bytesText(uint64(len(r.Value))), printable(r.Text)))
	signed := cell{"verified", green}
	if !r.Signed {
		signed = cell{"none", red}
	}
	t.field("writer", r.Writer)
	t.field("signature", signed)
	t.field("revision", fmt.Sprintf("%d.%d.%d (incarnation.epoch.revision)", r.Incarnation, r.Epoch, r.Revision))
	t.field("age", msText(r.AgeMs))
	t.field("lookup", fmt.Sprintf("%s, %s", plural(int(r.Hops), "hop", "hops"), msText(r.TookMs)))
	t.field("copies", fmt.Sprintf("%d, %d of them with this revision", r.Copies, r.Agree))
	t.field("kad-dht key", r.KadKey)
	t.write(w)
	if len(r.Holders) > 0 {
		c.dhtNodes(w, r.Holders)
	}
}
