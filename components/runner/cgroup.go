package runner

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cpuPeriod = 100_000 // microseconds, the kernel's default

// checkCgroupParent says whether groups with memory and CPU limits can be made below dir.
func checkCgroupParent(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return fmt.Errorf("cgroup parent %s: %w; want a delegated cgroup v2 directory", dir, err)
	}
	have := strings.Fields(string(b))
	for _, want := range []string{"cpu", "memory"} {
		found := false
		for _, h := range have {
			found = found || h == want
		}
		if !found {
			return fmt.Errorf("cgroup parent %s: controller %s is not enabled for its children; try: echo +cpu +memory > %s/cgroup.subtree_control", dir, want, dir)
		}
	}
	return nil
}

// cgroup is the control group of one process.
type cgroup struct{ dir string }

// newCgroup makes a group below parent with the limits.
func newCgroup(parent, name string, l Limits) (*cgroup, SandboxReport, error) {
	g := &cgroup{dir: filepath.Join(parent, name)}
	var rep SandboxReport
	if err := os.Mkdir(g.dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, rep, fmt.Errorf("make a cgroup: %w", err)
	}
	set := func(file, value, what string, use bool) {
		if !use {
			return
		}
		if err := os.WriteFile(filepath.Join(g.dir, file), []byte(value), 0o644); err != nil {
			rep.Missing = append(rep.Missing, Gap{what, err.Error()})
			return
		}
		rep.Enforced = append(rep.Enforced, fmt.Sprintf("%s at most %s", what, value))
	}
	set("memory.max", strconv.FormatUint(l.MemoryBytes, 10), "memory", l.MemoryBytes > 0)
	set("cpu.max", fmt.Sprintf("%d %d", l.CPUMillis*cpuPeriod/1000, cpuPeriod), "cpu", l.CPUMillis > 0)
	set("pids.max", strconv.FormatUint(l.Processes, 10), "processes", l.Processes > 0)
	return g, rep, nil
}

func (g *cgroup) open() (int, error) {
	fd, err := unix.Open(g.dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open cgroup %s: %w", g.dir, err)
	}
	return fd, nil
}

// kill ends every process of the group, whatever session it moved to.
func (g *cgroup) kill() error {
	if err := os.WriteFile(filepath.Join(g.dir, "cgroup.kill"), []byte("1"), 0o644); err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return nil
}

// remove deletes the group once it is empty; the kernel needs a moment after the last process.
func (g *cgroup) remove() error {
	var err error
	for range 20 {
		if err = os.Remove(g.dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return fmt.Errorf("remove cgroup: %w", err)
}

// cgroupGaps reports limits that only a cgroup could hold.
func cgroupGaps(l Limits) SandboxReport {
	var rep SandboxReport
	const why = "no delegated cgroup v2 with the cpu and memory controllers"
	if l.MemoryBytes > 0 {
		rep.Missing = append(rep.Missing, Gap{"memory", why + "; GOMEMLIMIT is set as a soft limit"})
	}
	if l.CPUMillis > 0 {
		rep.Missing = append(rep.Missing, Gap{"cpu", why})
	}
	if l.Processes > 0 {
		rep.Missing = append(rep.Missing, Gap{"processes", why})
	}
	return rep
}
