package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

type lifecycleVerb = func(apiv1connect.ControlClient, context.Context, *apiv1.LifecycleRequest) (*apiv1.LifecycleResponse, error)

// lifecycle runs one of the four verbs of the lifecycle controller.
func (c *cli) lifecycle(s spec, verb lifecycleVerb) *cobra.Command {
	s.group, s.min, s.max, s.timeout, s.args = groupOne, 1, 1, actTimeout+transferSlack, c.componentNames(true)
	s.run = func(ctx context.Context, args []string) error {
		cl, err := c.client()
		if err != nil {
			return err
		}
		res, err := verb(cl, ctx, &apiv1.LifecycleRequest{Component: args[0], TimeoutMs: c.waitMS(actTimeout)})
		if err != nil {
			return err
		}
		return c.show(res, func(w io.Writer) {
			fmt.Fprintf(w, "%s is %s after %s\n", res.Component, c.paint(stateColor(res.State))(res.State), msText(res.TookMs))
			for _, i := range res.Instances {
				fmt.Fprintln(w, " ", waitingText([]*apiv1.Waiting{i}))
			}
		})
	}
	return c.command(s)
}
