package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// both is an application of a counter beside a key-value store.
const both = `application: tally
components:
  - name: counter
    artifact: counter
    durable: each-call
    expose: {http: /}
  - name: kv
    artifact: kv@1.0.0
    durable: each-call
`

// wipe kills nodes and removes all that they kept.
func (g *grove) wipe(nodes ...*cluster.Node) {
	g.t.Helper()
	must(g.t, cluster.Each(nodes, func(n *cluster.Node) error {
		if _, err := n.Kill(); err != nil {
			return err
		}
		return os.RemoveAll(n.Data)
	}))
}

// join starts nodes with a token of another.
func (g *grove) join(via *cluster.Node, nodes ...*cluster.Node) {
	g.t.Helper()
	var tok *apiv1.TokenResponse
	g.wait(via.Name+" to make a token", func(ctx context.Context) (err error) {
		tok, err = g.api(via).Token(ctx, &apiv1.TokenRequest{})
		return err
	})
	must(g.t, cluster.Each(nodes, func(n *cluster.Node) error {
		if err := os.MkdirAll(n.Data, 0o700); err != nil {
			return err
		}
		return n.Start(g.t.Context(), "--join", tok.GetToken())
	}))
}

// value reads a key of the key-value store; "" when it is not there.
func (g *grove) value(via *cluster.Node, component, key string) string {
	g.t.Helper()
	r := g.run(via, "call", component, "Get", fmt.Sprintf(`{"key":%q}`, key))
	if r.code != 0 {
		if strings.Contains(r.err, "no key") {
			return ""
		}
		g.t.Fatalf("read %s of %s at %s: %s", key, component, via.Name, r.err)
	}
	var x struct{ Value string }
	must(g.t, json.Unmarshal([]byte(r.out), &x))
	return x.Value
}

// A backup is made under load; then every node is killed and every data folder removed. A new node is made from the file, others join it,
// and the components go on from the state of the backup: with all that was answered before it began, and nothing that began after it was
// made. What is handed to the outside world is above all that was handed out before.
func TestRestoreClusterFromABackup(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1, n2 := g.Nodes[0], g.Nodes[1]
	g.push(n1, component(t, "counter", "1.0.0"), component(t, "kv", "1.0.0"))
	g.deploy(n1, both)
	g.counted(n2, 7)
	p := g.press("tally/kv", g.Nodes, 100, 2*time.Second)
	p.answered(30)
	before := g.running(n1, "tally/kv-0", protected(3))
	g.do(n2, "call", "tally/kv", "Put", `{"key":"just","value":"before"}`)

	file := filepath.Join(g.Dir, "cluster.backup")
	for _, n := range []*cluster.Node{n2, n1} { // the second takes the place of the first
		var sum struct {
			Cluster                              string
			Incarnation, Bytes                   uint64
			Applications, Artifacts, Checkpoints int
			Omitted                              []string
		}
		must(t, json.Unmarshal([]byte(g.do(n, "backup", file, "-o", "json")), &sum))
		if st, err := os.Stat(file); err != nil || uint64(st.Size()) != sum.Bytes || st.Mode().Perm() != 0o600 {
			t.Fatalf("the file of %d bytes: %v, %v", sum.Bytes, st, err)
		}
		if sum.Applications != 1 || sum.Artifacts != 2 || sum.Checkpoints != 2 || len(sum.Omitted) != 0 || sum.Incarnation != 1 {
			t.Errorf("the backup by %s: %+v", n.Name, sum)
		}
	}
	g.do(n2, "call", "tally/kv", "Put", `{"key":"just","value":"after"}`)
	g.do(n2, "call", "tally/kv", "Put", `{"key":"never","value":"after"}`)
	g.counted(n2, 9)
	p.answered(30)
	must(t, p.Pause(t.Context()))

	// A folder in use and a file that is not whole are refused, and nothing is changed.
	restore := func(file string, n *cluster.Node) result {
		return g.exec(g.Command("restore-cluster", file, "--data", n.Data, "--name", n.Name))
	}
	raw, err := os.ReadFile(file)
	must(t, err)
	raw[len(raw)/2] ^= 1
	g.file("damaged", string(raw))
	g.file("cut", string(raw[:len(raw)/3]))
	g.wipe(n1)
	for name, says := range map[string]string{"cut": "cut off", "damaged": "damaged", "run": "no backup", "nothing": "no such file"} {
		if r := restore(filepath.Join(g.Dir, name), n1); r.code != 1 || !strings.Contains(r.err, says) || !strings.Contains(r.err, "\ntry: ") {
			t.Errorf("from %s: status %d, %s", name, r.code, r.err)
		}
		if _, err := os.Stat(n1.Data); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("from %s: it left a folder", name)
		}
	}
	if r := restore(file, n2); r.code != 1 || !strings.Contains(r.err, "in use") || !strings.Contains(r.err, "\ntry: ") {
		t.Errorf("over a folder in use: status %d, %s", r.code, r.err)
	}

	g.wipe(g.Alive()...)
	r := restore(file, n1)
	if r.code != 0 {
		t.Fatalf("restore-cluster: status %d, %s", r.code, r.err)
	}
	t.Log(r.out)
	must(t, n1.Start(t.Context()))
	g.join(n1, g.Nodes[1:]...)
	g.waitVoters()
	for _, n := range g.Nodes {
		g.shows(n, 7)
		if v := g.value(n, "tally/kv", "just"); v != "before" {
			t.Errorf("%s has %q", n.Name, v)
		}
	}
	if v := g.value(n1, "tally/kv", "never"); v != "" {
		t.Errorf("what began after the backup is there: %q", v)
	}
	now := g.running(n1, "tally/kv-0", protected(3))
	if a := g.arbiter(n1); a.GetIncarnation() <= 1 || now.GetEpoch() <= before.GetEpoch() {
		t.Errorf("epoch %d of incarnation %d after epoch %d of incarnation 1", now.GetEpoch(), a.GetIncarnation(), before.GetEpoch())
	}
	g.counted(n2, 8) // one more than the backup knew of
	g.shows(n1, 8)

	// A second restoring of the same file is another life of it: nothing of the first one's tokens comes again.
	was := g.arbiter(n1).GetIncarnation()
	g.wipe(g.Alive()...)
	if r := restore(file, n1); r.code != 0 {
		t.Fatalf("the second time: %s", r.err)
	}
	must(t, n1.Start(t.Context()))
	g.shows(n1, 7)
	if a := g.arbiter(n1); a.GetIncarnation() <= was {
		t.Errorf("incarnation %d after %d", a.GetIncarnation(), was)
	}
}
