package bench

import (
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	r := summary("x", "ms", []float64{4, 1, 3, 2})
	if r.Median != 2.5 || r.Min != 1 || r.Max != 4 || r.P99 != 4 || r.Baseline != nil {
		t.Errorf("%+v", r)
	}
	r = r.against("y", []float64{5, 5, 10})
	if r.Baseline == nil || *r.Baseline != 5 || *r.Ratio != 0.5 || r.Against != "y" {
		t.Errorf("%+v", r)
	}
	if r := summary("x", "ms", []float64{7}); r.Median != 7 || r.P99 != 7 {
		t.Errorf("one sample: %+v", r)
	}
	if r := summary("x", "ms", nil).against("y", nil); r.Median != 0 || r.Ratio != nil {
		t.Errorf("no samples: %+v", r)
	}
}

func TestUnknownBenchmark(t *testing.T) {
	if _, err := Run(t.Context(), "frob", Config{Runs: 1}); err == nil || !strings.Contains(err.Error(), strings.Join(Names(), ", ")) {
		t.Errorf("%v", err)
	}
	for _, n := range Names() {
		if About(n) == "" {
			t.Errorf("%s says nothing about itself", n)
		}
	}
}
