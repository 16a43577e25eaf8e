package component

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// home are the folders of one process of the component: work, where the program runs, and aside, for the mirror of its state. Beside them lies a file that is
// locked while the process lives: two may share the folder above, for a while, and what a process left that was killed goes when the next one comes.
type home struct {
	dir, work, aside string
	lock             *os.File
}

const (
	homePrefix = "run-"
	lockSuffix = ".lock"
)

// makeHome makes the folders below dir and removes what ended processes have left there.
func makeHome(dir string) (*home, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	lock, err := os.CreateTemp(dir, homePrefix+"*"+lockSuffix)
	if err != nil {
		return nil, fmt.Errorf("make the folder of the program: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock the folder of the program: %w", err), lock.Close())
	}
	base := strings.TrimSuffix(lock.Name(), lockSuffix)
	h := &home{dir: base, work: filepath.Join(base, "work"), aside: filepath.Join(base, "aside"), lock: lock}
	for _, d := range []string{h.work, h.aside} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, errors.Join(fmt.Errorf("make the folder of the program: %w", err), lock.Close())
		}
	}
	return h, sweep(dir, lock.Name())
}

// sweep removes the folders of processes that have ended.
func sweep(dir, own string) error {
	locks, err := filepath.Glob(filepath.Join(dir, homePrefix+"*"+lockSuffix))
	if err != nil {
		return err
	}
	for _, name := range locks {
		if name == own {
			continue
		}
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("remove what an ended process left: %w", err)
		}
		info, serr := f.Stat()
		// A lock that was made just now may not be taken yet by its owner: it is left to the next one that comes.
		if lerr := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); lerr == nil && serr == nil && settled(info, name) {
			err = errors.Join(os.RemoveAll(strings.TrimSuffix(name, lockSuffix)), os.Remove(name))
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("remove what an ended process left: %w", err)
		}
	}
	return nil
}

// settled: its folder is there, which is made after the lock was taken; or it is so old that nobody is about to take it.
func settled(lock os.FileInfo, name string) bool {
	_, err := os.Stat(strings.TrimSuffix(name, lockSuffix))
	return err == nil || time.Since(lock.ModTime()) > time.Minute
}

// remove is the last thing that the process does with its folders. What it cannot remove, the next one does.
func (h *home) remove() {
	if h == nil {
		return
	}
	_ = os.RemoveAll(h.dir)
	_ = os.Remove(h.lock.Name())
}
