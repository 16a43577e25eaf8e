package components

import (
	"errors"
	"strings"
	"testing"
)

func TestExpressions(t *testing.T) {
	n := &NodeFacts{
		ID: "p1", Name: "n1", Zone: "eu-1", Platform: "linux/amd64", CPU: 4, MemoryMiB: 8192,
		Labels: map[string]string{"region": "eu"}, Facts: map[string]float64{"load5": 1.5, "free_mib": 4096},
	}
	c := &ComponentFacts{Key: "shop/web", Name: "web", Count: 3, CPU: 0.5}
	for _, tc := range []struct {
		src  string
		want bool
		err  string
	}{
		{`node.labels.region in ["eu", "us"]`, true, ""},
		{`node.load5 < 2`, true, ""},
		{`node.free_mib / 1024 >= 4`, true, ""},
		{`node.free_mib > component.memory_mib * 2`, true, ""},
		{`component.count > 1 && node.zone.startsWith("eu-")`, true, ""},
		{`has(node.free_gpu) && node.free_gpu > 1`, false, ""},
		{`!has(node.labels.ssd)`, true, ""},
		{`node.gpu > 1`, false, "fact gpu is unknown"},
		{`node.gpu > 1 || node.cpu > 2`, true, ""},
		{`node.labels.disk == "ssd"`, false, "the node has no label disk"},
	} {
		e, err := CompileConstraint(tc.src)
		if err != nil {
			t.Errorf("%s: %v", tc.src, err)
			continue
		}
		got, err := e.Holds(n, c)
		if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s = %v, %v; want %v, %q", tc.src, got, err, tc.want, tc.err)
		}
	}
}

func TestExpressionErrorsHaveTheirPlace(t *testing.T) {
	for _, tc := range []struct {
		src       string
		line, col int
		message   string
	}{
		{``, 1, 1, "found nothing"},
		{`node.load5 <`, 1, 13, "mismatched input"},
		{`node.load5`, 1, 1, "a number, expected one that is true or false"},
		{`node.labels`, 1, 1, "expected one that is true or false"},
		{`host.load5 < 1`, 1, 1, `found "host", expected node, component, group, link or a function of CEL`},
		{`node.cpu > 1 && link.rtt_ms < 2.0`, 1, 1, "found node together with group or link"},
		{`link.rtt < 2`, 1, 5, "undefined field 'rtt'"},
		{`group.count(3) > 1`, 1, 12, "no matching overload"},
		{strings.Repeat(`node.name.matches("(a*)*(b*)*(c*)*") && `, 80) + `true`, 1, 1, "may cost"},
		{`component.cuont > 1`, 1, 10, "undefined field 'cuont'"},
		{`node.zone > 1`, 1, 11, "no matching overload"},
		{`[1, 2].all(x, x > 0)`, 1, 0, ""},
	} {
		_, err := CompileConstraint(tc.src)
		var e *ExpressionError
		if !errors.As(err, &e) {
			t.Errorf("%s: %v, want an ExpressionError", tc.src, err)
			continue
		}
		got := e.Issues[0]
		if tc.col > 0 && (got.Line != tc.line || got.Col != tc.col) || !strings.Contains(got.Message, tc.message) {
			t.Errorf("%s: %+v, want %d:%d %q", tc.src, got, tc.line, tc.col, tc.message)
		}
	}
	if _, err := CompileConstraint(strings.Repeat("(", 1000)); err == nil {
		t.Error("a thousand parentheses compile")
	}
}

func TestTerms(t *testing.T) {
	n := &NodeFacts{Labels: map[string]string{"disk": "ssd"}, Facts: map[string]float64{"load5": 1.5}}
	for src, want := range map[string]float64{`node.load5`: 1.5, `node.labels.disk == "ssd"`: 1, `10 - node.load5 * 2`: 7, `3`: 3} {
		e, err := CompileTerm(src)
		if err != nil {
			t.Errorf("%s: %v", src, err)
			continue
		}
		if got, err := e.Value(n, &ComponentFacts{}); err != nil || got != want {
			t.Errorf("%s = %v, %v; want %v", src, got, err, want)
		}
	}
	if _, err := CompileTerm(`node.name`); err == nil {
		t.Error("text is taken for a number")
	}
}

func BenchmarkHolds(b *testing.B) {
	e, err := CompileConstraint(`node.labels.region in ["eu", "us"] && node.load5 < 2`)
	if err != nil {
		b.Fatal(err)
	}
	n := &NodeFacts{Labels: map[string]string{"region": "eu"}, Facts: map[string]float64{"load5": 1.5}}
	for b.Loop() {
		if ok, err := e.Holds(n, nil); !ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
