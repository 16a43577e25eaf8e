package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api"
)

// readyInfo is what a node tells when it serves.
type readyInfo struct {
	Name    string
	ID      string // peer id
	Cluster string
	API     string // as --api takes it
	HTTP    string // http://host:port of the gateway; empty: none
	Token   string // a join token, when this node has just started a new cluster
}

func (c *cli) upCmd() *cobra.Command {
	var f upFlags
	cmd := c.command(spec{
		group: groupNode, use: "up [flags]", short: "Run a node in the foreground",
		long: "Run a node in the foreground until it is interrupted. With no --join and an empty data directory it starts a new cluster and prints\n" +
			"how others join it; a node that was a member is one again. Once ready it prints one line:\n\n" +
			"  ready node=<name> id=<peer id> cluster=<id> api=<addr> http=<addr>\n\n" +
			"Each flag is also a key of the --config file (YAML) and $COPPICE_<NAME>, for example $COPPICE_DATA. A flag wins over the\n" +
			"environment, the environment over the file.\n\n" +
			"SIGINT or SIGTERM stops it: its components start again on other nodes. A second signal ends it at once.",
		example: examples(
			"coppice up", "a new cluster",
			"coppice up --join TOKEN", "another machine joins it; coppice token prints one",
			"coppice up --profile local --name n2 --join TOKEN", "another node on the same machine",
			"coppice up --config /etc/coppice.yaml", "",
			"coppice up --profile local --name lab --import store.coppice", "a lone node with a component of another cluster (coppice fork --export)",
			"coppice up --http 127.0.0.1:8080 --label region=eu --capacity cpu=4,memory=8GiB", "a dashboard, a label, a limit"),
		run: nil,
	})
	f.register(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := f.config(c, cmd.Flags())
		if err == nil {
			err = c.up(cmd.Context(), cfg)
		}
		if err != nil {
			return c.failed(cmd, nil, err)
		}
		return nil
	}
	c.completeFlag(cmd, "role", func(context.Context) []string { return []string{"full", "voter", "worker"} })
	c.completeFlag(cmd, "profile", func(context.Context) []string { return []string{"lan", "wan", "local"} })
	c.completeFlag(cmd, "log-level", func(context.Context) []string { return []string{"debug", "info", "warn", "error"} })
	c.completeFlag(cmd, "log-format", func(context.Context) []string { return []string{"text", "json"} })
	return cmd
}

// up runs the node, and announces it to commands of this machine while it is ready.
func (c *cli) up(ctx context.Context, cfg upConfig) error {
	var unregister func() error
	ready := func(r readyInfo) error {
		var err error
		if unregister != nil { // it goes on with a new identity
			if err = unregister(); err != nil {
				return err
			}
		}
		unregister, err = api.Register(api.Entry{Name: r.Name, API: r.API, HTTP: r.HTTP, Data: cfg.Data})
		if err != nil {
			return err
		}
		return c.ready(r, cfg)
	}
	err := runUp(ctx, cfg, cfg.logger(c), ready)
	if unregister != nil {
		err = errors.Join(err, unregister())
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil // it was told to stop, and did
	}
	return err
}

func (c *cli) ready(r readyInfo, cfg upConfig) error {
	if c.json() {
		line := []byte(`{"ready":true`)
		for _, kv := range [][2]string{{"node", r.Name}, {"id", r.ID}, {"cluster", r.Cluster}, {"api", r.API}, {"http", r.HTTP}, {"join", joinLine(r, cfg)}} {
			line = append(api.AppendString(append(line, ','), kv[0]), ':')
			line = api.AppendString(line, kv[1])
		}
		return c.write(append(line, '}', '\n'))
	}
	http := r.HTTP
	if http == "" {
		http = "none"
	}
	out := fmt.Sprintf("ready node=%s id=%s cluster=%s api=%s http=%s\n", r.Name, r.ID, r.Cluster, r.API, http)
	if join := joinLine(r, cfg); join != "" {
		out += "join it from another " + cfg.place() + " with: " + join + "\n"
	}
	return c.write([]byte(out))
}

// joinLine is what to type to join the cluster that this node has just started.
func joinLine(r readyInfo, cfg upConfig) string {
	if r.Token == "" {
		return ""
	}
	var extra string
	if cfg.Profile != "lan" {
		extra = "--profile " + cfg.Profile + " "
	}
	if cfg.Profile == "local" {
		extra += "--name " + nextName(r.Name) + " "
	}
	return "coppice up " + extra + "--join " + r.Token
}

// nextName is a name for another node: n1, n2.
func nextName(name string) string {
	base := strings.TrimRight(name, "0123456789")
	if n, err := strconv.Atoi(name[len(base):]); err == nil {
		return base + strconv.Itoa(n+1)
	}
	return name + "-2"
}

func (cfg upConfig) place() string {
	if cfg.Profile == "local" {
		return "terminal"
	}
	return "machine"
}

func (cfg upConfig) logger(c *cli) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.LogLevel}
	if cfg.LogJSON {
		return slog.New(slog.NewJSONHandler(c.err, opts))
	}
	return slog.New(slog.NewTextHandler(c.err, opts))
}

// hostName is the default of --name: the machine's name up to the first dot, in the form of a name.
func hostName() string {
	host, err := os.Hostname()
	if err != nil {
		return "node"
	}
	host, _, _ = strings.Cut(strings.ToLower(host), ".")
	host = strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, host), "-")
	if host == "" {
		return "node"
	}
	return host[:min(len(host), 63)]
}
