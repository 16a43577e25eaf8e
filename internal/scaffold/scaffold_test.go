package scaffold_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	"github.com/coppice-project/coppice/internal/scaffold"
)

func made(t *testing.T, cfg scaffold.Config) string {
	t.Helper()
	cfg.Dir = filepath.Join(t.TempDir(), cfg.Name)
	files, err := scaffold.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(filepath.Join(cfg.Dir, f))
		if err != nil || len(raw) == 0 || strings.Contains(string(raw), "{{") || strings.Contains(string(raw), "<no value>") {
			t.Errorf("%s: %v\n%s", f, err, raw)
		}
	}
	if i := slices.Index(files, "app.yaml"); i >= 0 {
		raw, err := os.ReadFile(filepath.Join(cfg.Dir, "app.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		list, err := components.ParseManifests("app.yaml", raw)
		if err != nil || len(list) != 1 || list[0].GetApplication() != cfg.Name {
			t.Errorf("its manifest: %v %v", list, err)
		}
	} else {
		t.Error("there is no app.yaml")
	}
	return cfg.Dir
}

// passes runs `make test` in a folder, as its README says.
func passes(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "make", "test")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(clustertest.Binary(t))+string(os.PathListSeparator)+os.Getenv("PATH"), "MAKEFLAGS=", "GOFLAGS=")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), ", 0 failed,") {
		t.Fatalf("make test: %v\n%s", err, out)
	}
}

// What `coppice new` makes builds, passes its tests and every rule of the contract.
func TestANewComponentPassesItsTests(t *testing.T) {
	root, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	sum, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	t.Run("go", func(t *testing.T) {
		passes(t, made(t, scaffold.Config{Name: "guest-book", Lang: "go", SDK: root, Require: "v0.0.0", Sum: sum}))
	})
	t.Run("python", func(t *testing.T) {
		for _, tool := range []string{"protoc", "grpc_python_plugin"} {
			if _, err := exec.LookPath(tool); err != nil {
				t.Skipf("SKIPPED: %v (Debian: apt-get install protobuf-compiler protobuf-compiler-grpc)", err)
			}
		}
		clustertest.NeedPython(t)
		passes(t, made(t, scaffold.Config{Name: "tally-board", Lang: "python"}))
	})
	t.Run("exec", func(t *testing.T) { made(t, scaffold.Config{Name: "files", Lang: "exec"}) })
}

// A name that cannot be one, a language that there is not, and a folder that has something in it are refused, and nothing is made.
func TestWhatIsRefused(t *testing.T) {
	dir := t.TempDir()
	full := filepath.Join(dir, "full")
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	for says, cfg := range map[string]scaffold.Config{
		"expected 1 to 63":       {Name: "Guest", Lang: "go", Dir: filepath.Join(dir, "a")},
		"how instances are":      {Name: "guest-1", Lang: "go", Dir: filepath.Join(dir, "b")},
		"there are go, python":   {Name: "guest", Lang: "rust", Dir: filepath.Join(dir, "c")},
		"would hide another":     {Name: "state", Lang: "python", Dir: filepath.Join(dir, "d")},
		"is there, and not empt": {Name: "guest", Lang: "exec", Dir: full},
	} {
		if _, err := scaffold.New(cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v, want %q", cfg, err, says)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("what is left: %v %v", left, err)
	}
}
