package component

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pipeWait is how long output is waited for after the end of a process, where another one still holds its pipe.
const pipeWait = 200 * time.Millisecond

// process is the program, started once.
type process struct {
	pid  int
	name string
	tail *tail
	done chan struct{} // closed when it has ended
	err  error         // how, once done is closed; nil: status 0

	mu       sync.Mutex // guards stopping
	stopping bool       // its end is wanted
}

// startProcess starts a command line. The kernel ends the process with this one.
func startProcess(words, env []string, dir string, out io.Writer) (*process, error) {
	path, err := lookUp(words[0], env)
	if err != nil {
		return nil, err
	}
	p := &process{name: words[0], tail: &tail{out: out}, done: make(chan struct{})}
	cmd := &exec.Cmd{
		Path: path, Args: words, Env: env, Dir: dir, Stdout: p.tail, Stderr: p.tail, WaitDelay: pipeWait,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	started := make(chan error, 1)
	go func() {
		// The kernel sends that signal when the thread ends that started the process: this one lives as long as the process does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		p.err = cmd.Wait()
		if errors.Is(p.err, exec.ErrWaitDelay) {
			p.err = nil // it ended with status 0; something that it started still holds its output
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, startError(words[0], path, err)
	}
	return p, nil
}

func startError(name, path string, err error) error {
	switch {
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("start %s: %s may not be executed: %w; is it executable, in /usr, /bin, /sbin, /lib or /opt or named by its absolute path in start, quiesce, resume or health?", name, path, err)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("start %s: %w; is its interpreter installed on this node?", name, err)
	}
	return fmt.Errorf("start %s: %w", name, err)
}

// lookUp finds a program: by its path, or in the PATH of env.
func lookUp(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if _, err := os.Stat(name); err != nil {
			return "", fmt.Errorf("start %s: %w; is it installed on this node? A constraint (require) keeps the component on nodes that have it", name, err)
		}
		return name, nil
	}
	search := ""
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	for _, dir := range strings.Split(search, ":") {
		file := dir + "/" + name
		if st, err := os.Stat(file); dir != "" && err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("start %s: it is not in the PATH of this node (%s): install it there, name it by its absolute path, or keep the component on nodes "+
		"that have it (require)", name, search)
}

// over says whether it has ended.
func (p *process) over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// wantEnd says that its end is no death from now on.
func (p *process) wantEnd() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopping = true
}

func (p *process) endWanted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stopping
}

// end stops the program: the signal to it, and SIGKILL to all that is left of it when ctx ends.
func (p *process) end(ctx context.Context, sig unix.Signal) error {
	p.wantEnd()
	if !p.over() {
		if err := unix.Kill(p.pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal %s to %s: %w", unix.SignalName(sig), p.name, err)
		}
		// Where it stands still it takes the signal when it goes on.
		if err := signalAll(unix.SIGCONT); err != nil {
			return err
		}
		select {
		case <-p.done:
		case <-ctx.Done():
		}
	}
	if err := killAll(); err != nil {
		return err
	}
	<-p.done
	return nil
}

// ended says how it ended, with what it said last.
func (p *process) ended() string {
	how := "exit status 0"
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		how = exit.Error()
	} else if p.err != nil {
		how = p.err.Error()
	}
	said := p.tail.last()
	if said == "" {
		return fmt.Sprintf("%s ended (%s) and said nothing", p.name, how)
	}
	return fmt.Sprintf("%s ended (%s); its last output: %s", p.name, how, said)
}

// tail passes output on and remembers its end.
type tail struct {
	out io.Writer
	mu  sync.Mutex // guards end
	end []byte
}

const (
	tailBytes = 2 << 10
	tailLines = 5
)

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	t.end = append(t.end, b...)
	if n := len(t.end) - tailBytes; n > 0 {
		t.end = append(t.end[:0], t.end[n:]...)
	}
	t.mu.Unlock()
	return t.out.Write(b)
}

// last are the last lines, as one.
func (t *tail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := strings.Split(strings.TrimSpace(string(t.end)), "\n")
	lines = lines[max(0, len(lines)-tailLines):]
	for i, l := range lines {
		lines[i] = strings.TrimSpace(l)
	}
	return strings.ToValidUTF8(strings.Join(lines, " · "), "?")
}

// command runs a hook or a check to its end. Its error holds what it said.
func command(ctx context.Context, words, env []string, dir string) error {
	path, err := lookUp(words[0], env)
	if err != nil {
		return err
	}
	said := &tail{out: io.Discard}
	cmd := exec.CommandContext(ctx, path, words[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = env, dir, said, said, pipeWait
	err = cmd.Run()
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s did not end in time: %w", words[0], ctx.Err())
	}
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) {
		return startError(words[0], path, err)
	}
	return fmt.Errorf("%s: %w: %s", strings.Join(words, " "), err, said.last())
}
