package clustertest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// python is the interpreter of the system: one in a home directory is out of a component's reach.
const python = "/usr/bin/python3"

// NeedPython skips the test where the machine has no Python with gRPC.
func NeedPython(t testing.TB) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), python, "-c", "import grpc, google.protobuf, xxhash").CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: no Python with gRPC here (Debian: apt-get install python3-grpcio python3-protobuf python3-xxhash): %v %s", err, out)
	}
}

// PythonKV packs plugins/kv/python as one file of this version, as docs/writing-a-component.md says it. edit changes its sources before that: pairs of old and
// new text. The test is skipped where the machine has no Python with gRPC.
func PythonKV(t testing.TB, version string, edit ...string) string {
	t.Helper()
	NeedPython(t)
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "src"), os.DirFS(filepath.Join(root, "plugins", "kv", "python"))); err != nil {
		t.Fatal(err)
	}
	edited := map[string]bool{}
	sources, err := filepath.Glob(filepath.Join(dir, "src", "*.py"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range sources {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := string(raw)
		for i := 0; i < len(edit); i += 2 {
			if strings.Contains(text, edit[i]) {
				text, edited[edit[i]] = strings.Replace(text, edit[i], edit[i+1], 1), true
			}
		}
		if filepath.Base(path) == "version.py" {
			text = "VERSION = \"" + version + "\"\n"
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if len(edited) != len(edit)/2 {
		t.Fatalf("of the texts to change %d of %d are there: %q", len(edited), len(edit)/2, edit)
	}
	file := filepath.Join(dir, "kv-"+version)
	if out, err := exec.CommandContext(t.Context(), python, "-m", "zipapp", "-p", python, "-o", file, filepath.Join(dir, "src")).CombinedOutput(); err != nil {
		t.Fatalf("zipapp: %v\n%s", err, out)
	}
	return file
}
