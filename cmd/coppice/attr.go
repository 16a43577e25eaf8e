package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) attrCmd() *cobra.Command {
	var dry bool
	cmd := c.command(spec{
		group: groupOne, use: "attr COMPONENT [k=v…]", short: "Show or set a component's attributes",
		long: "Show a component's attributes, or set some. A value is JSON; what is not valid JSON is taken as text. All are set or none. What is set\n" +
			"stays, over failovers and swaps, until a deploy sets it or unpin clears it.",
		example: examples(
			"coppice attr shop/store", "",
			"coppice attr shop/store capacity=5000", "",
			`coppice attr shop/store 'greeting="10"' --dry-run`, "text that looks like a number; only checked"),
		min: 1, max: -1, timeout: actTimeout, args: c.componentNames(true),
		run: func(ctx context.Context, args []string) error {
			set, err := assignments(args[1:])
			if err != nil {
				return err
			}
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Attr(ctx, &apiv1.AttrRequest{Component: args[0], Set: set, DryRun: dry})
			if err != nil {
				return err
			}
			return c.show(res, func(w io.Writer) {
				c.attributesText(w, res.Attributes)
				if len(res.Attributes) == 0 {
					fmt.Fprintln(w, res.Component, "has no attributes")
				}
				if res.RestartNeeded {
					fmt.Fprintln(w, c.paint(yellow)("takes effect after a restart"))
				}
				if res.DryRun {
					fmt.Fprintln(w, "only checked, nothing was changed")
				}
			})
		},
	})
	cmd.Flags().BoolVar(&dry, "dry-run", false, "check the values, change nothing")
	return cmd
}

// assignments reads k=v pairs as JSON values.
func assignments(args []string) (map[string]string, error) {
	set := map[string]string{}
	for _, a := range args {
		k, v, ok := strings.Cut(a, "=")
		if !ok || k == "" {
			return nil, usagef("%q: want k=v", a)
		}
		if _, twice := set[k]; twice {
			return nil, usagef("%s is set twice", k)
		}
		if !json.Valid([]byte(v)) {
			raw, err := json.Marshal(v)
			if err != nil {
				return nil, usagef("%q: %v", a, err)
			}
			v = string(raw)
		}
		set[k] = v
	}
	return set, nil
}
