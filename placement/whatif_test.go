package placement

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

func nodesIn(plan *placementv1.Plan) map[string]string {
	out := map[string]string{}
	for _, a := range plan.GetAssignments() {
		out[a.GetInstance()] = a.GetNode()
	}
	return out
}

func TestWhatIf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		defer w.run()()
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x, apart: [x], count: 3, price: {from: 0, to: 1, weight: 20}}\n")
		time.Sleep(5 * time.Minute)
		before := w.owners()
		plan := func(q Whatif) *placementv1.Plan {
			t.Helper()
			_, p, err := w.c.Plan(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		// without a node one instance has no place, and it is said why and what would help
		p := plan(Whatif{Without: []string{"n2"}})
		lost := 0
		for _, a := range p.GetAssignments() {
			if a.GetNode() == "" || a.GetNode() == "n2" {
				lost++
				if len(a.GetConflict()) != 1 || a.GetConflict()[0] != "apart" || !strings.HasPrefix(a.GetRemedies()[0], "without apart: n") {
					t.Errorf("%v", a)
				}
			}
		}
		if p.GetFeasible() || lost != 1 {
			t.Errorf("without n2: %v", p)
		}
		// with another one it has
		fourth, err := ParseNodes("n9.json", []byte(`{"name": "n9", "cpu": 8, "memory": "16GiB", "price": 0.5, "rtt_ms": {"n1": 3}}`))
		if err != nil {
			t.Fatal(err)
		}
		p = plan(Whatif{Without: []string{"n2"}, With: fourth})
		found := false
		for _, node := range nodesIn(p) {
			found = found || node == "n9"
		}
		if !p.GetFeasible() || !found {
			t.Errorf("without n2 and with n9: %v", p)
		}
		// a price moves what cares for it
		p = plan(Whatif{With: fourth, Prices: map[string]float64{"n1": 1, "n2": 0.1, "n3": 0.1, "n9": 0}})
		if got := nodesIn(p); got["a/x-0"] == "n1" || got["a/x-1"] == "n1" || got["a/x-2"] == "n1" {
			t.Errorf("with a dear n1: %v", got)
		}
		for what, q := range map[string]Whatif{
			"without n8: there is no node": {Without: []string{"n8"}},
			"price n8: there is no node":   {Prices: map[string]float64{"n8": 1}},
			"price n1: found -1":           {Prices: map[string]float64{"n1": -1}},
			"with n1: there is a node":     {With: []NewNode{{Node: &placementv1.Node{Id: "x", Name: "n1"}}}},
			"with n7: rtt_ms names n8":     {With: []NewNode{{Node: &placementv1.Node{Id: "n7", Name: "n7"}, RTT: map[string]float64{"n8": 1}}}},
		} {
			if _, _, err := w.c.Plan(t.Context(), q); err == nil || !strings.Contains(err.Error(), what) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if after := w.owners(); strings.Join(before, " ") != strings.Join(after, " ") {
			t.Errorf("asking changed %v to %v", before, after)
		}
	})
}

func TestNodesThatAreNotThereAreRead(t *testing.T) {
	all, err := ParseNodes("n.json", []byte("[{\"name\": \"n8\"},\n {\"name\": \"n9\", \"labels\": {\"region\": \"eu\"}, \"facts\": {\"load5\": 1.5}}]"))
	if err != nil || len(all) != 2 || all[1].Node.GetLabels()["region"] != "eu" || all[0].Node.GetCpuMillis() != 4000 || all[0].Node.GetState() != "alive" {
		t.Fatalf("%v, %v", all, err)
	}
	for text, want := range map[string]string{
		"{\"name\": \"n9\",\n \"cpus\": 8}":        `unknown field "cpus"`,
		"{\"name\": \"n9\",\n \"cpu\": \"eight\"}": "n.json:2:",
		"{\"name\": \"n9\"\n \"cpu\": 8}":          "n.json:2:2",
		"{\"name\": \"n 9\"}":                      "n 9",
		"{\"name\": \"n9\", \"cpu\": -1}":          "cpu: found -1",
		"{\"name\": \"n9\", \"price\": -1}":        "price: found -1",
		"{\"name\": \"n9\", \"memory\": \"much\"}": "found \"much\", expected a size",
		"{\"name\": \"n9\"} {}":                    "found more after the first value",
		"":                                         "n.json:1:1",
	} {
		if _, err := ParseNodes("n.json", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}
