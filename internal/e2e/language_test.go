package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// A component is swapped for one in another language under load and back, is moved, and its machine is killed while it is the one in Python: the state and what is
// remembered of calls go along, no call fails, and nothing that was answered is lost or doubled.
func TestStateGoesFromGoToPythonAndBack(t *testing.T) {
	t.Parallel() // it waits most of the time
	python := clustertest.PythonKV(t, "1.1.0")
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"), python)
	g.deploy(n1, kvApp)
	g.running(n1, "data/kv-0", protected(3))
	p := g.press("data/kv", g.Nodes, 50, patient)
	version := func(v string, more func(*apiv1.Instance) error) func(*apiv1.Instance) error {
		return func(in *apiv1.Instance) error {
			if in.GetVersion() != v {
				return fmt.Errorf("it is at version %s, not %s", in.GetVersion(), v)
			}
			return more(in)
		}
	}
	if r := g.replace(n1, "swap", "data/kv@1.1.0"); r.From != "1.0.0" || r.To != "1.1.0" {
		t.Errorf("swap to the one in Python: %+v", r)
	}
	p.answered(50)
	in := g.running(n1, "data/kv-0", version("1.1.0", protected(3)))
	to := g.others(g.Node(in.GetNode()))[0]
	g.do(n1, "move", "data/kv", to.Name)
	p.answered(20)
	in = g.running(n1, "data/kv-0", version("1.1.0", protected(3)))
	p.audit(true)

	// Its machine dies.
	owner := g.Node(in.GetNode())
	rest := g.others(owner)
	p = g.press("data/kv", rest, 50, 20*time.Second)
	at, err := owner.Kill()
	must(t, err)
	first := p.answeredBy(load.FirstQuery{After: at, Component: "data/kv", NotNode: owner.Name, Writes: true})
	t.Logf("%s answered %s after the kill", first.Node, first.Time.Sub(at).Round(time.Millisecond))
	g.running(rest[0], "data/kv-0", version("1.1.0", notOn(owner.Name)))
	if r := g.replace(rest[0], "swap", "data/kv@1.0.0"); r.From != "1.1.0" || r.To != "1.0.0" {
		t.Errorf("swap back to the one in Go: %+v", r)
	}
	p.answered(50)
	g.running(rest[0], "data/kv-0", version("1.0.0", notOn(owner.Name)))
	p.audit(true)
}
