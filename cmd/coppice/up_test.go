package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// upWith reads the configuration of `up` from flags, environment and a file.
func upWith(t *testing.T, f *fixture, file string, args ...string) (upConfig, error) {
	t.Helper()
	if file != "" {
		path := filepath.Join(t.TempDir(), "node.yaml")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config", path)
	}
	c, _, _ := f.cli()
	var u upFlags
	fs := pflag.NewFlagSet("up", pflag.ContinueOnError)
	u.register(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return u.config(c, fs)
}

func TestFlagOverEnvironmentOverFile(t *testing.T) {
	f := newFixture(t)
	file := `# a node
name: from-file
zone: from-file
voters: 3
view: 64
role: worker
listen: [/ip4/10.0.0.1/tcp/1, /ip4/10.0.0.1/tcp/2]
label: {region: eu, disk: ssd}
capacity: cpu=2,memory=1GiB
allow-exec: false
log-level: debug
`
	f.env["COPPICE_ZONE"] = "from-env"
	f.env["COPPICE_NAME"] = "from-env"
	f.env["COPPICE_LOG_FORMAT"] = "json"
	cfg, err := upWith(t, f, file, "--name", "from-flag", "--data", "/d")
	if err != nil {
		t.Fatal(err)
	}
	want := upConfig{
		Data: "/d", Name: "from-flag", Zone: "from-env", Role: "worker", Listen: []string{"/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/2"},
		Labels: map[string]string{"region": "eu", "disk": "ssd"}, CPUMillis: 2000, MemoryBytes: 1 << 30, Voters: 3, View: 64, Profile: "lan",
		LogLevel: slog.LevelDebug, LogJSON: true, Version: version(),
	}
	cfg.Advertise = nil
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got  %+v\nwant %+v", cfg, want)
	}
	if cfg, err = upWith(t, f, file, "--data", "/d", "--listen", "/ip4/10.0.0.9/tcp/9", "--label", "x=y"); err != nil || len(cfg.Listen) != 1 || len(cfg.Labels) != 1 {
		t.Errorf("a repeatable flag does not replace the file's list: %+v %v", cfg, err)
	}
}

func TestDefaultsOfUp(t *testing.T) {
	f := newFixture(t)
	f.env["XDG_DATA_HOME"] = "/home/x/data"
	cfg, err := upWith(t, f, "", "--name", "n1")
	if err != nil || cfg.Data != "/home/x/data/coppice/n1" || cfg.Role != "full" || cfg.Profile != "lan" {
		t.Errorf("%+v %v", cfg, err)
	}
	if cfg, err = upWith(t, f, "", "--data", "rel"); err != nil || !filepath.IsAbs(cfg.Data) || cfg.Name == "" {
		t.Errorf("%+v %v", cfg, err)
	}
}

func TestWrongConfigurationSaysWhere(t *testing.T) {
	f := newFixture(t)
	for _, x := range []struct{ file, env, arg, want string }{
		{file: "name: a\nnmae: b\n", want: "node.yaml:2:1: nmae: there is no such key"},
		{file: "name: a\nname: b\n", want: "twice"},
		{file: "allow-exec: perhaps\n", want: "node.yaml:1:1: allow-exec"},
		{file: "- a\n", want: "want keys and values"},
		{file: "name: [[a]]\n", want: "simple values"},
		{file: "name: {\n", want: "node.yaml"},
		{file: "output: json\n", want: "there is no such key"},
		{env: "perhaps", want: "$COPPICE_ALLOW_EXEC"},
		{arg: "--allow-exec", want: "has no coppice exec"},
		{file: "allow-exec: true\n", want: "has no coppice exec"},
		{env: "true", want: "has no coppice exec"},
		{arg: "--role=leader", want: "want full, voter, worker"},
		{arg: "--profile=x", want: "want lan, wan, local"},
		{arg: "--log-level=loud", want: "want debug, info, warn or error"},
		{arg: "--label=x", want: "want k=v"},
		{arg: "--capacity=cpu=0", want: "cores above zero"},
		{arg: "--capacity=memory=lots", want: "memory"},
		{arg: "--capacity=gpu=1", want: "want cpu=4,memory=8GiB,disk=50GiB"},
		{arg: "--join=@/nowhere/token", want: "no such file"},
		{arg: "--join=-", want: "is empty"},
	} {
		f.env["COPPICE_ALLOW_EXEC"] = x.env
		var args []string
		if x.arg != "" {
			args = append(args, x.arg)
		}
		_, err := upWith(t, f, x.file, args...)
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%+v: got %v", x, err)
		}
	}
	code, _, errs := f.run("up", "--role", "leader")
	if code != exitUsage || !strings.HasPrefix(errs, "coppice: up: --role \"leader\"") {
		t.Errorf("%d %s", code, errs)
	}
}

func TestJoinTokenFromFileAndStdin(t *testing.T) {
	f := newFixture(t)
	path := filepath.Join(t.TempDir(), "tok")
	if err := os.WriteFile(path, []byte("cpt1.file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f.in = " cpt1.stdin\n"
	for arg, want := range map[string]string{"@" + path: "cpt1.file", "-": "cpt1.stdin", "cpt1.arg": "cpt1.arg"} {
		if cfg, err := upWith(t, f, "", "--join", arg); err != nil || cfg.Join != want {
			t.Errorf("--join %s: %q %v", arg, cfg.Join, err)
		}
	}
}

func TestReadyLine(t *testing.T) {
	f := newFixture(t)
	r := readyInfo{Name: "n1", ID: "12D3", Cluster: "c1", API: "unix:///d/api.sock", HTTP: "http://127.0.0.1:8080"}
	for _, x := range []struct {
		token, profile, output, want string
	}{
		{"", "lan", "table", "ready node=n1 id=12D3 cluster=c1 api=unix:///d/api.sock http=http://127.0.0.1:8080\n"},
		{"T", "lan", "table", "ready node=n1 id=12D3 cluster=c1 api=unix:///d/api.sock http=http://127.0.0.1:8080\njoin it from another machine with: coppice up --join T\n"},
		{"T", "local", "table", "ready node=n1 id=12D3 cluster=c1 api=unix:///d/api.sock http=http://127.0.0.1:8080\njoin it from another terminal with: coppice up --profile local --name n2 --join T\n"},
		{"T", "lan", "json", `{"ready":true,"node":"n1","id":"12D3","cluster":"c1","api":"unix:///d/api.sock","http":"http://127.0.0.1:8080","join":"coppice up --join T"}` + "\n"},
	} {
		c, out, _ := f.cli()
		c.output = x.output
		r.Token = x.token
		if err := c.ready(r, upConfig{Profile: x.profile}); err != nil || out.String() != x.want {
			t.Errorf("got %q, want %q (%v)", out, x.want, err)
		}
	}
}
