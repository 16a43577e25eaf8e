package component

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ours are the processes below this one. As this process is the reaper of its descendants none gets out, whatever session or group it made for itself.
type ours struct {
	pid, parent int
	state       byte // of its first thread
}

// descendants lists the processes below the process of, of which what has ended and is not reaped yet (Z) may be part.
func descendants(of int) ([]ours, error) {
	names, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	children := map[int][]ours{}
	for _, name := range names {
		pid, err := strconv.Atoi(filepath.Base(name))
		if err != nil {
			continue
		}
		state, parent, err := stat(name + "/stat")
		if err != nil {
			continue // it has ended
		}
		children[parent] = append(children[parent], ours{pid, parent, state})
	}
	var out []ours
	for next := []int{of}; len(next) > 0; next = next[1:] {
		for _, c := range children[next[0]] {
			out = append(out, c)
			next = append(next, c.pid)
		}
	}
	return out, nil
}

// stat reads the state and the parent of a process or thread.
func stat(file string) (state byte, parent int, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, 0, err
	}
	_, rest, ok := bytes.Cut(b[bytes.LastIndexByte(b, ')')+1:], []byte(" ")) // the name before may hold anything
	f := strings.Fields(string(rest))
	if !ok || len(f) < 2 || len(f[0]) != 1 {
		return 0, 0, fmt.Errorf("%s cannot be read", file)
	}
	parent, err = strconv.Atoi(f[1])
	return f[0][0], parent, err
}

// stands says whether every thread of a process stands still. A process that was told to stop goes on with the system call that it is in.
func stands(pid int) bool {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	threads, err := os.ReadDir(dir)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	for _, t := range threads {
		state, _, err := stat(filepath.Join(dir, t.Name(), "stat"))
		if err == nil && !strings.ContainsRune("TtZX", rune(state)) {
			return false
		}
	}
	return true
}

// freeze stops every process below this one, and returns when all of them stand still: until then they may start others.
func freeze(ctx context.Context) error {
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 10*time.Millisecond) {
		all, err := descendants(os.Getpid())
		if err != nil {
			return err
		}
		var moving []string
		for _, p := range all {
			if p.state == 'Z' || stands(p.pid) {
				continue
			}
			moving = append(moving, strconv.Itoa(p.pid))
			if err := unix.Kill(p.pid, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("stop process %d: %w", p.pid, err)
			}
		}
		if len(moving) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the program does not stand still: process %s goes on: %w", strings.Join(moving, ", "), ctx.Err())
		case <-time.After(wait):
		}
	}
}

// signalAll sends a signal to every process below this one.
func signalAll(sig unix.Signal) error {
	all, err := descendants(os.Getpid())
	for _, p := range all {
		if kerr := unix.Kill(p.pid, sig); kerr != nil && !errors.Is(kerr, unix.ESRCH) {
			err = errors.Join(err, fmt.Errorf("signal %s to process %d: %w", unix.SignalName(sig), p.pid, kerr))
		}
	}
	return err
}

// killAll ends every process below this one. Those that start others meanwhile are found again.
func killAll() error {
	for range 100 {
		all, err := descendants(os.Getpid())
		if err != nil {
			return err
		}
		left := false
		for _, p := range all {
			if p.state != 'Z' {
				left = true
				if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("kill process %d: %w", p.pid, err)
				}
			}
		}
		if !left {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("some of the program's processes do not end: they wait for the kernel (a dead disk or network file system?)")
}

// reap takes what has ended below and that nobody waits for. But for those in known every child is such: its parent has ended.
func reap(known func(pid int) bool) {
	all, err := descendants(os.Getpid())
	if err != nil {
		return
	}
	for _, p := range all {
		if p.state == 'Z' && p.parent == os.Getpid() && !known(p.pid) {
			_, _ = unix.Wait4(p.pid, nil, unix.WNOHANG, nil) // another look comes
		}
	}
}

// mappedFiles are the inodes of files that a process below this one has mapped for writing and sharing: writing to such memory need not show in the
// times of the file. known false: some process does not let us look.
func mappedFiles() (inodes map[uint64]bool, known bool) {
	all, err := descendants(os.Getpid())
	if err != nil {
		return nil, false
	}
	inodes = map[uint64]bool{}
	for _, p := range all {
		if p.state == 'Z' {
			continue
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.pid))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, false
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line) // range, rights, offset, device, inode, path
			if len(f) < 5 || len(f[1]) != 4 || f[1][1] != 'w' || f[1][3] != 's' {
				continue
			}
			if n, err := strconv.ParseUint(f[4], 10, 64); err == nil && n > 0 {
				inodes[n] = true
			}
		}
	}
	return inodes, true
}
