package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// example is a manifest of the documentation's.
func example(t *testing.T, name string) string {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("..", "..", "plugins", "exec", "testdata", name))
	must(t, err)
	return string(raw)
}

// listens waits until the instance runs and tells where its program listens.
func (g *grove) listens(n *cluster.Node, name string, ok func(in *apiv1.Instance) error) *apiv1.Instance {
	g.t.Helper()
	return g.running(n, name, func(in *apiv1.Instance) error {
		if in.GetListen() == "" {
			return errors.New("it does not tell yet where it listens")
		}
		if ok != nil {
			return ok(in)
		}
		return nil
	})
}

// forward has a node listen for a program's port as long as the test runs, and returns where.
func (g *grove) forward(n *cluster.Node, component string) string {
	g.t.Helper()
	ctx, cancel := context.WithCancel(g.t.Context())
	s, err := g.api(n).Forward(ctx, &apiv1.ForwardRequest{Component: component})
	must(g.t, err)
	if !s.Receive() {
		g.t.Fatalf("forward %s on %s: %v", component, n.Name, s.Err())
	}
	g.t.Cleanup(func() {
		cancel()
		if err := s.Close(); err != nil && !errors.Is(err, context.Canceled) {
			g.t.Log(err) // the node may be gone
		}
	})
	return s.Msg().GetListen()
}

// redis sends commands to a Redis server and returns what it answers, a line each; of what it answers in bulk the content.
func redis(ctx context.Context, addr string, commands ...string) (out []string, err error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close() //nolint:errcheck // everything was read
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, err
	}
	r := bufio.NewReader(c)
	for _, command := range commands {
		if _, err := fmt.Fprintf(c, "%s\r\n", command); err != nil {
			return nil, err
		}
		line, err := r.ReadString('\n')
		if err != nil {
			return nil, err
		}
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "-") {
			return nil, fmt.Errorf("%s: %s", command, line)
		}
		if strings.HasPrefix(line, "$") && line != "$-1" {
			if line, err = r.ReadString('\n'); err != nil {
				return nil, err
			}
			line = strings.TrimSpace(line)
		}
		out = append(out, line)
	}
	return out, nil
}

// closed waits until nobody listens there any more.
func (g *grove) closed(addr string) {
	g.t.Helper()
	g.wait("the program at "+addr+" to be gone", func(ctx context.Context) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return nil //nolint:nilerr // that is it
		}
		return errors.Join(errors.New("it still listens"), c.Close())
	})
}

// Redis, as Debian ships it, deployed by the manifest of the documentation: its machine dies by kill -9, and a neighbour's Redis has every key of the last
// checkpoint. The one that was left behind ends with its lease.
func TestRedisSurvivesItsMachine(t *testing.T) {
	for _, name := range []string{"redis-server", "redis-cli"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name + " is not installed: apt-get install redis-server")
		}
	}
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.deploy(n1, example(t, "redis.yaml"))
	in := g.listens(n1, "cache/redis-0", nil)
	if in.GetDurable() != "5s" || in.GetGuarantee() != "exactly-one" {
		t.Errorf("durable %s, guarantee %s; want the defaults of a program with a state, 5s and exactly-one", in.GetDurable(), in.GetGuarantee())
	}
	const keys = 500
	var commands []string
	for i := range keys {
		commands = append(commands, fmt.Sprintf("SET key:%d value:%d", i, i*i))
	}
	_, err := redis(t.Context(), in.GetListen(), append(commands, "INCR hits", "LPUSH list a", "LPUSH list b")...)
	must(t, err)
	g.do(n1, "checkpoint", "cache/redis-0")
	in = g.listens(n1, "cache/redis-0", protected(3))
	owner := g.Node(in.GetNode())
	survivor := g.others(owner)[0]
	port := g.forward(survivor, "cache/redis-0")
	got, err := redis(t.Context(), port, "GET key:7")
	if err != nil || got[0] != "value:49" {
		t.Errorf("through %s, which does not run it: %v, %v", survivor.Name, got, err)
	}
	at, err := owner.Kill()
	must(t, err)

	after := g.listens(survivor, "cache/redis-0", notOn(owner.Name))
	t.Logf("%s runs it %s after %s was killed", after.GetNode(), time.Since(at).Round(time.Millisecond), owner.Name)
	commands = commands[:0]
	for i := range keys {
		commands = append(commands, fmt.Sprintf("GET key:%d", i))
	}
	g.wait("it to have read its file", func(ctx context.Context) error {
		_, err := redis(ctx, port, "GET hits")
		return err
	})
	got, err = redis(t.Context(), port, append(commands, "GET hits", "LLEN list")...)
	must(t, err)
	for i := range keys {
		if want := fmt.Sprintf("value:%d", i*i); got[i] != want {
			t.Fatalf("key:%d is %q on the neighbour, want %q", i, got[i], want)
		}
	}
	if got[keys] != "1" || got[keys+1] != ":2" {
		t.Errorf("hits %s, list %s; want 1 and :2", got[keys], got[keys+1])
	}
	if in.GetListen() != after.GetListen() {
		g.closed(in.GetListen())
	}
	// A second one beside, with the keys of this one.
	id := g.keep(survivor, "cache/redis-0")
	g.do(survivor, "fork", "cache/redis", "--at", id, "--as", "copy/redis")
	fork := g.listens(survivor, "copy/redis-0", nil)
	g.wait("the fork to have the keys", func(ctx context.Context) error {
		got, err := redis(ctx, fork.GetListen(), "GET key:499")
		if err == nil && got[0] != "value:249001" {
			t.Errorf("the fork answers %v", got)
		}
		return err
	})
	g.refused(survivor, []string{"installed on the nodes"}, "fork", "cache/redis", "--at", id, "--export", g.file("redis.coppice", ""))
}

// sqlited calls the SQLite server.
func sqlited(ctx context.Context, method, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return "", err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer r.Body.Close() //nolint:errcheck // it is read to its end
	body, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, url, r.Status, body)
	}
	return string(body), err
}

// notes is a cluster that runs the SQLite server from the registry.
func notes(t *testing.T, manifest string) (g *grove, in *apiv1.Instance) {
	g = plant(t, 3)
	must(t, os.Symlink(testProgram(t, "sqlited", ""), filepath.Join(g.Dir, "sqlited")))
	g.deploy(g.Nodes[0], manifest)
	return g, g.listens(g.Nodes[0], "notes/db-0", nil)
}

func fill(t *testing.T, url string, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		_, err := sqlited(t.Context(), http.MethodPost, fmt.Sprintf("%s/put?k=k%d&v=v%d", url, i, i))
		must(t, err)
	}
}

func counted(t *testing.T, url string, want int) {
	t.Helper()
	got, err := sqlited(t.Context(), http.MethodGet, url+"/count")
	must(t, err)
	if got != fmt.Sprintf("%d ok", want) {
		t.Errorf("the database says %q, want %d keys and that it is whole", got, want)
	}
}

// A server with a SQLite database, pushed and deployed by a manifest of a few lines: its machine dies by kill -9 while it writes, and a neighbour's has every
// row that is older than the interval of its checkpoints, and a whole database. It answers through every node's gateway.
func TestSQLiteServerSurvivesItsMachine(t *testing.T) {
	t.Parallel() // it waits most of the time
	g, in := notes(t, example(t, "sqlite.yaml")+"    durable: 500ms\n")
	fill(t, "http://"+in.GetListen(), 0, 200)
	for _, n := range g.Nodes {
		counted(t, n.HTTP+"/app/notes", 200)
	}
	// Nobody asks for a checkpoint. While something goes on being written one follows the other; the second from now on has begun after the rows were there.
	in = g.listens(g.Nodes[0], "notes/db-0", protected(3))
	begun, rows := in.GetCheckpointSeq(), 200
	in = g.listens(g.Nodes[0], "notes/db-0", func(in *apiv1.Instance) error {
		fill(t, "http://"+in.GetListen(), rows, rows+1)
		rows++
		if in.GetCheckpointSeq() < begun+2 {
			return fmt.Errorf("checkpoint %d, it was %d", in.GetCheckpointSeq(), begun)
		}
		return protected(2)(in) // the third copy of each comes when the next is under way
	})
	owner := g.Node(in.GetNode())
	fill(t, "http://"+in.GetListen(), rows, rows+20) // may be lost, or not; what is torn must not be
	_, err := owner.Kill()
	must(t, err)
	survivor := g.others(owner)[0]
	after := g.listens(survivor, "notes/db-0", notOn(owner.Name))
	for i := range 200 {
		got, err := sqlited(t.Context(), http.MethodGet, fmt.Sprintf("http://%s/get?k=k%d", after.GetListen(), i))
		if err != nil || got != fmt.Sprintf("v%d", i) {
			t.Fatalf("row k%d is %q on the neighbour: %v", i, got, err)
		}
	}
	got, err := sqlited(t.Context(), http.MethodGet, survivor.HTTP+"/app/notes/count")
	if err != nil || !strings.HasSuffix(got, " ok") {
		t.Errorf("the database on the neighbour: %q, %v", got, err)
	}
	// A copy of it beside, from a checkpoint.
	id := g.keep(survivor, "notes/db-0")
	g.do(survivor, "fork", "notes/db", "--at", id, "--as", "copy/db")
	fork := g.listens(survivor, "copy/db-0", nil)
	if again, err := sqlited(t.Context(), http.MethodGet, "http://"+fork.GetListen()+"/count"); err != nil || again != got {
		t.Errorf("the fork has %q, want %q: %v", again, got, err)
	}
	t.Logf("of %d rows, the last 20 of them right before the end, the neighbour has %s", rows+20, got)
}

// A program with a port of its own over its life: moved, started anew with another command line, crashed, stopped and started, taken back to an earlier
// checkpoint. It keeps its rows and its port, and its end is told with its last words.
func TestProgramOverItsLife(t *testing.T) {
	t.Parallel() // it waits most of the time
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	port := l.Addr().(*net.TCPAddr).Port //nolint:forcetypeassert // of a TCP listener
	must(t, l.Close())
	manifest := strings.NewReplacer("port: 0", fmt.Sprintf("port: %d", port), "notes", "diary").Replace(example(t, "sqlite.yaml"))
	g := plant(t, 3)
	n1, url := g.Nodes[0], fmt.Sprintf("http://127.0.0.1:%d", port)
	must(t, os.Symlink(testProgram(t, "sqlited", ""), filepath.Join(g.Dir, "sqlited")))
	g.deploy(n1, manifest)
	in := g.listens(n1, "diary/db-0", nil)
	fill(t, url, 0, 50)

	// Moved: what it wrote last is with it, though no checkpoint was asked for.
	to := g.others(g.Node(in.GetNode()))[0]
	g.do(n1, "move", "diary/db-0", to.Name)
	g.listens(n1, "diary/db-0", func(in *apiv1.Instance) error {
		if in.GetNode() != to.Name {
			return fmt.Errorf("it is on %s", in.GetNode())
		}
		return nil
	})
	counted(t, url, 50)

	// Another command line: the program is started anew with its rows.
	fill(t, url, 50, 60)
	g.deploy(n1, strings.Replace(manifest, "run: {", `run: {start: "{program} -db {state_dir}/main.db -name other", `, 1))
	g.wait("the other command line", func(ctx context.Context) error {
		got, err := sqlited(ctx, http.MethodGet, url+"/name")
		if err == nil && got != "other" {
			err = fmt.Errorf("it calls itself %q", got)
		}
		return err
	})
	counted(t, url, 60)

	// It ends of itself: what it had written up to then is saved, and it is started again, on this node.
	g.do(n1, "checkpoint", "diary/db-0") // it is started by now
	fill(t, url, 60, 70)
	_, _ = sqlited(t.Context(), http.MethodPost, url+"/crash") // no answer comes
	ev := g.event(n1, "/apps/diary", "the crash", func(ev *apiv1.Event) bool { return ev.GetType() == "crashed" })
	if !strings.Contains(ev.GetCause(), "exit status 3") || !strings.Contains(ev.GetCause(), "told to crash") {
		t.Errorf("its end is told as %q, want its status and its last words", ev.GetCause())
	}
	g.wait("it to listen again", func(ctx context.Context) error {
		_, err := sqlited(ctx, http.MethodGet, url+"/healthz")
		return err
	})
	counted(t, url, 70)

	// Back to an earlier checkpoint, and to before that.
	id := g.keep(n1, "diary/db-0")
	fill(t, url, 70, 80)
	g.running(n1, "diary/db-0", nil)
	g.do(n1, "restore", "diary/db-0", "--at", id)
	g.wait("the rows of the checkpoint", func(ctx context.Context) error {
		got, err := sqlited(ctx, http.MethodGet, url+"/count")
		if err == nil && got == "80 ok" {
			err = errors.New("it has those written since")
		}
		return err
	})
	g.do(n1, "undo", "diary/db-0")
	g.wait("all rows again", func(ctx context.Context) error {
		got, err := sqlited(ctx, http.MethodGet, url+"/count")
		if err == nil && got != "80 ok" {
			err = errors.New(got)
		}
		return err
	})

	// Stopped, its port is free; started, its rows are there.
	g.do(n1, "stop", "diary/db")
	g.closed(fmt.Sprintf("127.0.0.1:%d", port))
	g.do(n1, "start", "diary/db")
	g.listens(n1, "diary/db-0", nil)
	counted(t, url, 80)

	if out := g.do(n1, "inspect", "diary/db"); !strings.Contains(out, fmt.Sprintf("listens on  127.0.0.1:%d", port)) || !strings.Contains(out, "program") {
		t.Errorf("inspect does not tell where it listens, or what it is:\n%s", out)
	}
	g.refused(n1, []string{"found each-call with run"}, "deploy", g.file("each.yaml", manifest+"    durable: each-call\n"))
	g.refused(n1, []string{"is a program", "run"}, "deploy", g.file("norun.yaml", "application: x\ncomponents:\n  - {name: a, artifact: ./sqlited}\n"))
}
