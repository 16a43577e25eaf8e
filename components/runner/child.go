package runner

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// child is a process seen through its pidfd: ours, or one that an earlier daemon started.
type child struct {
	pid   int
	proc  *os.Process // nil when adopted: init reaps it
	pidfd *os.File
	group *cgroup
	done  chan struct{}
	exit  ExitStatus   // valid once done is closed
	by    atomic.Value // string: the step of Stop that was taken last
	clean func()       // runs before done is closed

	mu     sync.Mutex // guards reaped: after it the pid, and so the group's number, may belong to others
	reaped bool
}

// watch opens the pidfd of a process that cannot be reaped by anybody but us, or that the caller checks again afterwards.
func watch(pid int, proc *os.Process) (*child, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("pid %d: %w", pid, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("watch pid %d: %w", pid, err)
	}
	return &child{pid: pid, proc: proc, pidfd: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{})}, nil
}

// wait returns when the process has ended and everything of it is cleaned up. It runs on a goroutine of its own, without an operating
// system thread: the pidfd is in the runtime's poller.
func (c *child) wait() {
	if err := c.pollEnd(); err != nil && c.proc == nil {
		// Without a pidfd in the poller an adopted process is looked at instead.
		for unix.Kill(c.pid, 0) == nil {
			time.Sleep(100 * time.Millisecond)
		}
	}
	c.mu.Lock()
	if c.proc != nil {
		// What the process left behind in its group ends with it. Our zombie still holds the group's number.
		_ = unix.Kill(-c.pid, unix.SIGKILL) // ESRCH: nothing left behind
		c.reap()
	} else {
		c.exit = ExitStatus{At: time.Now()}
	}
	c.reaped = true
	c.mu.Unlock()
	if by, ok := c.by.Load().(string); ok {
		c.exit.By = by
	}
	if c.clean != nil {
		c.clean()
	}
	c.pidfd.Close() //nolint:errcheck // nothing was written
	close(c.done)
}

// pollEnd blocks until the pidfd is readable, which is when the process has ended.
func (c *child) pollEnd() error {
	rc, err := c.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			n, err := unix.Poll(p, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return err != nil || n > 0
		}
	})
}

func (c *child) reap() {
	st, err := c.proc.Wait()
	c.exit = ExitStatus{At: time.Now()}
	if err != nil {
		return // Known stays false: somebody else reaped it
	}
	c.exit.Known, c.exit.Code = true, st.ExitCode()
	c.exit.CPU = st.UserTime() + st.SystemTime()
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		c.exit.Signal = unix.SignalName(ws.Signal())
	}
	if ru, ok := st.SysUsage().(*syscall.Rusage); ok {
		c.exit.MaxRSS = uint64(ru.Maxrss) << 10
	}
}

// signal sends sig to the whole process group. It does nothing once the process has ended.
func (c *child) signal(sig unix.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reaped {
		return nil
	}
	if c.proc == nil {
		// The group's number is only ours while its leader lives: ask the pidfd, which cannot name anybody else.
		rc, err := c.pidfd.SyscallConn()
		if err != nil {
			return nil
		}
		var alive error
		if err := rc.Control(func(fd uintptr) { alive = unix.PidfdSendSignal(int(fd), 0, nil, 0) }); err != nil || alive != nil {
			return nil
		}
	}
	if sig == unix.SIGKILL && c.group != nil {
		if err := c.group.kill(); err == nil {
			return nil
		}
	}
	if err := unix.Kill(-c.pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %s to group %d: %w", unix.SignalName(sig), c.pid, err)
	}
	return nil
}

// ended waits for the end, at most d.
func (c *child) ended(d time.Duration, stop <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-c.done:
		return true
	case <-stop:
	case <-t.C:
	}
	return false
}
