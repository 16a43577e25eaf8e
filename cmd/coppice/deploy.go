package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) deployCmd() *cobra.Command {
	var wait bool
	cmd := c.command(spec{
		group: groupApp, use: "deploy FILE [--wait] [--timeout 60s]", short: "Make a manifest the desired state",
		long: "Make a manifest the desired state: all its documents in one transaction, or none. Local files that it names as artifacts are pushed\n" +
			"first; their paths are relative to the manifest. With --wait it ends when all is healthy, or says what is not.",
		example: examples(
			"coppice deploy app.yaml --wait", "",
			"coppice deploy app.yaml --wait --timeout 5m", "a slow start",
			"coppice deploy - < app.yaml", "from stdin"),
		min: 1, max: 1, bounds: true, // of a push the time is not bounded
		run: func(ctx context.Context, args []string) error { return c.deploy(ctx, args[0], wait) },
	})
	cmd.Flags().BoolVar(&wait, "wait", false, "until every instance is healthy, at most --timeout (1m)")
	return cmd
}

func (c *cli) deploy(ctx context.Context, file string, wait bool) error {
	m, err := c.readManifest(file)
	if err != nil {
		return err
	}
	cl, err := c.client()
	if err != nil {
		return err
	}
	local, err := c.pushManifest(ctx, cl, m)
	if err != nil {
		return err
	}
	ctx, cancel := c.bounded(ctx, actTimeout+transferSlack)
	defer cancel()
	st, err := cl.Deploy(ctx, &apiv1.DeployRequest{File: m.name, Manifest: m.data, Artifacts: local, Wait: wait, TimeoutMs: c.waitMS(actTimeout)})
	if err != nil {
		return err
	}
	last, err := c.followDeploy(st)
	if err != nil {
		return waitFailure("deploy "+file, last, err)
	}
	if !last.Done {
		return waitFailure("deploy "+file, last, connect.NewError(connect.CodeUnavailable, fmt.Errorf("the node went away")))
	}
	return c.show(last, func(w io.Writer) { c.deployText(w, last, wait) })
}

func (c *cli) followDeploy(st *connect.ServerStreamForClient[apiv1.DeployUpdate]) (*apiv1.DeployUpdate, error) {
	p := c.progress()
	defer p.clear()
	last := &apiv1.DeployUpdate{}
	for st.Receive() {
		msg := st.Msg()
		if len(msg.Applications) == 0 {
			msg.Applications = last.Applications
		}
		last = msg
		if !msg.Done && len(msg.Waiting) > 0 {
			p.state("waiting for %s", waitingText(msg.Waiting))
		}
	}
	return last, st.Err()
}

// waitFailure says what a deploy was waiting for when no server did.
func waitFailure(what string, last *apiv1.DeployUpdate, err error) error {
	if _, ok := problemOf(err); ok || len(last.Applications) == 0 {
		return err
	}
	why := "the node that was asked went away"
	if connect.CodeOf(err) == connect.CodeDeadlineExceeded {
		why = "not healthy in time"
	}
	if len(last.Waiting) > 0 {
		why += ": waited for " + waitingText(last.Waiting)
	}
	return &failure{what: what, why: "committed, but " + why, try: "coppice ps " + last.Applications[0].Application, cause: err}
}

func waitingText(list []*apiv1.Waiting) string {
	const most = 3
	var out []string
	for i, x := range list {
		if i == most {
			out = append(out, fmt.Sprintf("%d more", len(list)-most))
			break
		}
		s := x.Instance + " " + x.State
		if x.Node != "" {
			s += " on " + x.Node
		}
		if x.Reason != "" {
			s += " (" + oneLine(x.Reason) + ")"
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

func (c *cli) deployText(w io.Writer, u *apiv1.DeployUpdate, waited bool) {
	for _, a := range u.Applications {
		state := "is as it was"
		if a.Changed {
			state = "deployed"
		}
		fmt.Fprintf(w, "%s %s, version %d of its desired state\n", a.Application, state, a.Version)
		for _, k := range a.Components {
			fmt.Fprintf(w, "  %s  %s %s  %s  %s\n", k.Component, k.Artifact, k.Version, plural(int(k.Instances), "instance", "instances"), k.Change)
		}
	}
	if waited && u.Healthy {
		fmt.Fprintln(w, c.paint(green)("healthy")+" after "+msText(u.TookMs))
	}
}
