package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/coppice-project/coppice/internal/harm"
	"github.com/coppice-project/coppice/node/api"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// Node is one node of a cluster: its process, when it runs, and where its things are.
type Node struct {
	Name  string
	Index int    // from 1
	Data  string // folder
	API   string // as api.Dial takes it
	HTTP  string // gateway, http://host:port

	cluster *Cluster

	mu     sync.Mutex // guards the fields below
	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has ended
	id     string
	ready  time.Duration // what the last start took
}

// ready is what `coppice up -o json` prints.
type ready struct {
	Ready bool   `json:"ready"`
	ID    string `json:"id"`
	HTTP  string `json:"http"`
}

// readyWithin bounds a start.
const readyWithin = 30 * time.Second

// Start starts the node's process and waits until it says that it is ready.
func (n *Node) Start(ctx context.Context, extra ...string) error {
	args := append([]string{"up", "-o", "json", "--name", n.Name, "--data", n.Data, "--api", n.API}, n.cluster.Network.Args(n.Index)...)
	if n.cluster.Args != nil {
		args = append(args, n.cluster.Args(n.Index)...)
	}
	cmd := n.cluster.Command(append(args, extra...)...)
	if n.cluster.Harm {
		cmd.Env = append(cmd.Env, harm.Variable+"="+n.orders())
	}
	log, err := os.OpenFile(n.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	defer log.Close()
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	begin := time.Now()
	if err := n.cluster.Network.Start(n.Index, cmd); err != nil {
		return fmt.Errorf("start %s: %w", n.Name, err)
	}
	exited := make(chan struct{})
	n.mu.Lock()
	n.cmd, n.exited = cmd, exited
	n.mu.Unlock()
	lines := make(chan ready, 1)
	go func() {
		n.readReady(out, lines)
		_ = cmd.Wait() // how it ended is in its log; that it ended is what counts here
		close(exited)
	}()
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	select {
	case _, ok := <-lines:
		if ok {
			n.mu.Lock()
			n.ready = time.Since(begin)
			n.mu.Unlock()
			return nil
		}
		<-exited
		return fmt.Errorf("start %s: it ended before it was ready: %s", n.Name, n.lastLog())
	case <-ctx.Done():
		return fmt.Errorf("start %s: not ready after %s (%w): %s", n.Name, time.Since(begin).Round(time.Millisecond), ctx.Err(), n.lastLog())
	}
}

// readReady gives the first ready line to lines. A later one says that the node goes on with a new identity.
func (n *Node) readReady(out io.Reader, lines chan<- ready) {
	defer close(lines)
	r := bufio.NewReader(out)
	for told := false; ; {
		line, err := r.ReadBytes('\n')
		var m ready
		if json.Unmarshal(line, &m) == nil && m.Ready {
			n.mu.Lock()
			n.id = m.ID
			n.mu.Unlock()
			if !told {
				told = true
				lines <- m
			}
		}
		if err != nil {
			return // the process has ended
		}
	}
}

// Log is the file of its log.
func (n *Node) Log() string { return filepath.Join(n.cluster.Dir, n.Name+".log") }

func (n *Node) lastLog() string {
	raw, err := os.ReadFile(n.Log())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(raw)), "\n")
	return fmt.Sprintf("%s (all of it: %s)", lines[len(lines)-1], n.Log())
}

// ID is its peer id, once it was ready.
func (n *Node) ID() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.id
}

// Ready is how long its last start took until it was ready.
func (n *Node) Ready() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ready
}

// PID of its process; 0 when none runs.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.runningLocked() {
		return 0
	}
	return n.cmd.Process.Pid
}

// Running says whether its process runs.
func (n *Node) Running() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.runningLocked()
}

func (n *Node) runningLocked() bool {
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.exited:
		return false
	default:
		return true
	}
}

// Client is a client of its control API, which is reached whatever its links do.
func (n *Node) Client() (apiv1connect.ControlClient, error) {
	c, err := api.Dial(api.Target{Addr: n.API})
	if err != nil {
		return nil, fmt.Errorf("reach %s: %w", n.Name, err)
	}
	return c, nil
}

// Kill kills the node and its components at once, as the loss of power would, and returns when that was.
func (n *Node) Kill() (time.Time, error) {
	pid := n.PID()
	if pid == 0 {
		return time.Time{}, fmt.Errorf("kill %s: it does not run", n.Name)
	}
	below, err := descendants(pid)
	if err != nil {
		return time.Time{}, err
	}
	at := time.Now()
	for _, p := range append([]int{pid}, below...) {
		if kerr := syscall.Kill(p, syscall.SIGKILL); kerr != nil && !errors.Is(kerr, syscall.ESRCH) {
			err = errors.Join(err, fmt.Errorf("kill %s, process %d: %w", n.Name, p, kerr))
		}
	}
	n.mu.Lock()
	exited := n.exited
	n.mu.Unlock()
	<-exited
	reap(below)
	return at, err
}

// Components lists the processes that the node has started.
func (n *Node) Components() ([]int, error) {
	pid := n.PID()
	if pid == 0 {
		return nil, fmt.Errorf("components of %s: it does not run", n.Name)
	}
	return descendants(pid)
}

// Stop suspends the node and its components (SIGSTOP), Cont wakes them. Once Stop has returned, none of them runs any more; the time is that of the signal.
func (n *Node) Stop() (time.Time, error) {
	at, err := n.signalAll(syscall.SIGSTOP)
	if err != nil {
		return at, err
	}
	below, err := n.Components()
	if err != nil {
		return at, err
	}
	for deadline := at.Add(10 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		running := 0
		for _, pid := range append(below, n.PID()) {
			r, err := runningThreads(pid)
			if err != nil {
				return at, err
			}
			running += r
		}
		if running == 0 {
			return at, nil
		}
		if time.Now().After(deadline) {
			return at, fmt.Errorf("stop %s: %d of its threads still run 10s after SIGSTOP", n.Name, running)
		}
	}
}

// runningThreads counts the threads of a process that have not stopped: each one stops when the kernel next has to do with it, so a process is not
// suspended at once.
func runningThreads(pid int) (int, error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil // it has ended
	}
	if err != nil {
		return 0, fmt.Errorf("look at the threads of process %d: %w", pid, err)
	}
	running := 0
	for _, t := range tasks {
		raw, err := os.ReadFile(filepath.Join(dir, t.Name(), "stat"))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return 0, fmt.Errorf("look at the threads of process %d: %w", pid, err)
		}
		_, rest, _ := strings.Cut(string(raw), ") ") // after the name, which may hold anything but this
		if state := rest[:min(1, len(rest))]; !strings.Contains("TtZX", state) {
			running++
		}
	}
	return running, nil
}

// Cont wakes what Stop suspended.
func (n *Node) Cont() (time.Time, error) { return n.signalAll(syscall.SIGCONT) }

func (n *Node) signalAll(sig syscall.Signal) (time.Time, error) {
	below, err := n.Components()
	if err != nil {
		return time.Time{}, err
	}
	at := time.Now()
	for _, p := range append([]int{n.PID()}, below...) {
		if kerr := syscall.Kill(p, sig); kerr != nil && !errors.Is(kerr, syscall.ESRCH) {
			err = errors.Join(err, fmt.Errorf("%s to %s, process %d: %w", sig, n.Name, p, kerr))
		}
	}
	return at, err
}

// Term asks the node to end and waits until it has.
func (n *Node) Term(ctx context.Context) error {
	n.mu.Lock()
	cmd, exited, runs := n.cmd, n.exited, n.runningLocked()
	n.mu.Unlock()
	if !runs {
		return nil
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("end %s: %w", n.Name, err)
	}
	select {
	case <-exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end %s: it still runs: %w", n.Name, ctx.Err())
	}
}

// Harm orders what the node's process is harmed with, from now on and over restarts. What it was harmed with before is over.
func (n *Node) Harm(o harm.Orders) error { return o.Write(n.orders()) }

func (n *Node) orders() string { return filepath.Join(n.cluster.Dir, n.Name+".harm") }

// Ended waits until the node's process has ended by itself, and returns its exit status.
func (n *Node) Ended(ctx context.Context) (int, error) {
	n.mu.Lock()
	cmd, exited := n.cmd, n.exited
	n.mu.Unlock()
	if cmd == nil {
		return 0, fmt.Errorf("wait for the end of %s: it was never started", n.Name)
	}
	select {
	case <-exited:
		return cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for the end of %s: it still runs: %w", n.Name, context.Cause(ctx))
	}
}

// Cut takes its link away, Heal gives it back.
func (n *Node) Cut() error { return n.cluster.Network.Cut(n.Index) }

// Heal gives its link back.
func (n *Node) Heal() error { return n.cluster.Network.Heal(n.Index) }

// Deaf has what this node is sent by another one vanish, one way; with reset it is answered by a reset of the connection.
func (n *Node) Deaf(to *Node, reset bool) error {
	return n.cluster.Network.Block(n.Index, to.Index, reset)
}

// Hear ends all deafness of this node.
func (n *Node) Hear() error { return n.cluster.Network.Unblock(n.Index) }
