package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/coppice-project/coppice/components"
)

// upConfig is what `up` was told by flags, environment and file, checked for form. Empty fields take the node's defaults.
type upConfig struct {
	Data, Name        string
	Listen, Advertise []string
	Zone, Role        string
	Join              string // the token itself
	Import            string // file of a component; empty: none
	API, HTTP         string
	Labels            map[string]string
	CPUMillis         uint64 // capacity; 0: measured
	MemoryBytes       uint64
	DiskBytes         uint64
	Plugins           string
	Voters            int
	View              int
	Copies, CopyAcks  int // of checkpoints, for benchmarks; 0: as always
	Profile           string
	Version           string
	LogLevel          slog.Level
	LogJSON           bool
}

// upFlags are the flags of `up` as given.
type upFlags struct {
	file                                       string
	data, name, zone, role, join, api, http    string
	imported                                   string
	listen, advertise, labels                  []string
	capacity, plugins, profile, level, logForm string
	allowExec                                  bool
	voters, view, copies, acks                 int
}

func (f *upFlags) register(fs *pflag.FlagSet) {
	fs.SortFlags = false
	fs.StringVar(&f.file, "config", "", "a YAML file with these flags as keys")
	fs.StringVar(&f.data, "data", "", "folder of everything the node keeps (default ~/.local/share/coppice/<name>)")
	fs.StringVar(&f.name, "name", "", "name, unique in the cluster (default: the host's)")
	fs.StringSliceVar(&f.listen, "listen", nil, "multiaddr to listen on, repeatable (default: all addresses, TCP 7400)")
	fs.StringSliceVar(&f.advertise, "advertise", nil, "multiaddr that others dial, repeatable (default: what peers observe)")
	fs.StringVar(&f.zone, "zone", "", "zone of failure this machine is in")
	fs.StringVar(&f.role, "role", "full", "full, voter (no components) or worker (no votes)")
	fs.IntVar(&f.voters, "voters", 5, "how many nodes vote at most: 1, 3, 5 or 7; the same at all nodes")
	fs.IntVar(&f.view, "view", 0, "how many members records and lookups go by, 16 or more; for clusters of hundreds (default: all)")
	fs.IntVar(&f.copies, "copies", 0, "for benchmarks: copies of a checkpoint, the owner's included")
	fs.IntVar(&f.acks, "copy-acks", 0, "for benchmarks: how many of them a commit waits for at least")
	for _, hidden := range []string{"copies", "copy-acks"} {
		fs.Lookup(hidden).Hidden = true
	}
	fs.StringVar(&f.join, "join", "", "token of the cluster to join, @FILE or - for stdin")
	fs.StringVar(&f.imported, "import", "", "file that coppice fork --export wrote: its component is made one of this cluster, once")
	fs.StringVar(&f.api, "api", "", "address of the control API (default: a unix socket in the data folder)")
	fs.StringVar(&f.http, "http", "", "host:port of the gateway and the dashboard (default: none)")
	fs.StringSliceVar(&f.labels, "label", nil, "k=v, repeatable")
	fs.StringVar(&f.capacity, "capacity", "", "what it offers: cpu=4,memory=8GiB,disk=50GiB (default: what it has)")
	fs.StringVar(&f.plugins, "plugins", "", "drop folder for component binaries (default <data>/plugins)")
	fs.BoolVar(&f.allowExec, "allow-exec", false, "refused: this version runs no commands for operators")
	fs.StringVar(&f.profile, "profile", "lan", "timeouts: lan, wan, or local (several nodes on one machine: free ports too)")
	fs.StringVar(&f.level, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&f.logForm, "log-format", "text", "text or json")
}

// config puts flags over environment over file and checks what came out.
func (f *upFlags) config(c *cli, fs *pflag.FlagSet) (upConfig, error) {
	if err := layer(fs, c.getenv); err != nil {
		return upConfig{}, err
	}
	cfg := upConfig{
		Data: f.data, Name: f.name, Import: f.imported, Listen: f.listen, Advertise: f.advertise, Zone: f.zone, Role: f.role, API: f.api, HTTP: f.http,
		Plugins: f.plugins, Profile: f.profile, LogJSON: f.logForm == "json", Version: version(),
	}
	if cfg.Name == "" {
		cfg.Name = hostName()
	}
	for _, x := range []struct {
		flag, value string
		want        []string
	}{
		{"role", f.role, []string{"full", "voter", "worker"}},
		{"profile", f.profile, []string{"lan", "wan", "local"}},
		{"log-format", f.logForm, []string{"text", "json"}},
	} {
		if err := oneOf(x.flag, x.value, x.want); err != nil {
			return cfg, err
		}
	}
	if f.allowExec { // better than a node whose owner believes that he has opened it
		return cfg, usagef("--allow-exec: this version has no coppice exec, so no node runs commands for operators; leave it out")
	}
	if !slices.Contains([]int{1, 3, 5, 7}, f.voters) {
		return cfg, usagef("--voters %d: want 1, 3, 5 or 7", f.voters)
	}
	if f.copies < 0 || f.acks < 0 || f.copies > 16 {
		return cfg, usagef("--copies %d, --copy-acks %d: want 1 to 16 copies", f.copies, f.acks)
	}
	cfg.Voters, cfg.View, cfg.Copies, cfg.CopyAcks = f.voters, f.view, f.copies, f.acks
	if err := cfg.LogLevel.UnmarshalText([]byte(f.level)); err != nil {
		return cfg, usagef("--log-level %q: want debug, info, warn or error", f.level)
	}
	var err error
	if cfg.Labels, err = labels(f.labels); err != nil {
		return cfg, err
	}
	if err = cfg.setCapacity(f.capacity); err != nil {
		return cfg, err
	}
	if cfg.Join, err = c.joinToken(f.join); err != nil {
		return cfg, err
	}
	cfg.Data, err = dataDir(f.data, cfg.Name, c.getenv)
	return cfg, err
}

func oneOf(flag, value string, want []string) error {
	for _, w := range want {
		if value == w {
			return nil
		}
	}
	return usagef("--%s %q: want %s", flag, value, strings.Join(want, ", "))
}

// dataDir is the data folder, absolute: a command that finds the node by it may run elsewhere.
func dataDir(given, name string, getenv func(string) string) (string, error) {
	dir := given
	if dir == "" {
		base := getenv("XDG_DATA_HOME")
		if !filepath.IsAbs(base) {
			home, err := os.UserHomeDir()
			if err != nil {
				return "", usagef("--data: there is no home directory to keep it in: %v", err)
			}
			base = filepath.Join(home, ".local", "share")
		}
		dir = filepath.Join(base, "coppice", name)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", usagef("--data %q: %v", dir, err)
	}
	return abs, nil
}

// joinToken reads the token that --join names.
func (c *cli) joinToken(arg string) (string, error) {
	path, isFile := strings.CutPrefix(arg, "@")
	switch {
	case arg == "-":
		path = "-"
	case !isFile:
		return strings.TrimSpace(arg), nil
	}
	raw, err := c.readInput(path, 64<<10)
	if err != nil {
		return "", &failure{what: "read the join token", why: err.Error(), cause: err}
	}
	tok := strings.TrimSpace(string(raw))
	if tok == "" {
		return "", &failure{what: "read the join token", why: arg + " is empty", try: "coppice token"}
	}
	return tok, nil
}

func labels(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, l := range list {
		k, v, ok := strings.Cut(l, "=")
		if k = strings.TrimSpace(k); !ok || k == "" {
			return nil, usagef("--label %q: want k=v", l)
		}
		out[k] = strings.TrimSpace(v)
	}
	return out, nil
}

// setCapacity reads cpu=4,memory=8GiB,disk=50GiB.
func (cfg *upConfig) setCapacity(s string) error {
	if s == "" {
		return nil
	}
	for part := range strings.SplitSeq(s, ",") {
		k, v, _ := strings.Cut(part, "=")
		var err error
		switch strings.TrimSpace(k) {
		case "cpu":
			var cores float64
			if cores, err = strconv.ParseFloat(v, 64); err == nil {
				cfg.CPUMillis = components.MilliCPU(cores)
			}
			if err != nil || cfg.CPUMillis == 0 {
				return usagef("--capacity: cpu %q: want a number of cores above zero", v)
			}
		case "memory":
			cfg.MemoryBytes, err = components.ParseSize(v)
		case "disk":
			cfg.DiskBytes, err = components.ParseSize(v)
		default:
			return usagef("--capacity %q: want cpu=4,memory=8GiB,disk=50GiB", part)
		}
		if err != nil {
			return usagef("--capacity: %s: %v", k, err)
		}
	}
	return nil
}
