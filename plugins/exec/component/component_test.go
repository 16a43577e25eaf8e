package component

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/contract/program"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

// TestMain is also the programs that the tests run.
func TestMain(m *testing.M) {
	switch os.Getenv("PROGRAM") {
	case "":
		os.Exit(m.Run())
	case "mapper":
		mapper()
	case "server":
		server()
	}
}

// mapper counts in a file that it has mapped into memory: nothing but the memory is written to.
func mapper() {
	f, err := os.OpenFile("data/counter", os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = f.Truncate(4096)
	}
	if err != nil {
		panic(err)
	}
	mem, err := syscall.Mmap(int(f.Fd()), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		panic(err)
	}
	for i := 0; ; i++ {
		copy(mem, fmt.Sprintf("%08d", i))
		time.Sleep(time.Millisecond)
	}
}

// server answers on $PORT; after POST /ill it is not well any more.
func server() {
	ill := false
	http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if ill {
			http.Error(w, "I am ill", http.StatusInternalServerError)
		}
	})
	http.HandleFunc("POST /ill", func(http.ResponseWriter, *http.Request) { ill = true })
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s in %s", r.Method, r.URL.Path, os.Getenv("HOME"))
	})
	panic(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}

// output is what a program and its component write.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// rig is a component under test.
type rig struct {
	*sdktest.Running
	a    *adapter
	out  *output
	exit chan int
}

func newRig(t *testing.T, cfg program.Config) *rig {
	t.Helper()
	t.Chdir(t.TempDir())
	r := &rig{out: &output{}, exit: make(chan int, 1)}
	r.a = newAdapter(cfg, r.out)
	r.a.exit = func(code int) { r.exit <- code }
	t.Cleanup(func() {
		must(t, killAll())
		if t.Failed() {
			t.Log(r.out.String())
		}
	})
	return r
}

// run starts a program as a component.
func run(t *testing.T, cfg program.Config) *rig {
	t.Helper()
	r := newRig(t, cfg)
	r.Running = sdktest.Start(t, r.a.component("1.0.0"))
	t.Cleanup(func() { r.stop(t) })
	return r
}

func (r *rig) stop(t *testing.T) {
	t.Helper()
	if _, err := r.Control.Stop(context.Background(), &componentv1.StopRequest{GraceMs: 1000}); err != nil {
		t.Error(err)
	}
}

// file is one of the program's state.
func (r *rig) file(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.a.home.work, "data", name))
	must(t, err)
	return strings.TrimSpace(string(b))
}

func (r *rig) has(name string) bool {
	_, err := os.Stat(filepath.Join(r.a.home.work, "data", name))
	return err == nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// until waits for a condition.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 20s for %s", what)
		}
	}
}

// restored is the folder that a checkpoint makes.
func restored(t *testing.T, frames []*componentv1.StateFrame) string {
	t.Helper()
	a := newAdapter(program.Config{Start: "unused", StateDir: "data"}, io.Discard)
	r := sdktest.Start(t, a.component("1.0.0"), sdktest.Request(nil))
	r.Restore(frames)
	return filepath.Join(a.home.work, "data")
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	return strings.TrimSpace(string(b))
}

// busy writes the same number into two files, one after the other, for ever; its child does so in a session of its own.
const busy = `sh -c 'cd {state_dir}; n() { while :; do i=$((i+1)); echo $i > $1.1; echo $i > $1.2; done; }; (trap "" HUP; setsid sh -c "while :; do i=\$((i+1)); echo \$i > far.1; echo \$i > far.2; done") & n near'`

// Each snapshot is one moment of the folder, whatever the program writes meanwhile: of two files that are always written in turn the second is never ahead of
// the first, nor more than one behind.
func TestASnapshotIsOneMoment(t *testing.T) {
	r := run(t, program.Config{Start: busy, StateDir: "data"})
	until(t, "both to write", func() bool { return r.has("far.2") && r.has("near.2") })
	before := 0
	for range 15 {
		dir := restored(t, r.Checkpoint(0))
		for _, who := range []string{"near", "far"} {
			first, second := read(t, filepath.Join(dir, who+".1")), read(t, filepath.Join(dir, who+".2"))
			a, aerr := strconv.Atoi(first)
			b, berr := strconv.Atoi(second)
			// A file that was cut and not written yet is empty: that moment is as good as any.
			if aerr == nil && berr == nil && (b > a || b < a-1) {
				t.Fatalf("%s: the first file says %d, the second, which is written after it, %d", who, a, b)
			}
			if who == "near" && aerr == nil {
				before = a
			}
		}
	}
	until(t, "the program to go on after the last one", func() bool {
		n, err := strconv.Atoi(r.file(t, "near.2"))
		return err == nil && n > before+1
	})
}

func TestMappedMemoryIsPartOfASnapshot(t *testing.T) {
	t.Setenv("PROGRAM", "mapper")
	self, err := os.Executable()
	must(t, err)
	r := run(t, program.Config{Start: self, StateDir: "data"})
	until(t, "it to begin", func() bool { return r.has("counter") })
	until(t, "it to count", func() bool { return strings.Trim(r.file(t, "counter"), "\x00") > "00000003" })
	last := ""
	for range 5 {
		seen := strings.Trim(r.file(t, "counter"), "\x00")
		got := strings.Trim(read(t, filepath.Join(restored(t, r.Checkpoint(0)), "counter")), "\x00")
		if got < seen || got <= last {
			t.Fatalf("the memory said %s before the snapshot, which has %s; the one before had %s", seen, got, last)
		}
		last = got
		until(t, "it to count on", func() bool { return strings.Trim(r.file(t, "counter"), "\x00") > got })
	}
}

func TestHooksRunAroundASnapshot(t *testing.T) {
	r := run(t, program.Config{
		Start: `sh -c 'echo one > {state_dir}/log; while :; do sleep 1; done'`, StateDir: "data",
		Quiesce: `sh -c 'test ! -e fail || { echo it will not; exit 1; }; echo quiet >> {state_dir}/log'`, Resume: `sh -c 'echo on >> {state_dir}/log'`,
	})
	until(t, "it to begin", func() bool { return r.has("log") })
	if got := read(t, filepath.Join(restored(t, r.Checkpoint(0)), "log")); got != "one\nquiet" {
		t.Errorf("the snapshot has %q, want it between the hooks", got)
	}
	if got := r.file(t, "log"); got != "one\nquiet\non" {
		t.Errorf("after it the file has %q", got)
	}
	// A hook that fails costs the snapshot, and what it may have done is taken back.
	must(t, os.WriteFile(filepath.Join(r.a.home.work, "fail"), nil, 0o600))
	stream, err := r.Control.Checkpoint(t.Context(), &componentv1.CheckpointFrom{})
	must(t, err)
	if _, err := stream.Recv(); err == nil || !strings.Contains(err.Error(), "hook quiesce") || !strings.Contains(err.Error(), "it will not") {
		t.Errorf("a hook that fails: %v", err)
	}
	if got := r.file(t, "log"); got != "one\nquiet\non\non" {
		t.Errorf("after a hook that failed the file has %q", got)
	}
}

func TestTheProgramsEndIsTheComponents(t *testing.T) {
	r := run(t, program.Config{Start: `sh -c 'setsid sleep 1000 & echo first; echo last words >&2; sleep 0.3; exit 7'`, StateDir: "data", Unattended: true})
	if code := <-r.exit; code != componentv1.ExitProgramEnded {
		t.Errorf("status %d, want %d", code, componentv1.ExitProgramEnded)
	}
	out := strings.TrimSpace(r.out.String())
	last := out[strings.LastIndex(out, "\n")+1:]
	for _, want := range []string{"exec: sh ended (exit status 7)", "last words"} {
		if !strings.Contains(last, want) {
			t.Errorf("its last line is %q, want %q in it", last, want)
		}
	}
	if left, err := descendants(os.Getpid()); err != nil || alive(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func alive(list []ours) (n int) {
	for _, p := range list {
		if p.state != 'Z' {
			n++
		}
	}
	return n
}

func TestStopEndsByItsSignalAndAtLastByForce(t *testing.T) {
	for name, c := range map[string]struct{ start, stop, want string }{
		"by its signal": {`sh -c 'trap "echo bye; exit 0" USR1; echo up; while :; do sleep 0.05; done'`, "SIGUSR1", "bye"},
		"by force":      {`sh -c 'trap "echo no" TERM; setsid sh -c "trap : TERM; while :; do sleep 1; done" & echo up; while :; do sleep 0.05; done'`, "", "no"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, program.Config{Start: c.start, Stop: c.stop})
			r.Running = sdktest.Start(t, r.a.component("1.0.0"))
			until(t, "it to begin", func() bool { return strings.Contains(r.out.String(), "up") })
			r.stop(t)
			if !strings.Contains(r.out.String(), c.want) {
				t.Errorf("it said %q, want %q", r.out.String(), c.want)
			}
			if left, err := descendants(os.Getpid()); err != nil || alive(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
			select {
			case code := <-r.exit:
				t.Errorf("an end that was asked for ended the component with status %d", code)
			default:
			}
		})
	}
}

func TestFrozenItStandsStillAndBeforeASwapItEnds(t *testing.T) {
	r := run(t, program.Config{Start: `sh -c 'echo begin >> {state_dir}/log; trap "echo end >> {state_dir}/log; exit" TERM; while :; do date +%N > {state_dir}/now; sleep 0.01; done'`, StateDir: "data"})
	moves := func() bool {
		was := r.file(t, "now")
		for range 40 {
			time.Sleep(5 * time.Millisecond) // the program's own pace
			if r.file(t, "now") != was {
				return true
			}
		}
		return false
	}
	until(t, "it to begin", func() bool { return r.has("now") })
	freeze := func(why componentv1.QuiesceRequest_Reason) {
		_, err := r.Control.Quiesce(t.Context(), &componentv1.QuiesceRequest{Reason: why, DeadlineMs: 5000})
		must(t, err)
	}
	thaw := func() {
		_, err := r.Control.Resume(t.Context(), &componentv1.ResumeRequest{})
		must(t, err)
	}
	freeze(componentv1.QuiesceRequest_FREEZE)
	if moves() {
		t.Error("it goes on while it is frozen")
	}
	if len(r.Checkpoint(0)) < 2 {
		t.Error("no checkpoint while it is frozen")
	}
	thaw()
	until(t, "it to go on", moves)
	freeze(componentv1.QuiesceRequest_SWAP)
	if got := r.file(t, "log"); got != "begin\nend" {
		t.Errorf("before a swap it is ended by its signal; its log says %q", got)
	}
	thaw()
	until(t, "it to be started again", func() bool { return r.file(t, "log") == "begin\nend\nbegin" })
}

func TestWhatDoesNotStartSaysWhy(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	must(t, os.WriteFile(plain, []byte("text"), 0o600))
	for start, want := range map[string][]string{
		"no-such-program --x":                    {"not in the PATH", "require"},
		"/no/such/program":                       {"no such file", "installed on this node"},
		`sh -c 'echo no configuration; exit 78'`: {"exit status 78", "no configuration"},
		plain:                                    {"may not be executed"},
	} {
		r := newRig(t, program.Config{Start: start, Health: "false"})
		r.Running = sdktest.Start(t, r.a.component("1.0.0"), sdktest.Request(nil))
		_, err := r.Control.Start(t.Context(), &componentv1.StartRequest{Instance: "a/b-0"})
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v; want %q in it", start, err, w)
			}
		}
	}
}

func TestPortHealthAndTheHTTPInterface(t *testing.T) {
	t.Setenv("PROGRAM", "server")
	self, err := os.Executable()
	must(t, err)
	port := uint32(0)
	r := run(t, program.Config{Start: self, Port: &port, Health: "GET /healthz"})
	beat := func() *componentv1.Status {
		b, err := r.Control.Heartbeat(t.Context(), &componentv1.Beat{})
		must(t, err)
		return b.GetStatus()
	}
	st := beat()
	if st.GetState() != componentv1.State_STARTED || !strings.HasPrefix(st.GetInfo()[componentv1.InfoListen], "127.0.0.1:") {
		t.Errorf("started it tells %v", st)
	}
	w := httptest.NewRecorder()
	r.HTTP.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/some/where", nil))
	if got := w.Body.String(); got != "POST /some/where in "+r.a.home.work {
		t.Errorf("through the interface it says %q", got)
	}
	r.HTTP.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/ill", nil))
	until(t, "the component to say that it is ill", func() bool {
		st := beat()
		return st.GetState() == componentv1.State_FAILED && strings.Contains(st.GetDetail(), "I am ill")
	})
}

func TestWhatEndedProcessesLeftIsRemoved(t *testing.T) {
	dir := t.TempDir()
	mine, err := makeHome(dir)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(mine.work, "x"), nil, 0o600))
	other, err := makeHome(dir)
	must(t, err)
	if _, err := os.Stat(filepath.Join(mine.work, "x")); err != nil {
		t.Fatalf("the folder of a process that lives was removed: %v", err)
	}
	must(t, mine.lock.Close()) // it has ended
	must(t, other.lock.Close())
	_, err = makeHome(dir)
	must(t, err)
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	must(t, err)
	if len(names) != 2 {
		t.Errorf("left: %v", names)
	}
}
