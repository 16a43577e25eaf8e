package e2e

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// A manifest with errors: each is told with file:line:column, what was found and what was expected, all at once, and nothing is deployed.
func TestManifestWithErrors(t *testing.T) {
	g := plant(t, 1)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	path := g.file("wrong.yaml", `application: good
components:
  - name: kv
    artifact: kv
---
application: shop
components:
  - name: web
    artifcat: kv
    count: many
    bindings: {store: stroe}
    require: ["node.load5 < two"]
  - name: store
    artifact: kv
    durable: sometimes
`)
	r := g.refused(n1, nil, "deploy", path)
	for _, at := range []struct{ pos, says string }{
		{"9:5", "artifcat"}, {"10:12", "many"}, {"11:23", "stroe"}, {"12:29", "two"}, {"15:14", "sometimes"},
	} {
		if !regexp.MustCompile(`wrong\.yaml:` + at.pos + `: [^·]*` + at.says).MatchString(r.err) {
			t.Errorf("no error at %s about %q:\n%s", at.pos, at.says, r.err)
		}
	}
	if n := strings.Count(r.err, "wrong.yaml:"); n < 5 {
		t.Errorf("%d errors are told of at least 5:\n%s", n, r.err)
	}
	plan := g.refused(n1, []string{"wrong.yaml:9:5"}, "plan", path)
	if plan.out != "" {
		t.Errorf("plan printed %s", plan.out)
	}
	// Nothing of the good document either.
	if out := g.do(n1, "apps", "-o", "json"); strings.Contains(out, "good") || strings.Contains(out, "shop") {
		t.Errorf("something was deployed: %s", out)
	}
	g.refused(n1, []string{"nosuch", "the registry has"}, "deploy", g.file("a.yaml", "application: a\ncomponents:\n  - name: a\n    artifact: nosuch\n"))
	g.refused(n1, []string{"kv"}, "deploy", g.file("b.yaml", "application: a\ncomponents:\n  - name: a\n    artifact: kv@^7\n"))
	g.refused(n1, []string{"no such file"}, "deploy", g.Dir+"/none.yaml")
	g.refused(n1, []string{"capacitty"}, "deploy", g.file("c.yaml", "application: a\ncomponents:\n  - name: a\n    artifact: kv\n    attributes: {capacitty: 1}\n"))
}

// A component that never starts: `deploy --wait` says what it waits for and why, the starts come ever more rarely, and the rest works.
func TestNeverHealthy(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 2)
	n1 := g.Nodes[0]
	g.push(n1, testProgram(t, "crash", ""), component(t, "counter", "1.0.0"))
	begin := time.Now()
	crash := g.file("crash.yaml", "application: doomed\ncomponents:\n  - name: crash\n    artifact: crash\n")
	g.refused(n1, []string{"doomed/crash-0", "failed", "the licence server is closed on Sundays"}, "deploy", "--wait", "--timeout", "5s", crash)
	var failed []time.Time
	g.wait("several starts to have failed", func(ctx context.Context) error {
		failed = failed[:0]
		list, err := g.events(ctx, n1, "/apps/doomed")
		if err != nil {
			return err
		}
		for _, ev := range list {
			if ev.GetType() == "start-failed" {
				failed = append(failed, ev.GetTime().AsTime())
			}
		}
		if len(failed) < 4 {
			return fmt.Errorf("%d", len(failed))
		}
		return nil
	})
	// With 100 ms at first and twice as much each time, n starts take at least 100·(2^(n-1) − 1) ms.
	took, least := time.Since(begin), 100*time.Millisecond*(1<<(len(failed)-1)-1)
	t.Logf("%d starts in %s", len(failed), took.Round(time.Millisecond))
	if took < least {
		t.Errorf("%d starts in %s: the waits between them do not double", len(failed), took)
	}
	slices.SortFunc(failed, time.Time.Compare)
	for i := 2; i < len(failed); i++ {
		if wait := failed[i].Sub(failed[i-1]); wait < 90*time.Millisecond<<(i-1) {
			t.Errorf("start %d came %s after the one before", i+1, wait)
		}
	}
	g.wait("the other node to say why", func(ctx context.Context) error { // between two starts the reason is that it starts
		in, err := g.instance(ctx, g.Nodes[1], "doomed/crash-0")
		if err == nil && (in.GetState() == "running" || !strings.Contains(in.GetReason(), "Sundays")) {
			err = fmt.Errorf("it is %s: %s", in.GetState(), in.GetReason())
		}
		return err
	})
	g.deploy(n1, counterApp)
	g.counted(n1, 2)
	g.do(n1, "remove", "doomed")
	g.wait("the doomed to be gone", func(ctx context.Context) error {
		if in, err := g.instance(ctx, n1, "doomed/crash-0"); err == nil {
			return fmt.Errorf("it is %s", in.GetState())
		}
		return nil
	})
	g.shows(n1, 2)
}

// Two owners in a row die right after they have started a component: it is quarantined, not the nodes, and a command lets it go on.
func TestTwoOwnerDeathsQuarantineTheComponent(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 4)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	in := g.running(n1, "tally/counter-0", protected(3))
	for range 2 {
		victim := g.Node(in.GetNode())
		_, err := victim.Kill()
		must(t, err)
		watcher := g.Alive()[0]
		g.wait("another owner, or quarantine", func(ctx context.Context) (err error) {
			if in, err = g.instance(ctx, watcher, "tally/counter-0"); err != nil {
				return err
			}
			if in.GetNode() == victim.Name && !in.GetQuarantined() || in.GetState() != "running" && !in.GetQuarantined() {
				return fmt.Errorf("it is %s on %s", in.GetState(), in.GetNode())
			}
			return nil
		})
		g.waitVoters()
	}
	watcher := g.Alive()[0]
	if !in.GetQuarantined() || in.GetState() != "failed" {
		t.Fatalf("after two deaths of owners it is %s on %s: %s", in.GetState(), in.GetNode(), in.GetReason())
	}
	for _, n := range g.Alive() {
		if q := g.nodesInState(n, "quarantined"); len(q) > 0 {
			t.Errorf("nodes %v are quarantined for it", q)
		}
	}
	g.event(watcher, "/apps/tally", "quarantine", func(ev *apiv1.Event) bool { return ev.GetType() == "quarantine" })
	g.do(watcher, "start", "tally/counter")
	g.running(watcher, "tally/counter-0", nil)
	g.counted(watcher, 1)
}

// A guarantee and the finer keys that contradict it are refused at their place, and what an artifact cannot carry out when it is deployed.
func TestContradictingGuarantees(t *testing.T) {
	g := plant(t, 1)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.push(n1, component(t, "counter", "1.0.0"))
	app := func(name, artifact, keys string) string {
		return g.file(name+".yaml", "application: "+name+"\ncomponents:\n  - name: a\n    artifact: "+artifact+"\n    "+keys+"\n")
	}
	g.refused(n1, []string{"a.yaml:6:15", "found takeover: fenced with guarantee: exactly-one, expected takeover: leased"},
		"deploy", app("a", "kv", "guarantee: exactly-one\n    takeover: fenced"))
	g.refused(n1, []string{"b.yaml:6:19", "found on_partition: keep with takeover: leased"}, "deploy", app("b", "kv", "takeover: leased\n    on_partition: keep"))
	g.refused(n1, []string{"c.yaml:5:14", "found durable: each-call with on_partition: keep"}, "deploy", app("c", "kv", "durable: each-call\n    on_partition: keep"))
	g.refused(n1, []string{"found merge, expected keep_majority or newest: kv has no Merge"}, "deploy", app("d", "kv", "on_partition: keep\n    reconcile: merge"))
	g.refused(n1, []string{"found always-on with durable: 5s"}, "deploy", app("e", "kv", "guarantee: always-on\n    durable: 5s"))
	for name, want := range map[string][2]string{
		"f": {"kv", "on_partition: keep"}, "g": {"counter", "guarantee: always-on"}, "h": {"kv", "takeover: leased"},
	} {
		g.deploy(n1, fmt.Sprintf("application: %s\ncomponents:\n  - name: a\n    artifact: %s\n    %s\n", name, want[0], want[1]))
		g.running(n1, name+"/a-0", nil)
	}
	for _, row := range g.query(n1, "select component, durable, guarantee from components where application <> 'system'") {
		t.Log(row)
		want := map[string]string{"f/a": "5s", "g/a": "each-call", "h/a": "each-call"}[fmt.Sprint(row["component"])]
		if row["durable"] != want {
			t.Errorf("%v is durable %v, want %s", row["component"], row["durable"], want)
		}
	}
}
