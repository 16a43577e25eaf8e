package main

import (
	"context"
	"fmt"
	"os"

	"github.com/coppice-project/coppice/internal/bench"
	"github.com/coppice-project/coppice/internal/load"
)

// internalCommand runs what the node starts from its own binary, before anything of the command line is set up: the shim that enters a
// sandbox and executes a component, the components that are inside the binary, and the demo's load generator. ok is false for every other command.
func internalCommand(args []string) (code int, ok bool) {
	if len(args) == 0 {
		return 0, false
	}
	switch args[0] {
	case "__exec":
		return execShim(args[1:]), true
	case "__component":
		if len(args) != 2 {
			fmt.Fprintln(os.Stderr, "coppice: __component: want the name of a component that is inside the binary")
			return exitUsage, true
		}
		return builtinComponent(args[1]), true
	case bench.ScaleCommand:
		bench.ServeScale()
	case bench.SinkCommand:
		return benchSink(args[1:]), true
	case load.Command:
		return loadGenerator(), true
	}
	return 0, false
}

// loadGenerator is the load of the demo and the benchmarks: a process that ends when its standard input does.
func loadGenerator() int {
	if err := load.Serve(context.Background(), os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "coppice: "+load.Command+": "+err.Error())
		return exitFailed
	}
	return 0
}

// benchSink is the receiver of a benchmark's baseline: a process that ends when its standard input does.
func benchSink(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "coppice: "+bench.SinkCommand+": want an address and a folder")
		return exitUsage
	}
	if err := bench.ServeSink(args[0], args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "coppice: "+bench.SinkCommand+": "+err.Error())
		return exitFailed
	}
	return 0
}
