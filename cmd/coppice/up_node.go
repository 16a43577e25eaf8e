package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/coppice-project/coppice/components/runner"
)

// This file is the seam to package node: everything else of the command line knows only these three functions.

// runUp runs a node until ctx ends or it is told to stop, and calls ready once when it serves.
func runUp(_ context.Context, cfg upConfig, _ *slog.Logger, _ func(readyInfo) error) error {
	return &failure{what: "start node " + cfg.Name, why: "this build has no node in it"}
}

// execShim is `coppice __exec`: it enters the sandbox and becomes the component.
func execShim(args []string) int { return runner.ExecShim(args) }

// builtinComponent is `coppice __component NAME`.
func builtinComponent(name string) int {
	fmt.Fprintf(os.Stderr, "coppice: __component %s: this build has no such component in it\n", name)
	return exitFailed
}
