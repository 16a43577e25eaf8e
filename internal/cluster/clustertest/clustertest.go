// Package clustertest is what tests of whole processes share: it builds the binary and the components once, and starts clusters that end with the
// test. Tests of any package may use it; nothing else does.
//
// What it builds lies where make puts it, with make's flags: after make nothing is built again.
//
// # Goroutines
//
// None of its own; see internal/cluster.
//
// # Limits
//
// Linux only: elsewhere tests that use it are skipped.
package clustertest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster"
)

var (
	built   = sync.OnceValues(build)
	harmful = sync.OnceValues(func() (string, error) { return buildBeside("harm") })
	planted = sync.OnceValues(func() (string, error) { return buildBeside("planted") })
)

// Binary is the path of coppice; its components lie beside it, in components/ and demo/.
func Binary(t testing.TB) string {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("clusters of processes need Linux")
	}
	bin, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

type program struct{ out, flags, pkg, tags string }

// build builds what is not up to date.
func build() (string, error) {
	bin, err := compile([]program{
		{"coppice", "", "./cmd/coppice", ""},
		{"components/counter", "1.0.0", "./plugins/counter", ""},
		{"components/kv", "1.0.0", "./plugins/kv", ""},
		{"components/bank", "1.0.0", "./plugins/bank", ""},
		{"components/shop", "1.0.0", "./plugins/shop", ""},
		{"components/shopweb", "1.0.0", "./plugins/shopweb", ""},
		{"demo/kv-1.1.0", "1.1.0", "./plugins/kv", ""},
		{"demo/bank-1.1.0", "1.1.0", "./plugins/bank", ""},
		{"demo/shop-1.1.0", "1.1.0", "./plugins/shop", ""},
		{"demo/shop-1.2.0", "1.2.0 -X main.broken=never-ready", "./plugins/shop", ""},
	})
	return filepath.Join(bin, "coppice"), err
}

// buildBeside builds the rest, and the binary with tags of its own: "harm", which obeys internal/harm, or "planted", which also has the bugs of
// internal/planted to be switched on.
func buildBeside(name string) (string, error) {
	if _, err := built(); err != nil {
		return "", err
	}
	tags := "harm"
	if name != tags {
		tags += "," + name
	}
	bin, err := compile([]program{{name + "/coppice", "", "./cmd/coppice", tags}})
	return filepath.Join(bin, name, "coppice"), err
}

// Build builds a program of this repository into bin/<name>.
func Build(t testing.TB, pkg, name string) string {
	t.Helper()
	Binary(t)
	bin, err := compile([]program{{name, "", "./" + pkg, ""}})
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(bin, name)
}

// compile builds into bin, which it returns. Test processes of several packages take turns.
func compile(programs []program) (string, error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	bin := filepath.Join(root, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", fmt.Errorf("build: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(bin, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", fmt.Errorf("build: %w", err)
	}
	defer lock.Close() // gives the lock back
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("build: wait for another test: %w", err)
	}
	for _, p := range programs {
		flags := "-s -w"
		if p.flags != "" {
			flags += " -X main.version=" + p.flags
		}
		cmd := exec.Command("go", "build", "-trimpath", "-tags", p.tags, "-ldflags", flags, "-o", filepath.Join(bin, p.out), p.pkg)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s: %w\n%s", p.pkg, err, out)
		}
	}
	return bin, nil
}

func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if mod == "" || mod == os.DevNull {
		return "", fmt.Errorf("find the module: no go.mod above the test")
	}
	return filepath.Dir(mod), nil
}

// NotPermitted ends a test that needs what this machine does not permit: network namespaces, mounts. It is skipped with the reason; in CI it fails, so
// that nobody takes for tested what never ran, unless COPPICE_NO_NETNS says that this machine is known for it.
func NotPermitted(t testing.TB, why string) {
	t.Helper()
	mustBePermitted(t, why)
	t.Skip("SKIPPED: " + why)
}

// Without is NotPermitted for a part of a test: the rest goes on.
func Without(t testing.TB, why string) {
	t.Helper()
	mustBePermitted(t, why)
	t.Log("SKIPPED in part: " + why)
}

func mustBePermitted(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") != "" && os.Getenv("COPPICE_NO_NETNS") == "" {
		t.Fatalf("%s, and in CI it must be possible; COPPICE_NO_NETNS=1 lets such tests be skipped all the same", why)
	}
}

// Cuttable ends a test whose cluster asked for network namespaces and is on loopback, where no link can be cut.
func Cuttable(t testing.TB, c *cluster.Cluster) {
	t.Helper()
	if c.Network.Kind() == cluster.Loopback {
		NotPermitted(t, "links can be cut in network namespaces only, and those are not permitted here")
	}
}

// Config says what cluster a test wants.
type Config struct {
	Nodes int
	Args  func(i int) []string // of node i; nil: none
	// Harm asks for nodes that obey cluster.Node.Harm.
	Harm bool
	// Planted asks for nodes that have the planted bugs (internal/planted), and obey orders, too; Bug is the one that is switched on, "" none.
	Planted bool
	Bug     string
	// Namespaces asks for network namespaces; where they are not permitted, and otherwise, it is loopback.
	Namespaces bool
}

// New prepares a cluster in a folder of its own. It ends with the test; when that has failed the logs are told where they lie.
func New(t testing.TB, cfg Config) *cluster.Cluster {
	t.Helper()
	bin := Binary(t)
	var env []string
	for _, beside := range []struct {
		wanted bool
		build  func() (string, error)
	}{{cfg.Harm, harmful}, {cfg.Planted, planted}} {
		if !beside.wanted {
			continue
		}
		var err error
		if bin, err = beside.build(); err != nil {
			t.Fatal(err)
		}
	}
	if cfg.Bug != "" {
		env = append(env, "COPPICE_PLANTED="+cfg.Bug)
	}
	dir, err := os.MkdirTemp("", "cop") // short: there are sockets in it
	if err != nil {
		t.Fatal(err)
	}
	net, err := cluster.NewLoopback(cfg.Nodes)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Namespaces {
		if spaces, err := cluster.NewNamespaces(cfg.Nodes); err == nil {
			net = spaces
		} else {
			t.Logf("on loopback: %v", err)
		}
	}
	c, err := cluster.New(cluster.Config{Binary: bin, Dir: dir, Network: net, Nodes: cfg.Nodes, Args: cfg.Args, Harm: cfg.Harm || cfg.Planted, Env: env})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("end the cluster: %v", err)
		}
		if t.Failed() {
			t.Logf("logs are kept in %s", dir)
			return
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return c
}

// Up is New, and starts the nodes.
func Up(t testing.TB, cfg Config) *cluster.Cluster {
	t.Helper()
	c := New(t, cfg)
	if err := c.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c
}
