package node

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/multiformats/go-multiaddr"

	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/records"
)

// Config is everything a node is told. The binary, the tests and the simulator fill the same fields; what they differ in stands at
// the end.
type Config struct {
	Data      string   // folder of everything the node keeps; created 0700
	Name      string   // unique in the cluster; default: the host's name
	Listen    []string // multiaddrs; default /ip4/0.0.0.0/tcp/7400
	Advertise []string // multiaddrs others should dial; default: what the host has
	Zone      string
	Role      string // full | voter | worker
	MaxVoters int    // of the whole cluster: 1, 3, 5 or 7; 0: 5. The arbiter's leader goes by its own
	View      int    // how many members its records and kad-dht go by; 0: all. The member table and what is certain always go by all
	Join      string // a token; empty: a new cluster, or the one the data folder belongs to
	API       string // unix:///path or http://127.0.0.1:port; default a socket in the data folder
	HTTP      string // host:port of the gateway; empty: none
	Labels    map[string]string
	Capacity  Capacity
	Plugins   string // drop folder; default <data>/plugins
	Profile   string // lan | wan | local
	Version   string
	Log       *slog.Logger
	// Copies of a checkpoint, the owner's included, and how many of them a commit waits for at least: for benchmarks. 0: supervisor.Replicas, and a majority.
	Copies, CopyAcks int
	// Import opens the file of a component (coppice fork --export) that is taken in before the node says that it is ready; it is read three times. nil: none.
	Import func() (io.ReadCloser, error)

	// What differs in tests and simulations.
	FS        vfs.FS               // default: the disk
	BootTime  func() time.Duration // default: CLOCK_BOOTTIME
	NewRunner func() (runner.Runner, error)
	// NewHost builds the libp2p host; default: one over TCP.
	NewHost func(dht.HostParams) (host.Host, error)
	// Door opens what is a unix socket on a machine, by its path: that of commands in the data folder, and one for each component. Default: the socket. A simulation
	// opens them in memory, for a goroutine that waits for the kernel holds virtual time up.
	Door func(path string) (net.Listener, error)
	// Format is the highest format of the arbiter's entries that this node knows; default arbiter.MaxFormat, another one in tests of mixed
	// versions.
	Format uint32
	Stdout io.Writer // where the ready line goes; nil: nowhere
	// Die ends the process as kill -9 does, for coppice drill --really; nil: this node cannot be drilled.
	Die func()
}

// Capacity is what a node offers to components. Zero fields are measured.
type Capacity struct {
	CPUMillis   uint64
	MemoryBytes uint64
	DiskBytes   uint64
}

var nameRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// defaults fills what was left out. It does not touch the disk.
func (c *Config) defaults() {
	if c.Name == "" {
		host, err := os.Hostname()
		if err == nil {
			c.Name = strings.ToLower(strings.SplitN(host, ".", 2)[0])
		}
	}
	if c.Role == "" {
		c.Role = "full"
	}
	if c.Profile == "" {
		c.Profile = "lan"
	}
	if len(c.Listen) == 0 {
		c.Listen = []string{"/ip4/0.0.0.0/tcp/7400"}
		if c.Profile == "local" {
			c.Listen = localListen
		}
	}
	if c.Plugins == "" {
		c.Plugins = filepath.Join(c.Data, "plugins")
	}
	if c.FS == nil {
		c.FS = vfs.Default
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.BootTime == nil {
		c.BootTime = bootTime
	}
	if c.Format == 0 {
		c.Format = arbiter.MaxFormat
	}
}

// Validate reports every problem of the configuration at once.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Data == "" {
		bad("data: a folder is needed")
	}
	if !nameRE.MatchString(c.Name) {
		bad("name %q: want lower-case letters, digits and dashes, at most 63", c.Name)
	}
	if c.Role != "full" && c.Role != "voter" && c.Role != "worker" {
		bad("role %q: want full, voter or worker", c.Role)
	}
	if c.Profile != "lan" && c.Profile != "wan" && c.Profile != "local" {
		bad("profile %q: want lan, wan or local", c.Profile)
	}
	if c.View != 0 && c.View < records.MinView {
		bad("view %d: want %d members or more, or 0 for all", c.View, records.MinView)
	}
	for _, list := range [][]string{c.Listen, c.Advertise} {
		for _, a := range list {
			if _, err := multiaddr.NewMultiaddr(a); err != nil {
				bad("address %q: %w; try /ip4/0.0.0.0/tcp/7400", a, err)
			}
		}
	}
	if c.HTTP != "" {
		if _, _, err := net.SplitHostPort(c.HTTP); err != nil {
			bad("http %q: want host:port: %w", c.HTTP, err)
		}
	}
	if c.Zone != "" && !nameRE.MatchString(c.Zone) {
		bad("zone %q: want lower-case letters, digits and dashes", c.Zone)
	}
	for k := range c.Labels {
		if k == "" {
			bad("label: a name is missing before =")
		}
	}
	return errors.Join(errs...)
}
