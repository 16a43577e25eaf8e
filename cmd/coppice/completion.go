package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (c *cli) completionCmd() *cobra.Command {
	var root func() *cobra.Command
	cmd := c.command(spec{
		group: groupTool, use: "completion bash|zsh|fish", short: "Print a completion script for a shell",
		long: "Print a completion script. It completes commands and flags, and asks the cluster for names of nodes, components and methods.",
		example: examples(
			"source <(coppice completion bash)", "this shell",
			"coppice completion bash > /etc/bash_completion.d/coppice", "every shell",
			"coppice completion zsh > \"${fpath[1]}/_coppice\"", "",
			"coppice completion fish > ~/.config/fish/completions/coppice.fish", ""),
		min: 1, max: 1,
		args: func(_ context.Context, args []string) []string {
			if len(args) > 0 {
				return nil
			}
			return []string{"bash", "zsh", "fish"}
		},
		run: func(_ context.Context, args []string) error {
			switch args[0] {
			case "bash":
				return root().GenBashCompletionV2(c.out, true)
			case "zsh":
				return root().GenZshCompletion(c.out)
			case "fish":
				return root().GenFishCompletion(c.out, true)
			}
			return usagef("%q: want bash, zsh or fish", args[0])
		},
	})
	root = cmd.Root
	return cmd
}
