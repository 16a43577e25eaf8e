package runner

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner/runnertest"
)

func probe(t *testing.T, p Process) map[string]string {
	t.Helper()
	var out wrapperspb.StringValue
	if err := p.Conn().Invoke(t.Context(), runnertest.Probing, &emptypb.Empty{}, &out); err != nil {
		t.Fatal(err)
	}
	res := map[string]string{}
	if err := json.Unmarshal([]byte(out.GetValue()), &res); err != nil {
		t.Fatal(err)
	}
	return res
}

func TestSandbox(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("SECRET_OF_THE_DAEMON", "1")
	for name, cfg := range modes {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			declared := filepath.Join(dir, "declared")
			if err := os.WriteFile(declared, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			spec := specIn(dir)
			spec.Env = []string{runnertest.EnvQuickExit, "RUNNERTEST_DIAL=" + l.Addr().String(), "RUNNERTEST_READ=" + declared}
			spec.Sandbox = Sandbox{Network: NetworkNone, Read: []string{declared, "/not/there"}}
			spec.Limits = Limits{MemoryBytes: 1 << 30, OpenFiles: 500}
			p := start(t, newRunner(t, cfg), spec)
			res, rep := probe(t, p), p.Sandbox()
			t.Logf("report: %+v", rep)
			if strings.Contains(res["env"], "SECRET_OF_THE_DAEMON") || !strings.Contains(res["env"], "PATH=") || !strings.Contains(res["env"], "GOMEMLIMIT=") {
				t.Errorf("environment:\n%s", res["env"])
			}
			for _, may := range []string{"write-cwd", "write-run", "declared"} {
				if res[may] != "" {
					t.Errorf("%s: %s", may, res[may])
				}
			}
			gaps := map[string]bool{}
			for _, g := range rep.Missing {
				gaps[g.What] = true
			}
			if !gaps["memory"] || !gaps["declared read of /not/there"] {
				t.Errorf("gaps not reported: %+v", rep.Missing)
			}
			abi := landlockABI()
			if abi < 6 {
				t.Skipf("Landlock %d: the rest cannot be enforced, and the report says so", abi)
			}
			for _, not := range []string{"shadow", "write-tmp", "tcp", "signal-parent"} {
				if res[not] == "" {
					t.Errorf("%s was possible", not)
				}
			}
			if _, err := os.ReadFile("/etc/passwd"); err != nil {
				t.Errorf("the daemon itself was restricted: %v", err)
			}
			if err := os.WriteFile(filepath.Join(t.TempDir(), "x"), nil, 0o600); err != nil {
				t.Errorf("the daemon itself was restricted: %v", err)
			}
		})
	}
}

// A daemon is killed; its component goes on, its log lines arrive, and the next daemon adopts it.
func TestAdopt(t *testing.T) {
	dir := shortDir(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envDaemon+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id Ident
	if err := json.NewDecoder(out).Decode(&id); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() //nolint:errcheck // killed

	r := newRunner(t, Config{})
	spec := specIn(dir)
	other := id
	other.StartTicks++
	if _, err := r.Adopt(t.Context(), other, spec); !errors.Is(err, ErrGone) {
		t.Fatalf("another process was adopted: %v", err)
	}
	other = id
	other.BootID = "earlier"
	if _, err := r.Adopt(t.Context(), other, spec); !errors.Is(err, ErrGone) {
		t.Fatalf("a process of an earlier boot was adopted: %v", err)
	}
	p, err := r.Adopt(t.Context(), id, spec)
	if err != nil {
		t.Fatal(err)
	}
	if add(t, p, 3) != 3 {
		t.Fatal("not the same process")
	}
	probe(t, p) // writes to standard error, which would be SIGPIPE on a pipe
	if add(t, p, 1) != 4 {
		t.Fatal("lost its state")
	}
	if b, err := os.ReadFile(p.Output()); err != nil || !strings.Contains(string(b), "probe done") {
		t.Fatalf("log: %q %v", b, err)
	}
	if err := p.Stop(t.Context(), time.Second); err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.Known {
		t.Fatalf("exit: %+v", e)
	}
	if _, err := os.Stat(id.SocketDir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("socket folder stays: %v", err)
	}
	if _, err := r.Adopt(t.Context(), id, spec); !errors.Is(err, ErrGone) {
		t.Fatalf("a dead process was adopted: %v", err)
	}
}
