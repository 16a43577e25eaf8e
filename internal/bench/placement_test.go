package bench

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

func TestPlacement(t *testing.T) {
	in, out := t.TempDir(), t.TempDir()
	a, err := instance.NewAssignment(instance.AssignmentSpec{Name: "a", N: 30, Components: 4, Replicas: 3, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*instance.File{{Group: instance.NewGroup(instance.GroupSpec{Name: "g", N: 60, Seed: 1, Current: true})}, {Assignment: a}} {
		if err := f.Write(filepath.Join(in, f.Name()+".json.gz")); err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	cfg := PlacementConfig{Instances: in, Solutions: out, Deadline: 200 * time.Millisecond, CPUTime: true, Progress: func(PlacementRow) { seen++ }}
	rep, err := Placement(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.Rows) != 2 || seen != 2 {
		t.Fatalf("%d rows, %d told", len(rep.Rows), seen)
	}
	for _, r := range rep.Rows {
		if !r.Feasible || *r.Bound < *r.Value || r.Memory <= 0 || r.Time <= 0 {
			t.Errorf("%+v", r)
		}
		if _, err := os.Stat(filepath.Join(out, r.Instance+".sol.json")); err != nil {
			t.Error(err)
		}
	}
	if !rep.Rows[1].Proven {
		t.Errorf("60 nodes were not proven: %+v", rep.Rows[1])
	}
}

func TestPlacementRefuses(t *testing.T) {
	if err := (PlacementConfig{Deadline: time.Second}).Check(); err == nil {
		t.Error("no instances and none to draw: accepted")
	}
	if err := (PlacementConfig{Generate: true}).Check(); err == nil {
		t.Error("no deadline: accepted")
	}
	dir := t.TempDir()
	if _, err := Placement(t.Context(), PlacementConfig{Instances: dir, Deadline: time.Second}); err == nil {
		t.Error("an empty folder: accepted")
	}
	if err := os.WriteFile(filepath.Join(dir, "x.json"), []byte("{\n \"format\": 7}"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := Placement(t.Context(), PlacementConfig{Instances: dir, Deadline: time.Second})
	if err == nil || !strings.Contains(err.Error(), "x.json:2:12: ") {
		t.Errorf("%v does not say where", err)
	}
}
