package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coppice-project/coppice/internal/unison"
)

const (
	// dropEvery is how often the drop folder is looked at.
	dropEvery = 250 * time.Millisecond
	// dropQuiet is how long a file must not have changed before it is taken: nobody is writing it any more.
	dropQuiet = 400 * time.Millisecond
	// dropGivesUp: a file that is incomplete and has not changed for so long is reported as such.
	dropGivesUp = 10 * time.Second
	// dropTimeout bounds the taking in of one dropped file.
	dropTimeout = 2 * time.Minute
	// dropRetry is the pause after the cluster could not take a file in; it doubles up to dropRetryMost.
	dropRetry     = time.Second
	dropRetryMost = time.Minute
)

// Dropped is a file in the drop folder and what became of it.
type Dropped struct {
	File   string
	State  string // waiting | describing | ready | incomplete | refused
	Reason string
	Digest string // once ready
	Since  time.Time

	size    int64
	modTime time.Time
	changed time.Time // when size or time were last seen to change
	tries   int       // that failed for no fault of the file
	again   time.Time // not before
}

// Drops lists the files of the drop folder with their state, by name.
func (r *Registry) Drops() []Dropped {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]Dropped, 0, len(r.drops))
	for _, d := range r.drops {
		out = append(out, *d)
	}
	slices.SortFunc(out, func(a, b Dropped) int { return strings.Compare(a.File, b.File) })
	return out
}

// Run takes in what is dropped until ctx ends. It fails only when the drop folder cannot be read for good.
func (r *Registry) Run(ctx context.Context) error {
	tick := unison.New(dropEvery, string(r.cfg.Self))
	defer tick.Stop()
	var last error
	for {
		if err := r.scan(ctx); err != nil && (last == nil || last.Error() != err.Error()) {
			r.cfg.Log.Error("drop folder", "error", err)
			last = err
		} else if err == nil {
			last = nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			tick.Next()
		}
	}
}

func (r *Registry) scan(ctx context.Context) error {
	entries, err := os.ReadDir(r.cfg.Drop)
	if err != nil {
		return fmt.Errorf("read %s: %w", r.cfg.Drop, err)
	}
	present := map[string]bool{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || strings.HasSuffix(e.Name(), "~") || strings.HasSuffix(e.Name(), ".part") {
			continue
		}
		info, err := os.Stat(filepath.Join(r.cfg.Drop, e.Name())) // of what a link leads to
		if errors.Is(err, os.ErrNotExist) || (err == nil && info.IsDir()) {
			continue
		}
		if err != nil {
			return fmt.Errorf("stat %s: %w", e.Name(), err)
		}
		present[e.Name()] = true
		if r.ripe(e.Name(), info, time.Now()) {
			r.take(ctx, e.Name())
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for name := range r.drops {
		if !present[name] {
			delete(r.drops, name)
		}
	}
	return nil
}

// ripe says whether a file should be taken in now, and keeps the book on it.
func (r *Registry) ripe(name string, info os.FileInfo, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.drops[name]
	if d == nil || d.size != info.Size() || !d.modTime.Equal(info.ModTime()) {
		r.drops[name] = &Dropped{File: name, State: "waiting", Since: now, size: info.Size(), modTime: info.ModTime(), changed: now}
		return false
	}
	return d.State == "waiting" && now.Sub(d.changed) >= dropQuiet && !now.Before(d.again)
}

// take takes one file in and notes the outcome.
func (r *Registry) take(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, dropTimeout)
	defer cancel()
	f, err := openRegular(filepath.Join(r.cfg.Drop, name))
	if err != nil {
		r.refuse(name, err)
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		r.refuse(name, err)
		return
	}
	if _, err := Platform(f, st.Size()); errors.Is(err, ErrIncomplete) {
		r.incomplete(name, err)
		return
	}
	r.settle(name, "describing", "", "")
	art, existed, err := r.Push(ctx, PushRequest{Files: []*os.File{f}})
	switch {
	case err == nil:
		r.settle(name, "ready", "", art.GetDigest())
		if existed {
			r.cfg.Log.Debug("dropped file is known", "file", name, "artifact", art.GetName()+"@"+art.GetVersion())
		}
	case ctx.Err() != nil || transient(err):
		r.cfg.Log.Warn("dropped file could not be taken in yet", "file", name, "error", err)
		r.postpone(name, err)
	default:
		r.refuse(name, err)
	}
}

// transient errors are the cluster's, not the file's: the file is tried again.
func transient(err error) bool {
	var push *PushError
	return !errors.As(err, &push)
}

// openRegular opens a file without waiting, as the opening of a pipe would.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", filepath.Base(path))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// postpone has a file tried again later.
func (r *Registry) postpone(name string, why error) {
	r.settle(name, "waiting", why.Error(), "")
	r.mu.Lock()
	defer r.mu.Unlock()
	if d := r.drops[name]; d != nil {
		d.again = time.Now().Add(min(dropRetry<<min(d.tries, 10), dropRetryMost))
		d.tries++
	}
}

func (r *Registry) incomplete(name string, why error) {
	r.mu.Lock()
	d := r.drops[name]
	long := d != nil && time.Since(d.changed) > dropGivesUp
	r.mu.Unlock()
	if !long {
		return
	}
	r.settle(name, "incomplete", why.Error(), "")
	r.cfg.Notify(Notice{Type: "incomplete", Artifact: name, Reason: why.Error()})
	r.cfg.Log.Warn("dropped file is incomplete", "file", name, "error", why)
}

func (r *Registry) refuse(name string, why error) {
	reason := why.Error()
	var push *PushError
	if errors.As(why, &push) {
		reason = push.Why
	}
	r.settle(name, "refused", reason, "")
	r.cfg.Notify(Notice{Type: "refused", Artifact: name, Reason: reason})
	r.cfg.Log.Warn("dropped file is refused", "file", name, "reason", reason)
}

func (r *Registry) settle(name, state, reason, digest string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if d := r.drops[name]; d != nil {
		d.State, d.Reason, d.Digest, d.Since = state, reason, digest, time.Now()
	}
}
