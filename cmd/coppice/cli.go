package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// The time that a command may take when --timeout does not say otherwise.
const (
	readTimeout   = 10 * time.Second // looks only
	actTimeout    = time.Minute      // changes something
	transferSlack = 5 * time.Second  // what a client waits beyond the time it gave the server, so that the server's reason arrives
)

// cli is one run of the command line: where it reads and writes, and what the global flags say.
type cli struct {
	in             io.Reader
	out, err       io.Writer
	getenv         func(string) string
	now            func() time.Time
	outTTY, errTTY bool

	api, token, output string
	timeout            time.Duration
}

func newCLI() *cli {
	return &cli{
		in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv, now: time.Now,
		outTTY: isTerminal(os.Stdout), errTTY: isTerminal(os.Stderr),
	}
}

// run executes a command line and returns the exit status.
func (c *cli) run(ctx context.Context, args []string) int {
	root := c.root()
	root.SetArgs(args)
	root.SetIn(c.in)
	root.SetOut(c.out)
	root.SetErr(c.err)
	cmd, err := root.ExecuteContextC(ctx)
	return c.end(cmd, err)
}

// Groups of the help page.
const (
	groupNode = "node"
	groupApp  = "app"
	groupOne  = "component"
	groupKnow = "know"
	groupTool = "tool"
)

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "coppice",
		Short: "Components whose state survives the death of any machine",
		Long: "coppice runs components on a cluster of equal nodes. Their state survives the death of any machine; there is no server to\n" +
			"install and no database to keep. This one binary is the node, the client and the demo.",
		Example: examples(
			"coppice demo", "a whole cluster on this machine, with a node killed and a version swapped",
			"coppice up", "a node of your own; it prints how others join it",
			"coppice deploy app.yaml --wait", "run an application"),
		Version:       version(),
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if c.output != "table" && c.output != "json" {
				return &usageError{cmd: cmd, why: fmt.Sprintf("--output %q: want table or json", c.output)}
			}
			return nil
		},
	}
	root.SetVersionTemplate("coppice {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{cmd: cmd, why: err.Error()} })
	root.CompletionOptions.DisableDefaultCmd = true
	f := root.PersistentFlags()
	f.StringVar(&c.api, "api", "", "the node to talk to: its name here, unix:///path, https://host:port, http://127.0.0.1:port\n(default $COPPICE_API, else the only node of this user on this machine)")
	f.StringVar(&c.token, "token", "", "what opens its control API, or @FILE (default $COPPICE_TOKEN, else the token file of a node on this machine)")
	f.StringVarP(&c.output, "output", "o", "table", "table or json")
	f.DurationVar(&c.timeout, "timeout", 0, "how long the command may take (default 10s to look, 1m to change something)")
	c.completeFlag(root, "output", func(context.Context) []string { return []string{"table", "json"} })
	c.completeFlag(root, "api", localNodes)
	for _, g := range [][2]string{
		{groupNode, "A node and its cluster:"},
		{groupApp, "Artifacts and applications:"},
		{groupOne, "One component:"},
		{groupKnow, "What is known:"},
		{groupTool, "Tools:"},
	} {
		root.AddGroup(&cobra.Group{ID: g[0], Title: g[1]})
	}
	c.addCommands(root)
	return root
}

func (c *cli) addCommands(root *cobra.Command) {
	root.AddCommand(
		c.upCmd(), c.tokenCmd(), c.nodesCmd(), c.statusCmd(), c.doctorCmd(), c.drainCmd(), c.leaveCmd(), c.downCmd(), c.revokeCmd(), c.readmitCmd(), c.drillCmd(), c.recoverCmd(),
		c.backupCmd(), c.restoreClusterCmd(),
		c.newCmd(), c.registryCmd(), c.planCmd(), c.deployCmd(), c.removeCmd(), c.appsCmd(), c.psCmd(),
		c.inspectCmd(), c.attrCmd(), c.bindCmd(), c.unbindCmd(), c.startCmd(), c.stopCmd(), c.freezeCmd(), c.thawCmd(),
		c.swapCmd(), c.undoCmd(), c.moveCmd(), c.unpinCmd(), c.checkpointCmd(), c.checkpointsCmd(), c.restoreCmd(), c.forkCmd(), c.callCmd(), c.forwardCmd(), c.whyCmd(),
		c.logsCmd(), c.eventsCmd(), c.queryCmd(), c.dhtCmd(),
		c.demoCmd(), c.benchCmd(), c.conformCmd(), c.completionCmd(), c.docsCmd(),
	)
	root.SetHelpCommand(c.helpCmd())
	root.SetHelpCommandGroupID(groupTool)
}

// spec describes a command.
type spec struct {
	group   string // "" for a sub-command
	use     string // "swap COMPONENT@VERSION"
	short   string
	long    string
	example string
	min     int                                               // number of arguments
	max     int                                               // -1: any
	timeout time.Duration                                     // 0: as long as it takes
	bounds  bool                                              // it applies --timeout itself, to a part of its work
	args    func(ctx context.Context, args []string) []string // completions of the next argument
	run     func(ctx context.Context, args []string) error
}

// command makes a cobra command: it checks the number of arguments, bounds the time, and lets completion ask the cluster.
func (c *cli) command(s spec) *cobra.Command {
	cmd := &cobra.Command{
		Use: s.use, Short: s.short, Long: s.long, Example: s.example, GroupID: s.group,
		DisableFlagsInUseLine: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < s.min || s.max >= 0 && len(args) > s.max {
				return &usageError{cmd: cmd, why: "want " + wanted(s.use) + ", got " + counted(len(args))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := cmd.Context(), context.CancelFunc(func() {})
			if !s.bounds {
				ctx, cancel = c.bounded(ctx, s.timeout)
			}
			defer cancel()
			if err := s.run(ctx, args); err != nil {
				return c.failed(cmd, args, err)
			}
			return nil
		},
	}
	if s.args != nil {
		cmd.ValidArgsFunction = c.completer(s.args)
	}
	return cmd
}

// bounded applies --timeout, else the command's own.
func (c *cli) bounded(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if c.timeout > 0 {
		d = c.timeout + transferSlack
	}
	if d == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

// waitMS is the time that the server may take, for a request's timeout_ms.
func (c *cli) waitMS(d time.Duration) uint64 {
	if c.timeout > 0 {
		d = c.timeout
	}
	return uint64(d.Milliseconds())
}

// group makes a command that only has sub-commands.
func (c *cli) groupCommand(group, name, short, example string, subs ...*cobra.Command) *cobra.Command {
	var names []string
	for _, s := range subs {
		names = append(names, s.Name())
	}
	cmd := &cobra.Command{
		Use: name, Short: short, Example: example, GroupID: group,
		RunE: func(cmd *cobra.Command, args []string) error {
			why := "want one of " + strings.Join(names, ", ")
			if len(args) > 0 {
				why = fmt.Sprintf("there is no %q: %s", args[0], why)
			}
			return &usageError{cmd: cmd, why: why}
		},
	}
	cmd.AddCommand(subs...)
	return cmd
}

// examples lays out pairs of a command and what it does.
func examples(pairs ...string) string {
	width := 0
	for i := 0; i < len(pairs); i += 2 {
		width = max(width, len([]rune(pairs[i])))
	}
	var lines []string
	for i := 0; i+1 < len(pairs); i += 2 {
		line := "  " + pairs[i]
		if pairs[i+1] != "" {
			line += strings.Repeat(" ", width-len([]rune(pairs[i]))) + "   # " + pairs[i+1]
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func wanted(use string) string {
	_, args, ok := strings.Cut(use, " ")
	if !ok {
		return "no argument"
	}
	return args
}

func counted(n int) string {
	switch n {
	case 0:
		return "nothing"
	case 1:
		return "1 argument"
	}
	return fmt.Sprintf("%d arguments", n)
}

// version is the module's version or the commit this binary was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" || v == "(devel)" {
		v = "devel"
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				v += "-" + s.Value[:12]
			}
		}
	}
	return v
}
