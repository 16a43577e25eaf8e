package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// launch starts one process. To go-plugin it is a runner.Runner.
type launch struct {
	local *Local
	spec  *Spec
	prog  *program
	env   []string
	dir   string // the process's own folder for sockets, made by go-plugin

	log    *os.File // standard output and error
	offset int64    // where this process's output begins

	child  *child
	ticks  uint64
	report SandboxReport
	hello  *helloReader
}

// Start implements go-plugin's runner.Runner.
func (l *launch) Start(context.Context) error {
	pol := policyFor(l.spec, l.prog, l.dir)
	group, rep, err := l.cgroup()
	if err != nil {
		return err
	}
	l.report = rep
	proc, err := l.start(&pol, group)
	if err != nil {
		if group != nil {
			err = errors.Join(err, group.remove())
		}
		return err
	}
	c, err := watch(proc.Pid, proc)
	if err != nil {
		return errors.Join(err, proc.Kill())
	}
	c.group = group
	c.clean = l.clean
	l.child = c
	l.hello.ended = c.done
	if l.ticks, err = startTicks(proc.Pid); err != nil && !errors.Is(err, ErrGone) {
		go c.wait()
		return errors.Join(err, c.signal(unix.SIGKILL))
	}
	go c.wait()
	return nil
}

func (l *launch) cgroup() (*cgroup, SandboxReport, error) {
	if l.local.cfg.CgroupParent == "" {
		return nil, cgroupGaps(l.spec.Limits), nil
	}
	name := "coppice-" + strings.NewReplacer("/", "-", "@", "-").Replace(l.spec.Instance) + "-" + filepath.Base(l.dir)
	g, rep, err := newCgroup(l.local.cfg.CgroupParent, name, l.spec.Limits)
	return g, rep, err
}

// isolation is one way to get the network that the spec asks for.
type isolation struct {
	flags  uintptr
	report SandboxReport
}

// isolations lists the ways to try, best first.
func (l *launch) isolations() []isolation {
	if l.spec.Sandbox.Network != NetworkNone || l.spec.Sandbox.Off {
		return []isolation{{}}
	}
	held := SandboxReport{Enforced: []string{"network: an empty namespace of its own"}}
	return []isolation{
		{flags: unix.CLONE_NEWNET, report: held},
		{flags: unix.CLONE_NEWNET | unix.CLONE_NEWUSER, report: held},
		{report: SandboxReport{Missing: []Gap{{"network namespace", "neither root nor user namespaces are permitted here; TCP is withheld by Landlock where it can"}}}},
	}
}

func (l *launch) start(pol *policy, group *cgroup) (*os.Process, error) {
	cgroupFD := -1
	if group != nil {
		fd, err := group.open()
		if err != nil {
			return nil, err
		}
		defer unix.Close(fd) //nolint:errcheck // a directory
		cgroupFD = fd
	}
	var errs []error
	for _, iso := range l.isolations() {
		attr := &syscall.SysProcAttr{Setsid: true, Cloneflags: iso.flags}
		if cgroupFD >= 0 {
			attr.UseCgroupFD, attr.CgroupFD = true, cgroupFD
		}
		proc, rep, err := l.exec(pol, attr)
		if err == nil {
			l.report.add(iso.report)
			l.report.add(rep)
			return proc, nil
		}
		errs = append(errs, err)
		// EPERM, ENOSPC, EINVAL: namespaces are forbidden, used up or not built in. Anything else would not get better without them.
		if iso.flags == 0 || (!errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EINVAL)) {
			break
		}
	}
	return nil, execError(l.prog, errs[len(errs)-1])
}

// execError says what the kernel's refusal to execute means.
func execError(p *program, err error) error {
	switch {
	case errors.Is(err, unix.ENOEXEC):
		return fmt.Errorf("%w: %s: %w", ErrWrongArch, p.name, err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.ENOENT), errors.Is(err, unix.ETXTBSY):
		return fmt.Errorf("%w: %s: %w; is the file executable, complete, and its interpreter installed?", ErrNoExecutable, p.name, err)
	}
	return fmt.Errorf("start %s: %w", p.name, err)
}

func (l *launch) exec(pol *policy, attr *syscall.SysProcAttr) (*os.Process, SandboxReport, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, SandboxReport{}, err
	}
	defer null.Close() //nolint:errcheck // nothing is buffered
	files := []*os.File{null, l.log, l.log}
	if len(l.local.cfg.Shim) > 0 {
		return l.execShim(pol, attr, files)
	}
	fd := int(l.prog.file.Fd())
	if l.prog.script {
		files, fd = append(files, l.prog.file), 3 // the interpreter opens it again
	}
	pa := &os.ProcAttr{Dir: l.workDir(), Env: l.env, Files: files, Sys: attr}
	var rep SandboxReport
	proc, err := onRestrictedThread(func() (*os.Process, error) {
		var err error
		if rep, err = pol.restrict(int(l.prog.file.Fd())); err != nil {
			return nil, err
		}
		return os.StartProcess("/proc/self/fd/"+strconv.Itoa(fd), pol.Args, pa)
	})
	if err != nil {
		return nil, rep, err
	}
	rep.add(pol.setLimits(proc.Pid))
	return proc, rep, nil
}

// onRestrictedThread runs f on an operating system thread that ends afterwards, so that f can give up rights of that thread for good.
func onRestrictedThread(f func() (*os.Process, error)) (*os.Process, error) {
	type result struct {
		proc *os.Process
		err  error
	}
	done := make(chan result, 1)
	var run func()
	run = func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The process's first thread cannot end; keep it busy while another one does it.
			inner := make(chan struct{})
			go func() { defer close(inner); run() }()
			<-inner
			runtime.UnlockOSThread()
			return
		}
		p, err := f()
		done <- result{p, err}
	}
	go run()
	r := <-done
	return r.proc, r.err
}

// shimReply is what the shim tells before it becomes the program.
type shimReply struct {
	Report SandboxReport `json:"report"`
	Error  string        `json:"error,omitempty"`
	Errno  int           `json:"errno,omitempty"`
}

func (l *launch) execShim(pol *policy, attr *syscall.SysProcAttr, files []*os.File) (*os.Process, SandboxReport, error) {
	var rep SandboxReport
	r, w, err := os.Pipe()
	if err != nil {
		return nil, rep, err
	}
	defer r.Close() //nolint:errcheck // reading end
	shimPol := *pol
	shimPol.ExecFD = 3
	arg, err := json.Marshal(&shimPol)
	if err != nil {
		return nil, rep, errors.Join(err, w.Close())
	}
	argv := append(append([]string{}, l.local.cfg.Shim...), string(arg))
	pa := &os.ProcAttr{Dir: l.workDir(), Env: l.env, Files: append(files, l.prog.file, w), Sys: attr}
	proc, err := os.StartProcess(argv[0], argv, pa)
	if cerr := w.Close(); cerr != nil && err == nil {
		err = cerr
	}
	if err != nil {
		return nil, rep, err
	}
	var reply shimReply
	b, err := io.ReadAll(io.LimitReader(r, 1<<20))
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if err == nil && line != "" {
			err = json.Unmarshal([]byte(line), &reply)
		}
	}
	if err == nil && len(b) == 0 {
		err = errors.New("the sandbox helper ended without a word; does it call runner.ExecShim?")
	}
	if err == nil && reply.Error != "" {
		err = errors.New(reply.Error)
		if reply.Errno != 0 {
			err = fmt.Errorf("%s: %w", reply.Error, syscall.Errno(reply.Errno))
		}
	}
	if err != nil {
		_ = proc.Kill()        // it has most likely ended already
		_, werr := proc.Wait() // no zombie stays behind
		return nil, rep, errors.Join(err, werr)
	}
	return proc, reply.Report, nil
}

func (l *launch) workDir() string {
	if l.spec.DataDir != "" {
		return l.spec.DataDir
	}
	return l.dir
}

// clean removes what the process leaves behind: its sockets and its cgroup.
func (l *launch) clean() {
	if err := os.RemoveAll(l.dir); err != nil {
		l.local.cfg.Log.Warn("socket folder stays behind", "instance", l.spec.Instance, "dir", l.dir, "error", err)
	}
	if l.child.group != nil {
		if err := l.child.group.remove(); err != nil {
			l.local.cfg.Log.Warn("cgroup stays behind", "instance", l.spec.Instance, "error", err)
		}
	}
}

// The rest of go-plugin's runner.Runner.

func (l *launch) Stdout() io.ReadCloser { return l.hello }
func (l *launch) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }
func (l *launch) Name() string          { return l.prog.name }
func (l *launch) ID() string {
	if l.child == nil {
		return ""
	}
	return strconv.Itoa(l.child.pid)
}
func (l *launch) Diagnose(context.Context) string { return "" }

func (l *launch) Wait(context.Context) error {
	<-l.child.done
	return nil
}

func (l *launch) Kill(context.Context) error {
	if l.child == nil {
		return nil
	}
	return l.child.signal(unix.SIGKILL)
}

// PluginToHost accepts only a unix socket in the folder we made: a component cannot make us talk to another one.
func (l *launch) PluginToHost(network, addr string) (string, string, error) {
	if network != "unix" || filepath.Dir(filepath.Clean(addr)) != filepath.Clean(l.dir) {
		return "", "", fmt.Errorf("it listens on %s %s, want a unix socket in $PLUGIN_UNIX_SOCKET_DIR", network, addr)
	}
	return network, filepath.Clean(addr), nil
}

func (l *launch) HostToPlugin(network, addr string) (string, string, error) {
	return network, addr, nil
}
