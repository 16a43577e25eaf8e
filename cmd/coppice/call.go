package main

import (
	"context"
	"encoding/json"
	"time"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// maxCall bounds the request of a call.
const maxCall = 8 << 20

// callTimeout is short: a call is a question to a component, not a change of the cluster.
const callTimeout = 30 * time.Second

func (c *cli) callCmd() *cobra.Command {
	var key, shard string
	cmd := c.command(spec{
		group: groupOne, use: "call COMPONENT METHOD [JSON|-]", short: "Call a method, JSON in and out",
		long: "Call a method of a component through its membrane. METHOD is package.Service/Method, or the short name where that is unique. Request\n" +
			"and reply follow protobuf's JSON mapping (64-bit integers are strings); without a request it is {}.",
		example: examples(
			`coppice call counter Add '{"n": 1}'`, "",
			"coppice call kv/main coppice.kv.v1.Kv/Get - < request.json", "",
			`coppice call counter Add '{"n": 1}' --key order-17`, "a repeat with the same key gets the same answer"),
		min: 2, max: 3, timeout: callTimeout + transferSlack, args: both(c.componentNames(true), c.methodNames),
		run: func(ctx context.Context, args []string) error {
			body := "{}"
			if len(args) == 3 {
				var err error
				if body, err = c.callBody(args[2]); err != nil {
					return err
				}
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Call(ctx, &apiv1.CallRequest{
				Component: args[0], Method: args[1], Json: body, IdempotencyKey: key, ShardKey: shard, TimeoutMs: c.waitMS(callTimeout),
			})
			if err != nil {
				return err
			}
			return c.write(append([]byte(res.Json), '\n'))
		},
	})
	cmd.Flags().StringVar(&key, "key", "", "idempotency key")
	cmd.Flags().StringVar(&shard, "shard-key", "", "which of several instances: the one this key belongs to")
	return cmd
}

func (c *cli) callBody(arg string) (string, error) {
	raw := []byte(arg)
	if arg == "-" {
		var err error
		if raw, err = c.readInput("-", maxCall); err != nil {
			return "", err
		}
	}
	if !json.Valid(raw) {
		return "", usagef("the request is not valid JSON: %s", shortArgs([]string{string(raw)}))
	}
	return string(raw), nil
}

// methodNames offers the methods of the component that is the first argument.
func (c *cli) methodNames(ctx context.Context, args []string) []string {
	if len(args) != 1 {
		return nil
	}
	cl, err := c.client()
	if err != nil {
		return nil
	}
	res, err := cl.Inspect(ctx, &apiv1.InspectRequest{Component: args[0]})
	if err != nil {
		return nil
	}
	var out []string
	for _, i := range res.Provides {
		for _, m := range i.Methods {
			out = append(out, m.Name)
		}
	}
	return out
}
