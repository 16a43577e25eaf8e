package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"

	"github.com/coppice-project/coppice/internal/scaffold"
)

func (c *cli) newCmd() *cobra.Command {
	var lang, sdk string
	cmd := c.command(spec{
		group: groupApp, use: "new NAME [--lang go|python|exec]", short: "Make the folder of a new component, which builds, passes its tests and can be deployed",
		long: "Make a folder NAME with a component that has state: its source, a test, a manifest and a Makefile (make, make test, make deploy). With\n" +
			"--lang exec it is a manifest that runs an ordinary program. A component in Go is built with the version of Coppice's module that this program is\n" +
			"of; a program that was built from a working copy needs --sdk, that copy's folder.",
		example: examples(
			"coppice new guestbook", "",
			"coppice new tally --lang python", "",
			"coppice new files --lang exec", "an ordinary program",
			"coppice new guestbook --sdk ~/src/coppice", "with a working copy"),
		min: 1, max: 1,
		run: func(_ context.Context, args []string) error {
			cfg := scaffold.Config{Name: args[0], Lang: lang, Dir: args[0]}
			if lang == "go" {
				if err := requireUs(&cfg, sdk); err != nil {
					return err
				}
			} else if sdk != "" {
				return usagef("--sdk is for --lang go")
			}
			files, err := scaffold.New(cfg)
			if err != nil {
				return &failure{what: "new " + args[0], why: err.Error(), cause: err}
			}
			return c.text(func(w io.Writer) {
				for _, f := range files {
					fmt.Fprintln(w, filepath.Join(args[0], f))
				}
				fmt.Fprintf(w, "try: cd %s && cat README.md\n", args[0])
			})
		},
	})
	cmd.Flags().StringVar(&lang, "lang", "go", "go, python, or exec for an ordinary program")
	cmd.Flags().StringVar(&sdk, "sdk", "", "folder of Coppice's sources to build a component in Go with, instead of a released version")
	return cmd
}

const ourModule = "github.com/coppice-project/coppice"

// requireUs says which version of our module a component in Go requires: that of this program, or the sources in a folder.
func requireUs(cfg *scaffold.Config, sdk string) error {
	if sdk == "" {
		info, ok := debug.ReadBuildInfo()
		if !ok || info.Main.Path != ourModule || info.Main.Version == "" || strings.HasPrefix(info.Main.Version, "(") || strings.Contains(info.Main.Version, "+") || module.IsPseudoVersion(info.Main.Version) {
			return usagef("this coppice was built from a working copy, not from a released version: name that copy's folder with --sdk")
		}
		cfg.Require = info.Main.Version
		return nil
	}
	dir, err := filepath.Abs(sdk)
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if err != nil || modfile.ModulePath(raw) != ourModule {
		return usagef("--sdk %s: want the folder of Coppice's sources, where the go.mod of %s is", sdk, ourModule)
	}
	cfg.SDK, cfg.Require = dir, "v0.0.0"
	if cfg.Sum, err = os.ReadFile(filepath.Join(dir, "go.sum")); err != nil {
		return fmt.Errorf("read the checksums of Coppice's modules: %w", err)
	}
	return nil
}
