package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (c *cli) docsCmd() *cobra.Command {
	var root func() *cobra.Command
	cmd := c.command(spec{
		use: "__docs FILE", short: "Write the reference of the commands",
		example: examples("coppice __docs docs/commands.md", ""),
		min:     1, max: 1,
		run: func(_ context.Context, args []string) error {
			return os.WriteFile(args[0], []byte(commandReference(root())), 0o644)
		},
	})
	cmd.Hidden = true
	root = cmd.Root
	return cmd
}

// commandReference is docs/commands.md.
func commandReference(root *cobra.Command) string {
	var b strings.Builder
	b.WriteString("# Commands\n\nWritten by `coppice __docs docs/commands.md` from the commands themselves; a test holds it current.\n\n")
	b.WriteString(root.Long + "\n\n")
	b.WriteString("Exit status: 0 done, 1 failed, 2 wrong usage. Results go to stdout, everything else to stderr.\n\n")
	b.WriteString("Flags of every command:\n\n```\n" + root.PersistentFlags().FlagUsages() + "```\n\n")
	for _, g := range root.Groups() {
		b.WriteString("- " + strings.TrimSuffix(g.Title, ":") + ":")
		for _, cmd := range root.Commands() {
			if cmd.GroupID == g.ID {
				fmt.Fprintf(&b, " [%s](#%s)", cmd.Name(), anchor(cmd))
			}
		}
		b.WriteString("\n")
	}
	for _, g := range root.Groups() {
		for _, cmd := range root.Commands() {
			if cmd.GroupID == g.ID {
				reference(&b, cmd)
			}
		}
	}
	return b.String()
}

func anchor(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

func reference(b *strings.Builder, cmd *cobra.Command) {
	if cmd.Hidden {
		return
	}
	fmt.Fprintf(b, "\n## %s\n\n%s.\n\n", cmd.CommandPath(), cmd.Short)
	if cmd.Long != "" {
		b.WriteString(cmd.Long + "\n\n")
	}
	if !cmd.HasSubCommands() {
		b.WriteString("```\n" + cmd.UseLine() + "\n```\n\n")
	}
	b.WriteString("```sh\n" + unindent(cmd.Example) + "\n```\n")
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.SortFlags = false
	cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name != "help" { // every command has it, once it was run
			flags.AddFlag(f)
		}
	})
	if usage := flags.FlagUsages(); usage != "" {
		b.WriteString("\n```\n" + usage + "```\n")
	}
	for _, s := range cmd.Commands() {
		reference(b, s)
	}
}

func unindent(s string) string {
	return strings.TrimPrefix(strings.ReplaceAll(s, "\n  ", "\n"), "  ")
}
