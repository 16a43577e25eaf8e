package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/internal/harm"
	"github.com/coppice-project/coppice/node"
	"github.com/coppice-project/coppice/node/api"
	exec "github.com/coppice-project/coppice/plugins/exec/component"
	"github.com/coppice-project/coppice/plugins/placement/component"
)

// This file is the seam to package node: everything else of the command line knows only these three functions.

// gcPercent trades a little CPU for memory: a node's live heap is small, and what lies unused of it after a storm of calls is not given back
// soon. In the demo it is 75 MiB instead of 88 (coppice demo, last step; GOGC=100 for the other).
const gcPercent = 50

// runUp runs a node until ctx ends or it is told to stop, and calls ready once when it serves.
func runUp(ctx context.Context, cfg upConfig, log *slog.Logger, ready func(readyInfo) error) error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	open, err := importing(ctx, cfg.Import)
	if err != nil {
		return err
	}
	nc := node.Config{
		Import: open,
		Data:   cfg.Data, Name: cfg.Name, Listen: cfg.Listen, Advertise: cfg.Advertise, Zone: cfg.Zone, Role: cfg.Role, Join: cfg.Join, API: cfg.API, HTTP: cfg.HTTP,
		Labels: cfg.Labels, Capacity: node.Capacity{CPUMillis: cfg.CPUMillis, MemoryBytes: cfg.MemoryBytes, DiskBytes: cfg.DiskBytes}, Plugins: cfg.Plugins,
		Profile: cfg.Profile, MaxVoters: cfg.Voters, View: cfg.View, Copies: cfg.Copies, CopyAcks: cfg.CopyAcks, Version: cfg.Version, Log: log, Die: die,
		FS: harm.FS(vfs.Default), Format: harm.Format(arbiter.MaxFormat),
	}
	if err := nc.Validate(); err != nil {
		return &usageError{why: err.Error()}
	}
	for {
		what, err := live(ctx, nc, func(r readyInfo) error {
			nc.Import = nil // it is taken in once
			return ready(r)
		})
		refused, told := api.ProblemOf(err)
		renewed, again := errors.AsType[*node.RenewError](err)
		switch {
		case ctx.Err() != nil && what == "run":
			return nil
		case again && ctx.Err() == nil:
			log.Warn("the node is started again", "error", renewed)
		case told:
			return &failure{what: refused.GetWhat(), why: refused.GetWhy(), try: refused.GetTry(), cause: err}
		case err != nil:
			return &failure{what: what + " node " + cfg.Name, why: err.Error()}
		default:
			return nil
		}
	}
}

// live is one life of a node; what was being done when it failed.
func live(ctx context.Context, nc node.Config, ready func(readyInfo) error) (what string, err error) {
	n, err := node.New(ctx, nc)
	if err != nil {
		return "start", err
	}
	return "run", n.Run(ctx, func(r node.Ready) error {
		return ready(readyInfo{Name: r.Node, ID: r.ID, Cluster: r.Cluster, API: r.API, HTTP: r.HTTP, Token: r.Token})
	})
}

// die is kill -9 of this process by itself.
func die() {
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		os.Exit(exitFailed)
	}
}

// execShim is `coppice __exec`: it enters the sandbox and becomes the component.
func execShim(args []string) int { return runner.ExecShim(args) }

// builtinComponent is `coppice __component NAME`.
func builtinComponent(name string) int {
	switch name {
	case "placement":
		component.Run(version())
	case components.ExecName:
		exec.Run(version())
	default:
		fmt.Fprintf(os.Stderr, "coppice: __component %s: there is no such component in this binary\n", name)
		return exitFailed
	}
	return 0
}
