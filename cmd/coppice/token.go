package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) tokenCmd() *cobra.Command {
	var ttl time.Duration
	var uses uint32
	var revoke string
	cmd := c.command(spec{
		group: groupNode, use: "token [--ttl 1h] [--uses N] [--revoke TOKEN]", short: "Print a token with which a node joins the cluster",
		long: "Print a join token: the cluster's id, where to dial, and what admits the newcomer. It holds for an hour and any number of nodes\n" +
			"unless told otherwise. Whoever has it can join: treat it as a password.",
		example: examples(
			"coppice token", "",
			"coppice token --ttl 10m --uses 1", "for one node, within ten minutes",
			"coppice up --join $(coppice token)", "join from another shell of this machine",
			"coppice token --revoke TOKEN", "nobody joins with it any more"),
		timeout: actTimeout,
		run: func(ctx context.Context, _ []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			if revoke != "" {
				res, err := cl.RevokeToken(ctx, &apiv1.RevokeTokenRequest{Token: revoke})
				if err != nil {
					return err
				}
				return c.show(res, func(w io.Writer) { fmt.Fprintln(w, revokedText(res.Revoked)) })
			}
			if ttl < 0 {
				return usagef("--ttl %s: want a time from now", ttl)
			}
			res, err := cl.Token(ctx, &apiv1.TokenRequest{TtlMs: uint64(ttl.Milliseconds()), Uses: uses})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) { fmt.Fprintln(w, res.Token) })
		},
	})
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it admits")
	cmd.Flags().Uint32Var(&uses, "uses", 0, "how many nodes it admits (0: any number)")
	cmd.Flags().StringVar(&revoke, "revoke", "", "make this token worthless instead")
	return cmd
}

func revokedText(now bool) string {
	if now {
		return "revoked"
	}
	return "it admitted nobody any more"
}
