package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Entry is what a running node tells commands of the same user on the same machine.
type Entry struct {
	PID   int    `json:"pid"`
	Start string `json:"start,omitempty"` // of the process, as the kernel counts; tells a reused pid apart
	Name  string `json:"name"`
	API   string `json:"api"`            // as --api takes it
	HTTP  string `json:"http,omitempty"` // the gateway, as http://host:port
	Data  string `json:"data"`           // the data directory, absolute
}

// NoneError says that no node runs here.
type NoneError struct{ Dir string }

func (e *NoneError) Error() string { return "no node of this user runs on this machine" }

// SeveralError says that several nodes run here and one must be named.
type SeveralError struct{ Entries []Entry }

func (e *SeveralError) Error() string {
	var list []string
	for _, n := range e.Entries {
		list = append(list, n.Name+" ("+n.API+")")
	}
	return fmt.Sprintf("%d nodes run on this machine: %s", len(e.Entries), strings.Join(list, ", "))
}

// Discover finds the only node that runs as this user on this machine: *NoneError or *SeveralError otherwise.
func Discover() (Entry, error) {
	entries, err := Registered()
	switch {
	case err != nil:
		return Entry{}, err
	case len(entries) == 0:
		return Entry{}, &NoneError{}
	case len(entries) > 1:
		return Entry{}, &SeveralError{entries}
	}
	return entries[0], nil
}

// Register announces a running node of this process until the returned function is called. A node that dies without calling it leaves
// an entry that is ignored, and replaced by the next node over the same data directory. PID and Start are filled in.
func Register(e Entry) (unregister func() error, err error) {
	dir, err := runtimeDir(true)
	if err != nil {
		return nil, err
	}
	if e.Data, err = filepath.Abs(e.Data); err != nil {
		return nil, fmt.Errorf("announce the node: %w", err)
	}
	e.PID = os.Getpid()
	e.Start, _ = startOf(e.PID)
	raw, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("announce the node: %w", err)
	}
	sum := sha256.Sum256([]byte(e.Data))
	path := filepath.Join(dir, hex.EncodeToString(sum[:8])+".json")
	f, err := os.CreateTemp(dir, ".entry-*")
	if err != nil {
		return nil, fmt.Errorf("announce the node: %w", err)
	}
	_, err = f.Write(append(raw, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return nil, fmt.Errorf("announce the node: %w", errors.Join(err, os.Remove(f.Name())))
	}
	return func() error { return withdraw(path, raw) }, nil
}

// withdraw removes an entry unless a newer node has replaced it.
func withdraw(path string, raw []byte) error {
	now, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && !bytes.Equal(bytes.TrimSpace(now), raw) {
		return nil
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("withdraw the announcement of the node: %w", err)
	}
	return nil
}

// Registered lists the nodes that run as this user on this machine, by name. Entries of dead processes and unreadable ones are left out.
func Registered() ([]Entry, error) {
	dir, err := runtimeDir(false)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, fmt.Errorf("look for nodes in %s: %w", dir, err)
	}
	var out []Entry
	for _, path := range files {
		if e, ok := readEntry(path); ok && e.alive() {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b Entry) int { return strings.Compare(a.Name+a.Data, b.Name+b.Data) })
	return out, nil
}

func readEntry(path string) (Entry, bool) {
	f, err := os.Open(path)
	if err != nil {
		return Entry{}, false
	}
	defer f.Close()
	if privateFile(f) != nil {
		return Entry{}, false
	}
	raw, err := io.ReadAll(io.LimitReader(f, 64<<10))
	var e Entry
	if err != nil || json.Unmarshal(raw, &e) != nil || e.PID <= 0 || e.API == "" {
		return Entry{}, false
	}
	return e, true
}

// alive says whether the process that wrote the entry still runs.
func (e Entry) alive() bool {
	if err := syscall.Kill(e.PID, 0); err != nil && !errors.Is(err, syscall.EPERM) {
		return false
	}
	start, known := startOf(e.PID)
	return !known || e.Start == "" || start == e.Start
}

// startOf reads when a process started, in the kernel's clock ticks since boot. known is false where there is no /proc.
func startOf(pid int) (start string, known bool) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", false
	}
	_, rest, ok := bytes.Cut(raw[bytes.LastIndexByte(raw, ')')+1:], []byte(" "))
	fields := strings.Fields(string(rest))
	if !ok || len(fields) < 20 {
		return "", false
	}
	if fields[0] == "Z" {
		return "dead", true // a zombie runs nothing
	}
	return fields[19], true
}

// runtimeDir is the private directory of this user's announcements: $XDG_RUNTIME_DIR/coppice, else /tmp/coppice-<uid>. It must be a real directory of this user's that nobody else may enter: names in a shared directory can be taken by
// others.
func runtimeDir(create bool) (string, error) {
	dir := fmt.Sprintf("/tmp/coppice-%d", os.Getuid())
	if xdg := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(xdg) {
		dir = filepath.Join(xdg, "coppice")
	}
	if create {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return "", fmt.Errorf("runtime directory: %w", err)
		}
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return "", fmt.Errorf("runtime directory: %w", err)
	}
	if !st.IsDir() {
		return "", fmt.Errorf("runtime directory %s is no directory (remove it)", dir)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) != os.Getuid() {
		return "", fmt.Errorf("runtime directory %s belongs to user %d (set XDG_RUNTIME_DIR to a directory of your own)", dir, sys.Uid)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("runtime directory %s has mode %04o, others may enter it (chmod 700 it)", dir, st.Mode().Perm())
	}
	return dir, nil
}
