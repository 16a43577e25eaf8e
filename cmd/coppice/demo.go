package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/demo"
)

func (c *cli) demoCmd() *cobra.Command {
	cfg := demo.Config{}
	cmd := c.command(spec{
		group: groupTool, use: "demo [flags]", short: "A whole cluster on this machine, with a node killed and a version swapped",
		long: "Run a cluster on this machine, one process per node, each in a network namespace of its own where that is permitted, with a\n" +
			"bookshop and a key-value store under a load that keeps a ledger of every answer. Nodes are killed and cut off, versions swapped;\n" +
			"each step is told with its measured time. It ends by itself, with status 0 only when every step did what it says, and leaves\n" +
			"nothing behind.",
		example: examples(
			"coppice demo", "",
			"coppice demo --keep", "leave it running, with the address of its dashboard",
			"coppice demo --nodes 7 --seed 42", "a larger cluster, another load"),
		max: 0, run: func(ctx context.Context, _ []string) error { return c.demo(ctx, cfg) },
	})
	f := cmd.Flags()
	f.IntVar(&cfg.Nodes, "nodes", 5, "how many, at least 5")
	f.Uint64Var(&cfg.Seed, "seed", 7, "what the load does follows from it")
	f.Float64Var(&cfg.Rate, "rate", demo.DefaultRate, "calls per second of the load")
	f.BoolVar(&cfg.Keep, "keep", false, "leave the cluster running at the end, until interrupted")
	f.BoolVar(&cfg.Loopback, "loopback", false, "no network namespaces, even where they are permitted")
	return cmd
}

func (c *cli) demo(ctx context.Context, cfg demo.Config) error {
	if cfg.Nodes < 5 || cfg.Nodes > 100 {
		return usagef("--nodes %d: want 5 to 100", cfg.Nodes)
	}
	if cfg.Rate <= 0 {
		return usagef("--rate %g: want more than 0", cfg.Rate)
	}
	var err error
	if cfg.Binary, err = os.Executable(); err != nil {
		return fmt.Errorf("find this binary: %w", err)
	}
	cfg.Out, cfg.JSON = c.out, c.json()
	if !cfg.Loopback {
		if err := cluster.EnterUserNamespace(cfg.Binary); err != nil {
			return err
		}
	}
	err = demo.Run(ctx, cfg)
	var failed *demo.FailedError
	if errors.As(err, &failed) {
		return &failure{what: "demo: " + failed.Step, why: oneLine(failed.Err.Error()), try: "less " + failed.Logs + "/n1.log", cause: err}
	}
	return err
}
