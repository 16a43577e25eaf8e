package api

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestDiscover(t *testing.T) {
	run := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", run)
	var none *NoneError
	if _, err := Discover(); !errors.As(err, &none) {
		t.Fatalf("an empty machine: %v", err)
	}
	un1, err := Register(Entry{Name: "n1", API: "unix:///d1/api.sock", Data: "/d1"})
	if err != nil {
		t.Fatal(err)
	}
	if e, err := Discover(); err != nil || e.Name != "n1" || e.PID != os.Getpid() {
		t.Fatalf("one node: %v %v", e, err)
	}
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string]string{
		"stale":   `{"pid":` + strconv.Itoa(dead.Process.Pid) + `,"name":"old","api":"unix:///x","data":"/x"}`,
		"reused":  `{"pid":` + strconv.Itoa(os.Getpid()) + `,"start":"1","name":"old","api":"unix:///y","data":"/y"}`,
		"garbage": `{"pid":`,
	} {
		if err := os.WriteFile(filepath.Join(run, "coppice", name+".json"), []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if e, err := Discover(); err != nil || e.Name != "n1" {
		t.Fatalf("beside stale entries: %v %v", e, err)
	}
	un2, err := Register(Entry{Name: "n2", API: "unix:///d2/api.sock", Data: "/d2"})
	if err != nil {
		t.Fatal(err)
	}
	var several *SeveralError
	if _, err := Discover(); !errors.As(err, &several) || len(several.Entries) != 2 || !strings.Contains(err.Error(), "n2 (unix:///d2/api.sock)") {
		t.Fatalf("two nodes: %v", err)
	}
	if err := un1(); err != nil {
		t.Fatal(err)
	}
	if e, err := Discover(); err != nil || e.Name != "n2" {
		t.Fatalf("after one left: %v %v", e, err)
	}
	if _, err := Register(Entry{Name: "n2", API: "unix:///d2/other.sock", Data: "/d2"}); err != nil {
		t.Fatal(err)
	}
	if err := un2(); err != nil { // must not remove the newer one's
		t.Fatal(err)
	}
	if e, err := Discover(); err != nil || e.API != "unix:///d2/other.sock" {
		t.Fatalf("a newer node over the same data: %v %v", e, err)
	}
}

func TestDiscoverRefusesADirectoryOfOthers(t *testing.T) {
	run := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", run)
	dir := filepath.Join(run, "coppice")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Discover(); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a directory that anybody may enter: %v", err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(t.TempDir(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := Discover(); err == nil {
		t.Error("a symbolic link was followed")
	}
}
