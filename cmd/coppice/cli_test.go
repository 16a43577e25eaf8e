package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

var update = flag.Bool("update", false, "write the golden files and docs/commands.md")

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		os.Exit(start())
	}
	time.Local = time.UTC
	os.Exit(m.Run())
}

// fixture is a machine with one node of a fake cluster.
type fixture struct {
	t    *testing.T
	fake *fake
	data string
	addr string
	env  map[string]string
	in   string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	return fixtureWith(t, &fake{pushed: map[string][]byte{}})
}

func fixtureWith(t *testing.T, ctl *fake) *fixture {
	t.Helper()
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	f := &fixture{t: t, fake: ctl, env: map[string]string{}}
	f.data, f.addr = f.node("n1", f.fake)
	return f
}

// node runs the control API of a node and announces it.
func (f *fixture) node(name string, ctl *fake) (data, addr string) {
	f.t.Helper()
	data = f.t.TempDir()
	tok, err := api.EnsureToken(data)
	if err != nil {
		f.t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	srv, err := api.NewServer(api.Config{Control: ctl, Token: tok, Log: log})
	if err != nil {
		f.t.Fatal(err)
	}
	ln, addr, err := api.Listen(data, "")
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- api.Serve(ctx, ln, srv.Handler(), log) }()
	unregister, err := api.Register(api.Entry{Name: name, API: addr, Data: data})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
		if err := unregister(); err != nil {
			f.t.Error(err)
		}
	})
	return data, addr
}

func (f *fixture) cli() (c *cli, out, errs *bytes.Buffer) {
	out, errs = &bytes.Buffer{}, &bytes.Buffer{}
	return &cli{
		in: strings.NewReader(f.in), out: out, err: errs, now: func() time.Time { return epoch },
		getenv: func(k string) string { return f.env[k] },
	}, out, errs
}

func (f *fixture) run(args ...string) (code int, out, errs string) {
	c, o, e := f.cli()
	code = c.run(context.Background(), args)
	return code, o.String(), e.String()
}

// golden compares with testdata/NAME.txt.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it):\n got:\n%s\nwant:\n%s", path, got, want)
	}
}

// What the main commands print, for people and for scripts, with their exit status.
func TestWhatCommandsPrint(t *testing.T) {
	for name, lines := range map[string][]string{
		"nodes":    {"nodes", "nodes --wide", "nodes -o json"},
		"status":   {"status", "status -o json"},
		"doctor":   {"doctor", "doctor -o json"},
		"token":    {"token", "token --ttl 5m --uses 3 -o json"},
		"drain":    {"drain n2", "drain n2 -o json"},
		"drill":    {"drill n2", "drill n2 --really", "drill --zone attic", "drill n2 -o json", "drill"},
		"down":     {"down", "down --all", "down --all -o json"},
		"recover":  {"recover", "recover --yes", "recover --yes --adopt-newer=false -o json", "recover -o json", "recover --from n2 --yes", "recover --from n4 --yes", "recover --from n4"},
		"registry": {"registry list", "registry list -o json"},
		"apps":     {"apps", "apps -o json"},
		"ps":       {"ps", "ps shop -o json"},
		"inspect":  {"inspect shop/store", "inspect shop/store -o json", "inspect web"},
		"attr":     {"attr shop/store capacity=5000 --dry-run", "attr shop/store greeting=hello -o json"},
		"replace":  {"swap shop/store@1.3.0", "swap shop/store@1.3.0 -o json", "freeze shop/store", "checkpoint shop/store", "checkpoint shop/store -o json"},
		"history":  {"checkpoints shop/store", "checkpoints shop/store -o json", "restore shop/store --at c3", "restore shop/store --at shop/store-0@branch-n2-1", "restore shop/store", "restore shop/store --at 25:61"},
		"call":     {"call store Get", `call store Get {"key":"a"} -o json`, "call store Get {broken"},
		"why":      {"why shop/store", "why shop/store -o json"},
		"logs":     {"logs shop/store", "logs shop/store -o json"},
		"events":   {"events /apps/shop/", "events -o json"},
		"query":    {"query select", "query select --meta", "query select -o json", "query select --meta -o json", "query nonsense"},
		"dht":      {"dht closest /system/placement", "dht get /kb/ckpt/shop/store-0", "dht get /kb/nothing", "dht closest /x -o json"},
		"errors":   {"revoke n2", "undo shop/store", "nodez", "nodes a b", "registry frob", "nodes -o xml", "nodes --frob", "swap shop/store", "attr x novalue", "help frob"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			var b strings.Builder
			for _, line := range lines {
				code, out, errs := f.run(strings.Fields(line)...)
				b.WriteString("$ coppice " + line + "\n" + out)
				if errs != "" {
					b.WriteString("--- stderr\n" + errs)
				}
				b.WriteString("--- exit " + string(rune('0'+code)) + "\n\n")
				if strings.HasSuffix(line, "-o json") && out != "" {
					dec := json.NewDecoder(strings.NewReader(out))
					var v any
					if err := dec.Decode(&v); err != nil {
						t.Errorf("%s: %v", line, err)
					}
				}
			}
			golden(t, name, b.String())
		})
	}
}

// The fields that scripts rely on (the table of the contract).
func TestJSONShapesOfTheContract(t *testing.T) {
	f := newFixture(t)
	for line, fields := range map[string]string{
		"nodes":                 "name id state addrs rtt_ms connection labels version since",
		"ps":                    "application component instance node artifact version state reason epoch uptime_ms checkpoint_age_ms checkpoint_seq replicas would_restart_on predicted_restart_ms",
		"status":                "cluster nodes arbiter components unsafe",
		"query select --meta":   "rows as_of max_age_ms nodes_asked nodes_answered",
		"checkpoint shop/store": "component seq bytes replicas took_ms",
		"swap shop/store@2":     "component from to pause_ms bytes calls_held took_ms",
		"plan -":                "feasible objective bound components",
		"token":                 "token expires",
	} {
		f.in = "application: shop\ncomponents:\n  - {name: store, artifact: kv}\n"
		_, out, errs := f.run(append(strings.Fields(line), "-o", "json")...)
		raw := json.RawMessage(out)
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) == nil && len(list) > 0 {
			raw = list[0]
		}
		var got map[string]json.RawMessage
		if err := json.Unmarshal(raw, &got); err != nil {
			t.Errorf("%s: %v\n%s%s", line, err, out, errs)
			continue
		}
		for field := range strings.FieldsSeq(fields) {
			if _, ok := got[field]; !ok {
				t.Errorf("%s: no field %s", line, field)
			}
		}
	}
}

func TestEveryCommandIsDocumented(t *testing.T) {
	c, _, _ := newFixture(t).cli()
	root := c.root()
	var walk func(cmd *cobra.Command)
	n := 0
	walk = func(cmd *cobra.Command) {
		n++
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: Short is %q, want a sentence without full stop", cmd.CommandPath(), cmd.Short)
		}
		if !strings.Contains(cmd.Example, "coppice ") {
			t.Errorf("%s: no example", cmd.CommandPath())
		}
		for _, sub := range cmd.Commands() {
			if cmd == root && sub.GroupID == "" && !sub.Hidden {
				t.Errorf("%s: in no group of the help page", sub.Name())
			}
			walk(sub)
		}
	}
	walk(root)
	if n < 40 {
		t.Errorf("only %d commands were seen", n)
	}
}

func TestReferenceIsCurrent(t *testing.T) {
	c, _, _ := newFixture(t).cli()
	root := c.root()
	root.InitDefaultHelpCmd()
	got := commandReference(root)
	path := filepath.Join("..", "..", "docs", "commands.md")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("docs/commands.md is not current: go test ./cmd/coppice -run Reference -update")
	}
	var b bytes.Buffer
	c.out = &b
	if code := c.run(context.Background(), []string{"__docs", filepath.Join(t.TempDir(), "commands.md")}); code != 0 {
		t.Errorf("__docs ended with %d", code)
	}
}

func TestWhichNodeIsAsked(t *testing.T) {
	f := newFixture(t)
	other := &fake{}
	data2, addr2 := f.node("n2", other)
	code, _, errs := f.run("token")
	if code != exitFailed || !strings.Contains(errs, "2 nodes run on this machine: n1 (unix://") || !strings.Contains(errs, "try: coppice --api n1 token") {
		t.Errorf("several nodes: %d %s", code, errs)
	}
	for _, args := range [][]string{{"--api", "n2", "token"}, {"--api", addr2, "token"}, {"--api", addr2, "--token", "@" + data2 + "/api.token", "token"}} {
		other.asked = nil
		if code, _, errs := f.run(args...); code != 0 || other.asked == nil {
			t.Errorf("%v: %d %s", args, code, errs)
		}
	}
	f.env["COPPICE_API"] = "n2"
	other.asked = nil
	if code, _, errs := f.run("token"); code != 0 || other.asked == nil {
		t.Errorf("$COPPICE_API: %d %s", code, errs)
	}
	if code, _, errs := f.run("--api", "n1", "token"); code != 0 || f.fake.asked == nil {
		t.Errorf("--api over $COPPICE_API: %d %s", code, errs)
	}
	if code, _, errs := f.run("--api", "n9", "token"); code != exitFailed || !strings.Contains(errs, "here run n1, n2") {
		t.Errorf("an unknown name: %d %s", code, errs)
	}
}

func TestNobodyAnswers(t *testing.T) {
	f := newFixture(t)
	dead := t.TempDir()
	if _, err := api.EnsureToken(dead); err != nil {
		t.Fatal(err)
	}
	code, out, errs := f.run("--api", "unix://"+dead+"/api.sock", "nodes")
	if code != exitFailed || out != "" || !strings.Contains(errs, "coppice: nodes: no node answers at unix://") || !strings.Contains(errs, "try: coppice up") {
		t.Errorf("%d %q %q", code, out, errs)
	}
	code, _, errs = f.run("--api", f.addr, "--token", strings.Repeat("w", 40), "nodes")
	if code != exitFailed || !strings.Contains(errs, "the token is not this node's") {
		t.Errorf("a wrong token: %d %s", code, errs)
	}
	f.fake.hang = true
	c, _, e := f.cli()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if code := c.run(ctx, []string{"nodes"}); code != exitFailed || !strings.Contains(e.String(), "in time") {
		t.Errorf("a node that hangs: %d %s", code, e)
	}
}

func TestErrorsAreOneLine(t *testing.T) {
	f := newFixture(t)
	for _, args := range [][]string{{"revoke", "n2"}, {"undo", "a\nb"}, {"query", "nonsense\nnonsense"}, {"frob\nfrob"}} {
		code, out, errs := f.run(args...)
		lines := strings.Split(strings.TrimSuffix(errs, "\n"), "\n")
		ok := len(lines) == 1 || len(lines) == 2 && strings.HasPrefix(lines[1], "try: ")
		if code == 0 || out != "" || !ok || !strings.HasPrefix(lines[0], "coppice: ") {
			t.Errorf("%q: %d %q %q", args, code, out, errs)
		}
	}
}

func TestFollowEndsQuietlyWhenInterrupted(t *testing.T) {
	f := newFixture(t)
	c, out, errs := f.cli()
	ctx, cancel := context.WithCancel(context.Background())
	c.out = writerFunc(func(b []byte) (int, error) { cancel(); return out.Write(b) }) // after the first event
	if code := c.run(ctx, []string{"events", "-f"}); code != exitDone || errs.Len() > 0 || !strings.Contains(out.String(), "failover") {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestColourOnlyOnATerminal(t *testing.T) {
	f := newFixture(t)
	for _, x := range []struct {
		tty     bool
		noColor string
		want    bool
	}{{false, "", false}, {true, "", true}, {true, "1", false}} {
		f.env["NO_COLOR"] = x.noColor
		c, out, _ := f.cli()
		c.outTTY = x.tty
		c.run(context.Background(), []string{"nodes"})
		if got := strings.Contains(out.String(), "\x1b["); got != x.want {
			t.Errorf("%+v: coloured is %v", x, got)
		}
		plain := regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString(out.String(), "")
		if lines := strings.Split(plain, "\n"); strings.Index(lines[0], "STATE") != strings.Index(lines[1], "alive") {
			t.Errorf("%+v: columns are not aligned:\n%s", x, plain)
		}
	}
	c, out, _ := f.cli()
	c.outTTY = true
	c.run(context.Background(), []string{"logs", "shop/store"})
	if strings.Contains(out.String(), "\x1b[31mred") {
		t.Error("a component's output reached the terminal raw")
	}
}

func TestCompletionAsksTheCluster(t *testing.T) {
	f := newFixture(t)
	for _, x := range []struct{ args, want string }{
		{"drain ", "n2\tsuspect"},
		{"move shop/store ", "n1\talive"},
		{"inspect ", "shop/store-0\trunning on n1"},
		{"remove ", "shop\tdegraded"},
		{"call shop/store ", "coppice.kv.v1.Kv/Put"},
		{"registry show ", "kv@1.2.0"},
		{"nodes --api ", "n1"},
	} {
		_, out, _ := f.run(append([]string{"__complete"}, strings.Split(x.args, " ")...)...)
		if !strings.Contains(out, x.want) {
			t.Errorf("%q: %q is not offered in %q", x.args, x.want, out)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if code, out, errs := f.run("completion", shell); code != 0 || !strings.Contains(out, "coppice") {
			t.Errorf("%s: %d %s", shell, code, errs)
		}
	}
	if code, _, _ := f.run("completion", "tcsh"); code != exitUsage {
		t.Errorf("an unknown shell: %d", code)
	}
}

func TestRequestsCarryWhatWasTyped(t *testing.T) {
	f := newFixture(t)
	f.in = `{"n": 1}`
	if code, out, errs := f.run("call", "counter", "Add", "-", "--key", "k1", "--timeout", "3s"); code != 0 || out != "{\"value\":\"9007199254740993\"}\n" {
		t.Fatalf("%d %q %s", code, out, errs)
	}
	if r, ok := f.fake.asked.(*apiv1.CallRequest); !ok || r.Json != `{"n": 1}` || r.IdempotencyKey != "k1" || r.TimeoutMs != 3000 || r.Component != "counter" || r.Method != "Add" {
		t.Errorf("call: %v", f.fake.asked)
	}
	f.run("attr", "shop/store", "a=1", "b=text", `c="1"`, "d=true", "e=")
	want := map[string]string{"a": "1", "b": `"text"`, "c": `"1"`, "d": "true", "e": `""`}
	r, ok := f.fake.asked.(*apiv1.AttrRequest)
	if !ok {
		t.Fatalf("attr: %v", f.fake.asked)
	}
	for k, v := range want {
		if r.Set[k] != v {
			t.Errorf("attribute %s is %s, want %s", k, r.Set[k], v)
		}
	}
	f.run("swap", "shop/store@^1.2")
	if r, ok := f.fake.asked.(*apiv1.SwapRequest); !ok || r.Component != "shop/store" || r.Version != "^1.2" {
		t.Errorf("swap: %v", f.fake.asked)
	}
}

var _ io.Writer = writerFunc(nil)
