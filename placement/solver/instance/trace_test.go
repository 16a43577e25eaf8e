package instance

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestATraceThatIsWrittenIsRead(t *testing.T) {
	dir := t.TempDir()
	for _, event := range []bool{false, true} {
		for _, ext := range []string{".json", ".json.gz"} {
			want := NewTrace(TraceSpec{Name: "t", N: 14, Steps: 8, Seed: 3, Event: event})
			path := filepath.Join(dir, "t"+ext)
			if err := want.Write(path); err != nil {
				t.Fatal(err)
			}
			got, err := ReadTrace(path)
			if err != nil {
				t.Fatal(err)
			}
			if got.Steps != 8 || got.Event != want.Event || got.Period != want.Period || got.Name != "t" {
				t.Errorf("%s: %+v", ext, got)
			}
			for step := range 8 {
				a, b := want.At(step), got.At(step)
				a.Nodes.Quarantined, a.Nodes.CPU, a.Nodes.Memory, a.Current = nil, nil, nil, nil // no part of a trace
				if !reflect.DeepEqual(a, b) {
					t.Errorf("%s, period %d: %+v, want %+v", ext, step, b, a)
				}
			}
		}
	}
}

// What changes from one period to the next is there, and only that.
func TestATraceChangesOverTime(t *testing.T) {
	tr := NewTrace(TraceSpec{Name: "t", N: 40, Steps: 8, Seed: 1, Event: true})
	before, after := tr.At(3), tr.At(4)
	if reflect.DeepEqual(before.Latency.Base, after.Latency.Base) || !reflect.DeepEqual(before.Latency.Base, tr.At(0).Latency.Base) {
		t.Error("latencies change at period 4, and only there")
	}
	if reflect.DeepEqual(before.Nodes.FreeCPU, after.Nodes.FreeCPU) || !reflect.DeepEqual(before.Nodes.CPUGHz, after.Nodes.CPUGHz) {
		t.Error("free CPU changes, the clock does not")
	}
	sum := func(g *Group) (v float64) {
		for _, f := range g.Nodes.FreeCPU {
			v += f
		}
		return v
	}
	if calm, hit := sum(tr.At(tr.Event[0]-1)), sum(tr.At(tr.Event[0])); hit > 0.8*calm {
		t.Errorf("the event takes free CPU from %g to %g only", calm, hit)
	}
}

func TestBadTracesAreRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t.json")
	if err := NewTrace(TraceSpec{Name: "t", N: 6, Steps: 4, Seed: 1, Event: true}).Write(path); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, old, with, want string }{
		{"format", "placement-trace/1", "placement-p1/1", "want placement-trace/1"},
		{"unknown field", `"period_s"`, `"period"`, `unknown field "period"`},
		{"periods", `"steps":4`, `"steps":5`, "4 periods, want 5"},
		{"fewer periods", `"steps":4`, `"steps":3`, "more than 3 periods"},
		{"event", `"event_steps":[1,2]`, `"event_steps":[2,2]`, "event_steps: want [first, end]"},
		{"change", `"base_from_step_2"`, `"base_from_step_9"`, "the trace ends before"},
		{"not a number", `"unit_ms":0.01`, `"unit_ms":NaN`, "NaN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			bad := bytes.Replace(good, []byte(c.old), []byte(c.with), 1)
			if bytes.Equal(bad, good) {
				t.Fatalf("%s is not in the file", c.old)
			}
			_, err := ParseTrace("t.json", bad)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "t.json:1:") {
				t.Errorf("%v, want %q and where", err, c.want)
			}
		})
	}
}
