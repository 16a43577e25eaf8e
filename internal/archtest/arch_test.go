package archtest

import (
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/coppice-project/coppice/"

// allowed is who may import whom (docs/architecture.md): a package may import those whose path starts with one of the entries.
// Order matters: the first matching row holds.
var allowed = []struct {
	pkg     string
	imports []string
}{
	{"plugins/contract", []string{"plugins/contract"}},
	{"plugins/sdk", []string{"plugins/contract", "plugins/sdk"}},
	{"plugins/placement", []string{"plugins", "placement/solver", "components"}},
	{"plugins", []string{"plugins"}},
	{"dht", []string{"dht"}},
	{"components/runner", []string{"components/runner", "components/v1", "components", "plugins/contract"}},
	{"components/supervisor", []string{"components", "membrane", "registry", "dht", "plugins/contract"}},
	{"components", []string{"components/v1", "plugins/contract"}},
	{"membrane", []string{"membrane", "components", "plugins/contract"}},
	{"registry", []string{"registry", "dht", "components", "plugins/contract"}},
	{"placement/solver", []string{"placement/solver", "components", "plugins/contract"}},
	{"placement", []string{"placement", "components", "plugins/contract"}},
	{"node", []string{"node", "components", "membrane", "registry", "placement", "dht", "plugins"}},
	{"cmd", []string{"cmd", "node", "internal", "components", "plugins", "placement", "dht"}},
	{"internal", []string{""}},
}

func TestImportsFollowTheArchitecture(t *testing.T) {
	root := repo(t)
	eachGoFile(t, root, func(path string) {
		dir := filepath.ToSlash(filepath.Dir(path))
		row := -1
		for i, a := range allowed {
			if dir == a.pkg || strings.HasPrefix(dir, a.pkg+"/") {
				row = i
				break
			}
		}
		if row < 0 {
			t.Errorf("%s: its folder is not in the table of packages", path)
			return
		}
		for _, imp := range importsOf(t, filepath.Join(root, path)) {
			ours, ok := strings.CutPrefix(imp, module)
			if !ok {
				continue
			}
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			if (ours == "internal/planted" || ours == "internal/unison") && !strings.HasPrefix(dir, "plugins") {
				continue // the first one is nothing but constants in what is shipped, the second knows nothing of us
			}
			if !permitted(ours, allowed[row].imports) {
				t.Errorf("%s imports %s; %s may import only %v", path, ours, allowed[row].pkg, allowed[row].imports)
			}
		}
	})
}

// A component's author must not get libp2p, the database or the consensus library into his binary.
func TestComponentsStaySmall(t *testing.T) {
	root := repo(t)
	eachGoFile(t, root, func(path string) {
		if !strings.HasPrefix(filepath.ToSlash(path), "plugins/") || strings.HasSuffix(path, "_test.go") {
			return
		}
		for _, imp := range importsOf(t, filepath.Join(root, path)) {
			for _, heavy := range []string{"libp2p", "cockroachdb/pebble", "hashicorp/raft"} {
				if strings.Contains(imp, heavy) {
					t.Errorf("%s imports %s: a component's binary must not link it", path, imp)
				}
			}
		}
	})
}

// libp2p's root package and its config link every transport there is, which makes coppice too big a program; package dht takes the
// parts it uses. Tests may import what they want.
func TestUnusedTransportsAreNotLinked(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "./...")
	cmd.Dir = repo(t)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	const libp2p = "github.com/libp2p/go-libp2p"
	linked := strings.Fields(string(out))
	for _, p := range linked {
		unwanted := p == libp2p || strings.HasPrefix(p, "github.com/quic-go/") || strings.HasPrefix(p, "github.com/pion/")
		for _, part := range []string{"config", "x/simlibp2p", "p2p/transport/quic", "p2p/transport/quicreuse", "p2p/transport/webrtc", "p2p/transport/webtransport"} {
			unwanted = unwanted || p == libp2p+"/"+part || strings.HasPrefix(p, libp2p+"/"+part+"/")
		}
		if unwanted {
			t.Errorf("something links %s (why: go list -deps -f '{{.ImportPath}}: {{.Imports}}' ./... | grep %s)", p, p)
		}
	}
	if want := libp2p + "/p2p/transport/tcp"; !slices.Contains(linked, want) {
		t.Errorf("nothing links %s: does this test still look at the right thing?", want)
	}
}

func TestEveryPackageIsDocumented(t *testing.T) {
	root := repo(t)
	documented := map[string]bool{}
	eachGoFile(t, root, func(path string) {
		dir := filepath.Dir(path)
		if strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") || strings.HasSuffix(path, ".connect.go") {
			return
		}
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, path), nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		documented[dir] = documented[dir] || f.Doc != nil
	})
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s: no file has a package comment", dir)
		}
	}
}

func TestNoPackageIsNamedForNothing(t *testing.T) {
	for _, name := range []string{"util", "utils", "common", "pkg", "types", "manager", "helpers"} {
		matches, err := filepath.Glob(filepath.Join(repo(t), "*", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range matches {
			t.Errorf("%s: a package is named for what it holds", m)
		}
	}
}

func permitted(pkg string, prefixes []string) bool {
	for _, p := range prefixes {
		if p == "" || pkg == p || strings.HasPrefix(pkg, p+"/") {
			return true
		}
	}
	return false
}

func importsOf(t *testing.T, file string) []string {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, i := range f.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func eachGoFile(t *testing.T, root string, f func(path string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "bin") && path != root {
			return filepath.SkipDir
		}
		if !d.IsDir() && strings.HasSuffix(path, ".go") {
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			f(rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func repo(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			t.Fatal("go.mod not found above the test")
		}
		dir = parent
	}
}
