package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// within bounds every wait: far more than anything takes on a quiet machine, so that a busy one fails no test.
const within = 60 * time.Second

// grove is a running cluster with what the tests do to it.
type grove struct {
	*cluster.Cluster
	t testing.TB
}

// plant starts a cluster of n nodes on loopback, which ends with the test. Nothing of it is left but, after a failure, the logs' ends.
func plant(t testing.TB, n int, args ...string) *grove {
	t.Helper()
	g := seed(t, n, args...)
	if err := g.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.waitVoters()
	return g
}

// seed prepares a cluster; no node runs yet.
func seed(t testing.TB, n int, args ...string) *grove {
	t.Helper()
	return seedIn(t, clustertest.Config{Nodes: n, Args: func(int) []string { return args }})
}

func seedIn(t testing.TB, cfg clustertest.Config) *grove {
	t.Helper()
	g := &grove{clustertest.New(t, cfg), t}
	t.Cleanup(func() {
		if t.Failed() {
			g.logEnds()
		}
	})
	return g
}

// logEnds shows what the nodes said last.
func (g *grove) logEnds() {
	for _, n := range g.Nodes {
		raw, err := os.ReadFile(n.Log())
		if err != nil {
			continue // it never ran
		}
		lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
		g.t.Logf("the log of %s, its last lines:\n  %s", n.Name, strings.Join(lines[max(0, len(lines)-40):], "\n  "))
	}
}

// must fails the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wait waits for a condition; f's error says why it does not hold yet.
func (g *grove) wait(what string, f func(ctx context.Context) error) {
	g.t.Helper()
	err := cluster.WaitFor(g.t.Context(), within, what, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		err := f(ctx)
		return err == nil, err
	})
	must(g.t, err)
}

// api is a client of a node's control API. The token is read anew: it changes with each start.
func (g *grove) api(n *cluster.Node) apiv1connect.ControlClient {
	g.t.Helper()
	c, err := n.Client()
	must(g.t, err)
	return c
}

// result is how a command ended.
type result struct {
	out, err string
	code     int
}

// run runs the command line against a node, as a user would.
func (g *grove) run(n *cluster.Node, args ...string) result {
	g.t.Helper()
	cmd := g.Command(append([]string{"--api", n.API}, args...)...)
	return g.exec(cmd)
}

func (g *grove) exec(cmd *exec.Cmd) result {
	g.t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	must(g.t, cmd.Start())
	kill := time.AfterFunc(2*within, func() { _ = cmd.Process.Kill() }) // it has ended or it is killed: both are fine
	err := cmd.Wait()
	if !kill.Stop() {
		g.t.Fatalf("%v does not end\n%s%s", cmd.Args, out.String(), errs.String())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		g.t.Fatal(err)
	}
	return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
}

// do runs a command that must succeed.
func (g *grove) do(n *cluster.Node, args ...string) string {
	g.t.Helper()
	r := g.run(n, args...)
	if r.code != 0 {
		g.t.Fatalf("coppice %s: status %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	return r.out
}

// refused runs a command that must fail with status 1 and a line that begins with coppice: and says all of these.
func (g *grove) refused(n *cluster.Node, says []string, args ...string) result {
	g.t.Helper()
	r := g.run(n, args...)
	if r.code != 1 || !strings.Contains("\n"+r.err, "\ncoppice: ") || strings.Contains(r.err, "goroutine ") {
		g.t.Fatalf("coppice %s: status %d, want 1 and a reason\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
	}
	for _, s := range says {
		if !strings.Contains(r.err, s) {
			g.t.Errorf("coppice %s: the error does not say %q:\n%s", strings.Join(args, " "), s, r.err)
		}
	}
	return r
}

// file writes a file into the cluster's folder and returns its path.
func (g *grove) file(name, content string) string {
	g.t.Helper()
	path := filepath.Join(g.Dir, name)
	must(g.t, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// push brings artifacts into the registry.
func (g *grove) push(n *cluster.Node, files ...string) {
	g.t.Helper()
	for _, f := range files {
		g.do(n, "registry", "push", f)
	}
}

// deploy makes a manifest the desired state and waits until all of it runs.
func (g *grove) deploy(n *cluster.Node, manifest string) {
	g.t.Helper()
	g.do(n, "deploy", "--wait", "--timeout", "60s", g.file("manifest.yaml", manifest))
}

// counterApp is an application of one counter, with its http interface at the gateway.
const counterApp = `application: tally
components:
  - name: counter
    artifact: counter
    durable: each-call
    expose: {http: /}
`

// kvApp is an application of one key-value store.
const kvApp = `application: data
components:
  - name: kv
    artifact: kv@1.0.0
    durable: each-call
`

// instance is one instance as a node lists it; nil when it does not.
func (g *grove) instance(ctx context.Context, n *cluster.Node, name string) (*apiv1.Instance, error) {
	c, err := n.Client()
	if err != nil {
		return nil, err
	}
	app, _, _ := strings.Cut(name, "/") // named, the cluster's own are listed too
	ps, err := c.Ps(ctx, &apiv1.PsRequest{Application: app})
	if err != nil {
		return nil, err
	}
	for _, in := range ps.GetInstances() {
		if in.GetInstance() == name {
			return in, nil
		}
	}
	return nil, fmt.Errorf("%s does not list %s", n.Name, name)
}

// running waits until a node says that the instance runs and ok holds for it; ok may be nil.
func (g *grove) running(n *cluster.Node, name string, ok func(in *apiv1.Instance) error) *apiv1.Instance {
	g.t.Helper()
	var in *apiv1.Instance
	g.wait(name+" to run, as "+n.Name+" sees it", func(ctx context.Context) (err error) {
		if in, err = g.instance(ctx, n, name); err != nil {
			return err
		}
		if in.GetState() != "running" {
			return fmt.Errorf("it is %s on %s: %s", in.GetState(), in.GetNode(), in.GetReason())
		}
		if ok != nil {
			return ok(in)
		}
		return nil
	})
	return in
}

// notOn wants an instance on another node.
func notOn(name string) func(*apiv1.Instance) error {
	return func(in *apiv1.Instance) error {
		if in.GetNode() == name {
			return fmt.Errorf("it is on %s", name)
		}
		return nil
	}
}

// protected wants at least that many copies of the last checkpoint and a successor: the loss of the owner can be survived.
func protected(replicas int) func(*apiv1.Instance) error {
	return func(in *apiv1.Instance) error {
		if len(in.GetReplicas()) < replicas || in.GetWouldRestartOn() == "" {
			return fmt.Errorf("its checkpoint is on %v and it would restart on %q", in.GetReplicas(), in.GetWouldRestartOn())
		}
		return nil
	}
}

// others are the running nodes but these.
func (g *grove) others(not ...*cluster.Node) []*cluster.Node {
	return slices.DeleteFunc(g.Alive(), func(n *cluster.Node) bool { return slices.Contains(not, n) })
}

// waitVoters waits until there are as many voters as there can be, 1, 2, 3 or 5, all alive, with a leader; two of them must be ready to go
// on alone.
func (g *grove) waitVoters() {
	g.t.Helper()
	alive := g.Alive()
	want := min((len(alive)-1)|1, 5)
	if len(alive) == 2 {
		want = 2
	}
	for _, n := range alive {
		g.wait(fmt.Sprintf("%d voters as %s sees it", want, n.Name), func(ctx context.Context) error {
			st, err := g.status(ctx, n)
			if err != nil {
				return err
			}
			a := st.GetArbiter()
			if len(a.GetVoters()) != want || a.GetLeader() == "" || int(st.GetNodes().GetAlive()) != len(alive) {
				return fmt.Errorf("voters %v, leader %q, %d alive", a.GetVoters(), a.GetLeader(), st.GetNodes().GetAlive())
			}
			if want == 2 && !a.GetPaired() {
				return fmt.Errorf("it could not go on alone; primary %q", a.GetPrimary())
			}
			for _, v := range a.GetVoters() {
				if node := g.Node(v); node == nil || !node.Running() {
					return fmt.Errorf("%s is a voter and does not run", v)
				}
			}
			return nil
		})
	}
}

func (g *grove) status(ctx context.Context, n *cluster.Node) (*apiv1.StatusResponse, error) {
	c, err := n.Client()
	if err != nil {
		return nil, err
	}
	return c.Status(ctx, &apiv1.StatusRequest{})
}

// event waits for an event below a channel for which ok holds, as a node knows it, and returns it.
func (g *grove) event(n *cluster.Node, channel, what string, ok func(ev *apiv1.Event) bool) *apiv1.Event {
	g.t.Helper()
	var found *apiv1.Event
	g.wait("the event: "+what, func(ctx context.Context) error {
		list, err := g.events(ctx, n, channel)
		if err != nil {
			return err
		}
		var types []string
		for _, ev := range list {
			if ok(ev) {
				found = ev
				return nil
			}
			types = append(types, ev.GetChannel()+" "+ev.GetType())
		}
		return fmt.Errorf("%s has %v", channel, types)
	})
	return found
}

// events lists what a node kept below a channel.
func (g *grove) events(ctx context.Context, n *cluster.Node, channel string) ([]*apiv1.Event, error) {
	c, err := n.Client()
	if err != nil {
		return nil, err
	}
	stream, err := c.Events(ctx, &apiv1.EventsRequest{Channel: channel, Limit: 10_000})
	if err != nil {
		return nil, err
	}
	var out []*apiv1.Event
	for stream.Receive() {
		out = append(out, stream.Msg())
	}
	return out, errors.Join(stream.Err(), stream.Close())
}

// query runs SQL at a node and returns the rows as objects.
func (g *grove) query(n *cluster.Node, sql string) []map[string]any {
	g.t.Helper()
	var rows []map[string]any
	must(g.t, json.Unmarshal([]byte(g.do(n, "query", "-o", "json", sql)), &rows))
	return rows
}

// says waits until a node's log has a line with all of these words, and returns how many such lines there are then.
func (g *grove) says(n *cluster.Node, words ...string) int {
	g.t.Helper()
	count := 0
	g.wait(fmt.Sprintf("%s to log %q", n.Name, words), func(context.Context) error {
		count = g.logged(n, words...)
		if count == 0 {
			return errors.New("it has not")
		}
		return nil
	})
	return count
}

// logged counts the lines of a node's log that have all of these words.
func (g *grove) logged(n *cluster.Node, words ...string) int {
	g.t.Helper()
	raw, err := os.ReadFile(n.Log())
	must(g.t, err)
	count := 0
	for line := range strings.Lines(string(raw)) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			count++
		}
	}
	return count
}

// killProcess kills the node's own process and nothing else, as the kernel does when memory is short: its components are orphans now.
func (g *grove) killProcess(n *cluster.Node) {
	g.t.Helper()
	must(g.t, syscall.Kill(n.PID(), syscall.SIGKILL))
	g.wait(n.Name+" to be gone", func(context.Context) error {
		if n.Running() {
			return errors.New("it still runs")
		}
		return nil
	})
}

// count reads the counter through a node's gateway.
func count(ctx context.Context, n *cluster.Node) (value, epoch string, err error) {
	return httpCount(ctx, http.MethodGet, n, "")
}

// bump adds one to the counter through a node's gateway, with an idempotency key.
func bump(ctx context.Context, n *cluster.Node, key string) (value, epoch string, err error) {
	return httpCount(ctx, http.MethodPost, n, key)
}

func httpCount(ctx context.Context, method string, n *cluster.Node, key string) (value, epoch string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, n.HTTP+"/app/tally/", nil)
	if err != nil {
		return "", "", err
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(resp.Body); err != nil {
		return "", "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", "", fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(body.String()))
	}
	return strings.TrimSpace(body.String()), resp.Header.Get("X-Epoch"), nil
}

// alive says whether a process runs; one that has ended and that nobody has asked for its status does not.
func alive(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	return len(fields) > 0 && fields[0] != "Z"
}
