package main

import (
	"context"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// completionTime bounds what a press of the tabulator may cost.
const completionTime = time.Second

// completer asks a function for names; what it cannot find out is simply not offered.
func (c *cli) completer(names func(ctx context.Context, args []string) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctxOf(cmd)), completionTime)
		defer cancel()
		return names(ctx, args), cobra.ShellCompDirectiveNoFileComp
	}
}

func ctxOf(cmd *cobra.Command) context.Context {
	if ctx := cmd.Context(); ctx != nil {
		return ctx
	}
	return context.Background()
}

func (c *cli) completeFlag(cmd *cobra.Command, flag string, names func(context.Context) []string) {
	err := cmd.RegisterFlagCompletionFunc(flag, c.completer(func(ctx context.Context, _ []string) []string { return names(ctx) }))
	if err != nil {
		panic(err) // the flag does not exist: a mistake in this file's callers, found by any run
	}
}

func localNodes(context.Context) []string {
	entries, err := api.Registered()
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name)
	}
	return out
}

// nodeNames offers the members' names as the n-th argument.
func (c *cli) nodeNames(n int) func(context.Context, []string) []string {
	return func(ctx context.Context, args []string) []string {
		if len(args) != n {
			return nil
		}
		cl, err := c.client()
		if err != nil {
			return nil
		}
		res, err := cl.Nodes(ctx, &apiv1.NodesRequest{})
		if err != nil {
			return nil
		}
		var out []string
		for _, m := range res.Nodes {
			out = append(out, m.Name+"\t"+m.State)
		}
		return out
	}
}

// componentNames offers components and, where asked, their instances as the first argument.
func (c *cli) componentNames(instances bool) func(context.Context, []string) []string {
	return func(ctx context.Context, args []string) []string {
		if len(args) != 0 {
			return nil
		}
		cl, err := c.client()
		if err != nil {
			return nil
		}
		res, err := cl.Ps(ctx, &apiv1.PsRequest{})
		if err != nil {
			return nil
		}
		var out []string
		for _, i := range res.Instances {
			out = append(out, i.Component+"\t"+i.Artifact+" "+i.Version)
			if instances {
				out = append(out, i.Instance+"\t"+i.State+" on "+i.Node)
			}
		}
		slices.Sort(out)
		return slices.Compact(out)
	}
}

func (c *cli) applicationNames(ctx context.Context, args []string) []string {
	if len(args) != 0 {
		return nil
	}
	cl, err := c.client()
	if err != nil {
		return nil
	}
	res, err := cl.Apps(ctx, &apiv1.AppsRequest{})
	if err != nil {
		return nil
	}
	var out []string
	for _, a := range res.Apps {
		out = append(out, a.Application+"\t"+a.State)
	}
	return out
}

func (c *cli) artifactNames(ctx context.Context, args []string) []string {
	if len(args) != 0 {
		return nil
	}
	cl, err := c.client()
	if err != nil {
		return nil
	}
	res, err := cl.RegistryList(ctx, &apiv1.RegistryListRequest{})
	if err != nil {
		return nil
	}
	var out []string
	for _, a := range res.Artifacts {
		if a.Name != "" {
			out = append(out, a.Name, a.Name+"@"+a.Version)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// both chains completions: the first that has any.
func both(fs ...func(context.Context, []string) []string) func(context.Context, []string) []string {
	return func(ctx context.Context, args []string) []string {
		for _, f := range fs {
			if out := f(ctx, args); len(out) > 0 {
				return out
			}
		}
		return nil
	}
}
