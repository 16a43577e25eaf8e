package runner

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner/runnertest"
)

const envDaemon = "RUNNER_TEST_DAEMON"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "__exec" {
		os.Exit(ExecShim(os.Args[2:]))
	}
	runnertest.Main()
	if dir := os.Getenv(envDaemon); dir != "" {
		daemon(dir)
	}
	os.Exit(m.Run())
}

// daemon starts a component, writes its identity to stdout and waits to be killed.
func daemon(dir string) {
	r, err := New(Config{})
	if err == nil {
		var p Process
		if p, err = r.Start(context.Background(), specIn(dir)); err == nil {
			if err = json.NewEncoder(os.Stdout).Encode(p.Ident()); err == nil {
				select {}
			}
		}
	}
	panic(err)
}

func specIn(dir string) Spec {
	return Spec{
		Instance: "test/counter-0", Exec: ExecFile{Path: "/proc/self/exe", Digest: "sha256:test"},
		RunDir: filepath.Join(dir, "r"), LogDir: filepath.Join(dir, "l"), DataDir: filepath.Join(dir, "d"),
		Env: []string{runnertest.EnvQuickExit},
	}
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "crt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func newRunner(t *testing.T, cfg Config) *Local {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func start(t *testing.T, r *Local, spec Spec) Process {
	t.Helper()
	p, err := r.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
		<-p.Done()
	})
	return p
}

func add(t *testing.T, p Process, n int64) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var out wrapperspb.Int64Value
	if err := p.Conn().Invoke(ctx, runnertest.Add, wrapperspb.Int64(n), &out); err != nil {
		t.Fatal(err)
	}
	return out.GetValue()
}

func waitDone(t *testing.T, p Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the process does not end")
	}
}

var modes = map[string]Config{"direct": {}, "shim": {Shim: []string{"/proc/self/exe", "__exec"}}}

func TestStartCallStop(t *testing.T) {
	for name, cfg := range modes {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			spec := specIn(dir)
			p := start(t, newRunner(t, cfg), spec)
			if got := add(t, p, 5); got != 5 {
				t.Fatalf("add: %d", got)
			}
			st, err := os.Stat(spec.RunDir)
			if err != nil || st.Mode().Perm() != 0o700 {
				t.Fatalf("run folder: %v %v", st.Mode(), err)
			}
			if err := p.Stop(t.Context(), time.Second); err != nil {
				t.Fatal(err)
			}
			waitDone(t, p)
			if e := p.Exit(); !e.Known || e.Code != 0 || e.By == "kill" {
				t.Fatalf("exit: %+v", e)
			}
			left, err := os.ReadDir(spec.RunDir)
			if err != nil || len(left) != 0 {
				t.Fatalf("left behind: %v %v", left, err)
			}
			if err := p.Stop(t.Context(), time.Second); err != nil {
				t.Fatalf("stop again: %v", err)
			}
		})
	}
}

func TestExecutesTheOpenFile(t *testing.T) {
	dir := shortDir(t)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "component")
	if err := os.WriteFile(path, self, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Whoever exchanges the file after it was verified does not change what is executed.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/false\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	spec := specIn(dir)
	spec.Exec = ExecFile{File: f, Path: path, Digest: "sha256:x"}
	p := start(t, newRunner(t, Config{}), spec)
	if add(t, p, 1) != 1 || p.Ident().ExecDigest != "sha256:x" {
		t.Fatal("the replaced file was executed")
	}
}

func TestDeathIsNoticedAtOnce(t *testing.T) {
	p := start(t, newRunner(t, Config{}), specIn(shortDir(t)))
	at := time.Now()
	if err := unix.Kill(p.Ident().Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitDone(t, p)
	t.Logf("noticed after %s", time.Since(at))
	if e := p.Exit(); e.Signal != "SIGKILL" || e.By != "" || e.Code != -1 {
		t.Fatalf("exit: %+v", e)
	}
	if err := p.Kill(); err != nil {
		t.Fatalf("kill after the end: %v", err)
	}
}

func TestStopLadderOnStoppedProcess(t *testing.T) {
	p := start(t, newRunner(t, Config{}), specIn(shortDir(t)))
	if err := unix.Kill(p.Ident().Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	at := time.Now()
	if err := p.Stop(t.Context(), 100*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.By != "kill" || e.Signal != "SIGKILL" {
		t.Fatalf("exit: %+v", e)
	}
	if d := time.Since(at); d > 3*time.Second {
		t.Fatalf("took %s", d)
	}
}

func TestStopOfOneThatIgnoresIt(t *testing.T) {
	spec := specIn(shortDir(t))
	spec.Env = []string{runnertest.EnvQuickExit, runnertest.EnvMode + "=" + runnertest.ModeIgnoreTerm}
	p := start(t, newRunner(t, Config{}), spec)
	if err := p.Stop(t.Context(), 100*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if e := p.Exit(); e.By != "kill" {
		t.Fatalf("exit: %+v", e)
	}
}

func TestStopWithEndedContextKills(t *testing.T) {
	p := start(t, newRunner(t, Config{}), specIn(shortDir(t)))
	if err := unix.Kill(p.Ident().Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Stop(ctx, time.Hour); err != nil {
		t.Fatal(err)
	}
}

func TestStartErrors(t *testing.T) {
	cases := []struct {
		mode string
		want error
		text string
	}{
		{runnertest.ModeHangHello, ErrHung, "no handshake within"},
		{runnertest.ModeExit, ErrNoHandshake, "cannot go on: no configuration"},
		{runnertest.ModeGarbage, ErrNoHandshake, "usage: hello"},
		{runnertest.ModeVersion, ErrProtocol, "version: 9"},
		{runnertest.ModeTCP, ErrNoHandshake, "want a unix socket"},
		{runnertest.ModeForeign, ErrHung, "/tmp/elsewhere"},
	}
	r := newRunner(t, Config{})
	for _, c := range cases {
		t.Run(c.mode, func(t *testing.T) {
			spec := specIn(shortDir(t))
			spec.Env = []string{runnertest.EnvQuickExit, runnertest.EnvMode + "=" + c.mode}
			spec.Limits.Start = time.Second
			p, err := r.Start(t.Context(), spec)
			if err == nil {
				<-p.Done()
				t.Fatal("it started")
			}
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("got %v", err)
			}
			left, err := os.ReadDir(spec.RunDir)
			if err != nil || len(left) != 0 {
				t.Fatalf("left behind: %v %v", left, err)
			}
		})
	}
}

func TestStartGivenUp(t *testing.T) {
	spec := specIn(shortDir(t))
	spec.Env = []string{runnertest.EnvQuickExit, runnertest.EnvMode + "=" + runnertest.ModeHangHello}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	at := time.Now()
	if _, err := newRunner(t, Config{}).Start(ctx, spec); !errors.Is(err, ErrHung) {
		t.Fatal(err)
	}
	if time.Since(at) > 3*time.Second {
		t.Fatal("did not heed the context")
	}
}

func TestWhatCannotBeExecuted(t *testing.T) {
	dir := shortDir(t)
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	foreign := append([]byte{}, self[:4096]...)
	foreign[18], foreign[19] = 243, 0 // e_machine: riscv
	cases := []struct {
		name string
		path string
		want error
	}{
		{"missing", filepath.Join(dir, "none"), ErrNoExecutable},
		{"empty", write("empty", nil), ErrNoExecutable},
		{"text", write("text", []byte("hello world")), ErrNoExecutable},
		{"folder", dir, ErrNoExecutable},
		{"macos", write("macos", []byte("\xcf\xfa\xed\xfe123456")), ErrWrongArch},
		{"riscv", write("riscv", foreign), ErrWrongArch},
		{"torn", write("torn", self[:40]), ErrNoExecutable},
		{"no interpreter", write("script", []byte("#!/nowhere/at-all\n")), ErrNoExecutable},
		{"silent script", write("ok", []byte("#!/bin/sh\necho no component >&2; exit 4\n")), ErrNoHandshake},
	}
	for name, cfg := range modes {
		r := newRunner(t, cfg)
		for _, c := range cases {
			t.Run(name+" "+c.name, func(t *testing.T) {
				spec := specIn(shortDir(t))
				spec.Exec = ExecFile{Path: c.path}
				if _, err := r.Start(t.Context(), spec); !errors.Is(err, c.want) {
					t.Fatalf("got %v, want %v", err, c.want)
				}
			})
		}
	}
}

func TestDescribe(t *testing.T) {
	self := ExecFile{Path: "/proc/self/exe"}
	d, err := Describe(t.Context(), self, Limits{})
	if err != nil || d.GetType() != "counter" {
		t.Fatal(d, err)
	}
	for mode, want := range map[string]error{
		runnertest.ModeDescribeFail: ErrDescribe, runnertest.ModeDescribeHang: ErrHung, runnertest.ModeExit: ErrNoHandshake,
	} {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(shortDir(t), "mode-"+mode)
		if err := os.Symlink(exe, path); err != nil {
			t.Fatal(err)
		}
		if _, err := Describe(t.Context(), ExecFile{Path: path}, Limits{Start: 500 * time.Millisecond}); !errors.Is(err, want) {
			t.Errorf("%s: %v", mode, err)
		}
	}
}

func TestRunDirTooLong(t *testing.T) {
	spec := specIn(shortDir(t))
	spec.RunDir = "/tmp/" + strings.Repeat("x", 60)
	if _, err := newRunner(t, Config{}).Start(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "107") {
		t.Fatal(err)
	}
}

func TestLeftoversOfTheGroupEnd(t *testing.T) {
	dir := shortDir(t)
	script := filepath.Join(dir, "s")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nsleep 1000 & echo $! >&2; exec sleep 1001\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	spec := specIn(dir)
	spec.Exec = ExecFile{Path: script}
	spec.Limits.Start = 300 * time.Millisecond
	_, err := newRunner(t, Config{}).Start(t.Context(), spec)
	if !errors.Is(err, ErrHung) {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(spec.LogDir, OutputLog))
	if err != nil {
		t.Fatal(err)
	}
	pid := strings.TrimSpace(string(b))
	for range 500 {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("pid %s of the group is still there", pid)
}

func TestOutputIsBounded(t *testing.T) {
	dir := t.TempDir()
	f, _, err := openLog(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	path := filepath.Join(dir, OutputLog)
	var l logFiles
	for i := range 100 {
		if _, err := f.WriteString(strings.Repeat("x", 99) + "\n"); err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			if err := l.rotate(path, 1000); err != nil {
				t.Fatal(err)
			}
		}
	}
	st, err := os.Stat(path)
	if err != nil || st.Size() > 2000 {
		t.Fatalf("%d bytes, %v", st.Size(), err)
	}
	if st, err = os.Stat(path + ".1"); err != nil || st.Size() == 0 || st.Size() > 2000 {
		t.Fatalf("predecessor: %v", err)
	}
}

func TestParseStat(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20\n"
	if v, err := parseStat(7, []byte("7 (a) b ) R)"+tail)); err != nil || v != 4711 {
		t.Fatal(v, err)
	}
	for _, bad := range []string{"", "7 (x", "7 (x) S 1 2", "7 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x 20"} {
		if _, err := parseStat(7, []byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if _, err := parseStat(7, []byte(strings.Replace("7 (x)"+tail, " S ", " Z ", 1))); !errors.Is(err, ErrGone) {
		t.Fatal(err)
	}
}
