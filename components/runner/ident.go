package runner

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// bootID names this boot of the machine: a pid and its start time mean nothing after a reboot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("identify this boot: %w; is /proc mounted?", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// startTicks reads when a process started, in clock ticks after boot (field 22 of /proc/PID/stat). A zombie counts as gone.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("pid %d: %w", pid, ErrGone)
	}
	if err != nil {
		return 0, fmt.Errorf("pid %d: %w", pid, err)
	}
	return parseStat(pid, b)
}

func parseStat(pid int, b []byte) (uint64, error) {
	// The second field is the program's name in parentheses and may hold anything, parentheses and spaces included.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, fmt.Errorf("pid %d: unreadable /proc stat", pid)
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return 0, fmt.Errorf("pid %d: unreadable /proc stat", pid)
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, fmt.Errorf("pid %d has ended: %w", pid, ErrGone)
	}
	t, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("pid %d: unreadable /proc stat: %w", pid, err)
	}
	return t, nil
}

// same reports whether the process of id is still there, by boot, pid and start time.
func (id Ident) same(boot string) error {
	if id.BootID != boot {
		return fmt.Errorf("pid %d is of an earlier boot: %w", id.Pid, ErrGone)
	}
	if id.Pid <= 1 {
		return fmt.Errorf("pid %d cannot be a component: %w", id.Pid, ErrGone)
	}
	t, err := startTicks(id.Pid)
	if err != nil {
		return err
	}
	if t != id.StartTicks {
		return fmt.Errorf("pid %d is another process now: %w", id.Pid, ErrGone)
	}
	return nil
}
