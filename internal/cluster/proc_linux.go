package cluster

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// BecomeReaper makes this process the one that inherits what its descendants leave behind.
func BecomeReaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of one's descendants: %w", err)
	}
	return nil
}

// process is one line of the process table.
type process struct {
	pid, parent int
	zombie      bool
}

func processes() ([]process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var out []process
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		if fields, ok := statFields(pid); ok {
			parent, err := strconv.Atoi(fields[1])
			if err != nil {
				return nil, fmt.Errorf("list processes: the parent of %d: %w", pid, err)
			}
			out = append(out, process{pid, parent, fields[0] == "Z"})
		}
	}
	return out, nil
}

// statFields are the fields of /proc/PID/stat from the state on; ok is false when the process is gone.
func statFields(pid int) ([]string, bool) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, false
	}
	fields := strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
	return fields, len(fields) > 13
}

// descendants lists the processes below one, parents first.
func descendants(of int) ([]int, error) {
	all, err := processes()
	if err != nil {
		return nil, err
	}
	below := []int{of}
	for i := 0; i < len(below); i++ {
		for _, p := range all {
			if p.parent == below[i] && !p.zombie {
				below = append(below, p.pid)
			}
		}
	}
	return below[1:], nil
}

// reap takes dead children off the process table that no exec.Cmd waits for.
func reap(pids []int) {
	end := time.Now().Add(time.Second)
	for _, pid := range pids {
		for time.Now().Before(end) {
			got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
			if err != nil || got == pid { // not a child of ours (any more), or done
				break
			}
			time.Sleep(200 * time.Microsecond)
		}
	}
}

// Usage is what a process has used.
type Usage struct {
	RSS  uint64        // bytes, now
	CPU  time.Duration // user and system, since its start
	Time time.Time
}

// UsageOf reads what a process has used.
func UsageOf(pid int) (Usage, error) {
	u := Usage{Time: time.Now()}
	fields, ok := statFields(pid)
	if !ok {
		return u, fmt.Errorf("measure process %d: it is gone", pid)
	}
	const ticksPerSecond = 100 // of the kernel's interface, on every architecture Go runs on
	for _, f := range fields[11:13] {
		n, err := strconv.ParseUint(f, 10, 64)
		if err != nil {
			return u, fmt.Errorf("measure process %d: %w", pid, err)
		}
		u.CPU += time.Duration(n) * time.Second / ticksPerSecond
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return u, fmt.Errorf("measure process %d: %w", pid, err)
	}
	parts := strings.Fields(string(raw))
	if len(parts) < 2 {
		return u, fmt.Errorf("measure process %d: statm is %q", pid, raw)
	}
	pages, err := strconv.ParseUint(parts[1], 10, 64)
	u.RSS = pages * uint64(os.Getpagesize())
	return u, err
}
