package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster/clustertest"
)

// building lets one test at a time build.
var building sync.Mutex

// build makes a binary of a package of this repository beside the others; one that is up to date is not made again.
func build(t testing.TB, pkg, name string, ldflags ...string) string {
	t.Helper()
	bin := filepath.Dir(clustertest.Binary(t))
	building.Lock()
	defer building.Unlock()
	out := filepath.Join(bin, "e2e", name)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", strings.Join(append([]string{"-s -w"}, ldflags...), " "), "-o", out, "./"+pkg)
	cmd.Dir, cmd.Env = filepath.Dir(bin), append(os.Environ(), "CGO_ENABLED=0")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, said.String())
	}
	return out
}

// component is a shipped component at a version. extra are linker flags beyond the version's.
func component(t testing.TB, name, version string, extra ...string) string {
	t.Helper()
	if version == "1.0.0" && len(extra) == 0 {
		return filepath.Join(filepath.Dir(clustertest.Binary(t)), "components", name)
	}
	return build(t, "plugins/"+name, name+"-"+version, append([]string{"-X main.version=" + version}, extra...)...)
}

// testProgram is a small program of testdata.
func testProgram(t testing.TB, name, mode string) string {
	t.Helper()
	return build(t, "internal/e2e/testdata/"+name, name+mode, "-X main.mode="+mode)
}

// long skips a test that takes minutes, unless they are asked for.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("takes minutes: COPPICE_LONG=1 runs it")
	}
}
