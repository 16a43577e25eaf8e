package instance

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func group() *Group {
	return NewGroup(GroupSpec{Name: "g", N: 12, Seed: 4, Missing: 0.2, Current: true, Least: 2, Most: 4})
}

func assignment(t testing.TB) *Assignment {
	t.Helper()
	a, err := NewAssignment(AssignmentSpec{Name: "a", N: 20, Components: 4, Replicas: 3, Seed: 2})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	dir := t.TempDir()
	for _, f := range []*File{{Group: group()}, {Assignment: assignment(t)}} {
		for _, ext := range []string{".json", ".json.gz"} {
			path := filepath.Join(dir, f.Name()+ext)
			if err := f.Write(path); err != nil {
				t.Fatal(err)
			}
			got, err := Read(path)
			if err != nil {
				t.Fatal(err)
			}
			if f.Group != nil {
				got.Group.Nodes.Quarantined, got.Group.Nodes.CPU, got.Group.Nodes.Memory = f.Group.Nodes.Quarantined, f.Group.Nodes.CPU, f.Group.Nodes.Memory
			}
			if !reflect.DeepEqual(got, f) {
				t.Errorf("%s: read back as something else", path)
			}
		}
	}
}

func text(t *testing.T, f *File) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.json")
	if err := f.Write(path); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", " "); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestMistakesAreFoundAndNamed(t *testing.T) {
	g, a := text(t, &File{Group: group()}), text(t, &File{Assignment: assignment(t)})
	for name, c := range map[string]struct{ in, old, new, want string }{
		"unknown field":     {g, `"anchors"`, `"ankers"`, `unknown field "ankers"`},
		"field twice":       {g, `"name": "g"`, `"name": "g", "name": "h"`, `field "name" is there twice`},
		"field missing":     {g, `"name": "g",`, ``, `field "name" is missing`},
		"not finite":        {g, `"add": 0.012`, `"add": 1e999`, `1e999 is no finite number`},
		"NaN":               {g, `"add": 0.012`, `"add": NaN`, `"NaN" is no value`},
		"hexadecimal":       {g, `"add": 0.012`, `"add": 0x1p-2`, `"0x1p-2" is no value`},
		"negative cost":     {g, `"add": 0.012`, `"add": -0.012`, `-0.012 is below 0`},
		"fraction":          {g, `"min_nodes": 2`, `"min_nodes": 2.5`, `a whole number expected, not 2.5`},
		"bounds swapped":    {g, `"min_nodes": 2`, `"min_nodes": 7`, `min_nodes 7 is above max_nodes 4`},
		"unknown group":     {g, `"ceil"`, `"floor"`, `group "floor", want ceil or none`},
		"format":            {g, groupFormat, "placement-p9/1", `format "placement-p9/1"`},
		"sites":             {g, `"sites": 12`, `"sites": 13`, `base: row 0 has 11 entries, want 12`},
		"too many sites":    {g, `"sites": 12`, `"sites": 19999`, `the file is too short for 19999 sites`},
		"too many nodes":    {g, `"n": 12`, `"n": 13`, `12 entries, want 13`},
		"string":            {g, `"name": "g"`, `"name": 7`, `name expected`},
		"follows":           {g, "\n}", "\n} x", `something follows the document`},
		"cut off":           {g, "\n}", "", `a comma expected`},
		"weight":            {a, `"weight": 4`, `"weight": -4`, `-4 is below 0`},
		"component":         {a, `"max_per_node": `, `"max_per_knot": `, `unknown field "max_per_knot"`},
		"negative capacity": {a, `"cpu_m": [`, `"cpu_m": [-1,`, `-1 is not in [0,`},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(c.in, c.old) {
				t.Fatalf("the instance has no %s", c.old)
			}
			at := strings.LastIndex(c.in, c.old)
			_, err := Parse("x.json", []byte(c.in[:at]+c.new+c.in[at+len(c.old):]))
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "x.json:") {
				t.Errorf("%v, want %q with its place", err, c.want)
			}
		})
	}
}

func TestPlaceOfAMistake(t *testing.T) {
	_, err := Parse("x.json", []byte("{\n \"format\": \"placement-p1/1\",\n \"näme\": 1}"))
	if err == nil || err.Error() != `x.json:3:2: the instance: unknown field "näme"` {
		t.Error(err)
	}
}

// Limits hold where they are met exactly: as decimals, not as floats.
func TestLimitsAreExact(t *testing.T) {
	l := Latency{Unit: 0.01}
	if got := l.Below(280, true); got != 27_999 {
		t.Errorf("below 280 ms: %d", got)
	}
	if got := l.Below(280, false); got != 28_000 {
		t.Errorf("at most 280 ms: %d", got)
	}
	if got := l.Below(0.07, true); got != 6 { // 0.07/0.01 is 7.000000000000001 in floats
		t.Errorf("below 0.07 ms: %d", got)
	}
	g := group()
	g.Nodes.Alive[0], g.Nodes.Blacklisted[0], g.Nodes.Load5[0], g.Nodes.LiveSlices[0], g.Nodes.MemPressure[0] = true, false, 0, 0, 0
	g.Nodes.CPUGHz[0], g.Nodes.FreeCPU[0], g.MinFreeGHz = 3.3, 10, 0.33 // 3.3·10/100 is 0.33 exactly, and above it in floats
	if _, ok := g.Eligible(0); ok {
		t.Error("a node with just the least free clock is eligible: the limit is strict")
	}
	g.Nodes.FreeCPU[0] = 10.000001
	if why, ok := g.Eligible(0); !ok {
		t.Error(why)
	}
}

// What is drawn has a solution: the placement that was drawn first, once everything on it may run.
func TestGeneratedAreSolvable(t *testing.T) {
	for seed := range uint64(10) {
		a, err := NewAssignment(AssignmentSpec{Name: "a", N: 60, Components: 8, Replicas: 6, Seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		if _, wrong := a.Judge(a.Current); len(wrong) > 0 {
			t.Errorf("seed %d: %v", seed, wrong)
		}
		b, err := NewAssignment(AssignmentSpec{Name: "a", N: 60, Components: 8, Replicas: 6, Seed: seed})
		if err != nil || !reflect.DeepEqual(a, b) {
			t.Errorf("seed %d: the same seed draws something else (%v)", seed, err)
		}
	}
	if _, err := NewAssignment(AssignmentSpec{N: 2, Components: 10, Replicas: 9}); err == nil {
		t.Error("two nodes held everything")
	}
}

func FuzzParse(f *testing.F) {
	dir := f.TempDir()
	for _, v := range []*File{{Group: group()}, {Assignment: assignment(f)}} {
		path := filepath.Join(dir, "x.json")
		if err := v.Write(path); err != nil {
			f.Fatal(err)
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"format":"placement-p1/1","n":[[[`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		v, err := Parse("x", raw)
		if (v == nil) == (err == nil) {
			t.Errorf("%v, %v", v, err)
		}
	})
}
