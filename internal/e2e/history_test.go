package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
)

// checkpoints lists the ids that are kept of a component, oldest first, with why.
func (g *grove) checkpoints(n *cluster.Node, component string) (ids, why []string) {
	g.t.Helper()
	var res struct {
		Checkpoints []struct {
			ID, Why, Version string
			HoldersAlive     int `json:"holders_alive"`
		}
	}
	must(g.t, json.Unmarshal([]byte(g.do(n, "checkpoints", component, "-o", "json")), &res))
	for _, k := range res.Checkpoints {
		ids, why = append(ids, k.ID), append(why, k.Why)
		if k.HoldersAlive == 0 && !strings.HasPrefix(k.ID, "@") { // those of a branch are counted somewhat later
			g.t.Errorf("nobody holds %s of %s", k.ID, component)
		}
	}
	return ids, why
}

// keep makes a checkpoint by hand and returns its id.
func (g *grove) keep(n *cluster.Node, component string) string {
	g.t.Helper()
	var res struct{ ID string }
	must(g.t, json.Unmarshal([]byte(g.do(n, "checkpoint", component, "-o", "json")), &res))
	if res.ID == "" {
		g.t.Fatal("the checkpoint is not kept")
	}
	return res.ID
}

func (g *grove) put(n *cluster.Node, component, key, value string) {
	g.t.Helper()
	g.do(n, "call", component, "Put", `{"key":"`+key+`","value":"`+value+`"}`)
}

func (g *grove) holds(n *cluster.Node, component, key, want string) {
	g.t.Helper()
	if got := g.value(n, component, key); got != want {
		g.t.Errorf("%s of %s at %s is %q, want %q", key, component, n.Name, got, want)
	}
}

// A checkpoint is made, things change, it is gone back to and undone; a copy is made beside and one in a file, which becomes a component of another cluster, with
// the state and the version that it had. What cannot be is refused, with a reason and what to try, and changes nothing.
func TestCheckpointsRestoreUndoForkExportImport(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1, n2 := g.Nodes[0], g.Nodes[1]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	g.running(n1, "data/kv-0", nil)
	g.put(n1, "data/kv", "a", "first")
	c1 := g.keep(n2, "data/kv")
	g.put(n2, "data/kv", "a", "second")
	g.put(n2, "data/kv", "b", "new")

	g.refused(n1, []string{"c99 is not kept", "\ntry: coppice checkpoints"}, "restore", "data/kv", "--at", "c99")
	g.refused(n1, []string{"the oldest that is kept", "\ntry: "}, "restore", "data/kv", "--at", "2001-01-01T00:00:00Z")
	if r := g.run(n1, "restore", "data/kv"); r.code != 2 {
		t.Errorf("restore without --at: status %d", r.code)
	}
	g.holds(n1, "data/kv", "a", "second")

	t.Log(g.do(n2, "restore", "data/kv", "--at", c1))
	g.holds(n1, "data/kv", "a", "first")
	g.holds(n2, "data/kv", "b", "")
	g.put(n1, "data/kv", "c", "after")
	t.Log(g.do(n1, "undo", "data/kv"))
	g.holds(n2, "data/kv", "a", "second")
	g.holds(n2, "data/kv", "c", "")
	_, why := g.checkpoints(g.Nodes[2], "data/kv")
	for _, w := range []string{"by hand", "before restore", "before undo"} {
		if !strings.Contains(strings.Join(why, ","), w) {
			t.Errorf("nothing is kept that was made %s: %v", w, why)
		}
	}
	if out := g.do(n1, "inspect", "data/kv"); !strings.Contains(out, "earlier") {
		t.Errorf("inspect does not say how far back it can go:\n%s", out)
	}
	if out := g.do(n1, "query", "select id, why from checkpoints_history where instance = 'data/kv-0' and holders_alive > 0"); !strings.Contains(out, c1) {
		t.Errorf("SQL does not have %s:\n%s", c1, out)
	}
	g.forks(n1, c1)
	g.exports(n2, c1)
}

// forks makes copies beside.
func (g *grove) forks(n *cluster.Node, at string) {
	g.t.Helper()
	g.refused(n, []string{"data/kv already"}, "fork", "data/kv", "--at", at, "--as", "kv")
	g.refused(n, []string{"name", "\ntry: "}, "fork", "data/kv", "--at", at, "--as", "No Name")
	g.refused(n, []string{"c99 is not kept"}, "fork", "data/kv", "--at", "c99", "--as", "then")
	g.t.Log(g.do(n, "fork", "data/kv", "--at", at, "--as", "then"))
	g.holds(n, "data/then", "a", "first")
	g.put(n, "data/then", "a", "its own")
	g.holds(n, "data/kv", "a", "second")
	g.do(n, "fork", "data/kv", "--as", "try/kv") // as it is now
	g.holds(n, "try/kv", "b", "new")
	g.do(n, "remove", "try")
	if r := g.run(n, "call", "data/then", "Get", `{"key":"a"}`); r.code != 0 || !strings.Contains(r.out, "its own") {
		g.t.Errorf("the fork beside: %d %s%s", r.code, r.out, r.err)
	}
}

// exports takes it to another cluster, of one node.
func (g *grove) exports(n *cluster.Node, at string) {
	t := g.t
	t.Helper()
	file := filepath.Join(g.Dir, "kv.coppice")
	t.Log(g.do(n, "fork", "data/kv", "--at", at, "--as", "lab/store", "--export", file))
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", st, err)
	}
	raw, err := os.ReadFile(file)
	must(t, err)
	bad := append([]byte(nil), raw...)
	bad[len(bad)/2] ^= 1
	newer := strings.Replace(string(raw), "coppice component 1\n", "coppice component 2\n", 1)
	other := filepath.Join(g.Dir, "lone")
	for name, c := range map[string][2]string{
		"damaged": {string(bad), "damaged"}, "cut": {string(raw[:len(raw)/2]), "cut off"}, "newer": {newer, "newer version"}, "foreign": {kvApp, "no exported component"},
	} {
		r := g.exec(g.Command("up", "--profile", "local", "--name", "lone", "--data", other, "--import", g.file(name, c[0])))
		if r.code != 1 || !strings.Contains(r.err, c[1]) || !strings.Contains(r.err, "\ntry: ") {
			t.Errorf("import of what is %s: status %d, %s", name, r.code, r.err)
		}
		if _, err := os.Stat(other); !os.IsNotExist(err) {
			t.Errorf("import of what is %s: it left a data folder", name)
		}
	}
	r := g.exec(g.Command("restore-cluster", file, "--data", other))
	if r.code != 1 || !strings.Contains(r.err, "no backup of a cluster") {
		t.Errorf("restore-cluster of a component: %d, %s", r.code, r.err)
	}

	lone := seedIn(t, clustertest.Config{Nodes: 1, Args: func(int) []string { return []string{"--import", file} }})
	must(t, lone.Up(t.Context()))
	l := lone.Nodes[0]
	lone.running(l, "lab/store-0", nil)
	lone.holds(l, "lab/store", "a", "first")
	lone.put(l, "lab/store", "a", "elsewhere")
	c := lone.keep(l, "lab/store")
	lone.put(l, "lab/store", "a", "later")
	lone.do(l, "restore", "lab/store", "--at", c)
	lone.holds(l, "lab/store", "a", "elsewhere")
	if _, err := l.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := l.Start(t.Context()); err == nil { // the same command line again
		t.Error("it was imported twice")
	}
	g.holds(n, "data/kv", "a", "second")
}
