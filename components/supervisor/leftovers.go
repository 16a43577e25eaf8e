package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coppice-project/coppice/components/runner"
)

// identDir holds one file per process of this node, so that the next daemon can find what this one left behind when it is killed.
const identDir = ".processes"

// remember writes down a process that was started, until it has ended; then it tells ended.
func (s *Supervisor) remember(p runner.Process, ended func()) {
	dir := filepath.Join(s.cfg.DataDir, identDir)
	b, err := json.Marshal(p.Ident())
	if err == nil {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			err = os.WriteFile(identFile(dir, p), b, 0o600)
		}
	}
	if err != nil {
		s.cfg.Log.Warn("a process could not be noted; if this node is killed it ends itself when its lease lapses", "instance", p.Ident().Instance, "error", err)
	}
	watch := func() {
		<-p.Done()
		ended()
		if err := os.Remove(identFile(dir, p)); err != nil && !errors.Is(err, os.ErrNotExist) {
			s.cfg.Log.Warn("note of a process", "error", err)
		}
	}
	if !s.spawn(watch) {
		go watch() // it began while the node was stopping and is about to end
	}
}

func identFile(dir string, p runner.Process) string {
	return filepath.Join(dir, fmt.Sprintf("%d.json", p.Ident().Pid))
}

// endLeftovers ends the processes that an earlier daemon of this node left behind. They serve nobody: their node socket is gone. Ending
// them before anything is claimed keeps two processes of an instance from running here at once.
func (s *Supervisor) endLeftovers(ctx context.Context) {
	dir := filepath.Join(s.cfg.DataDir, identDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			s.cfg.Log.Warn("notes of processes", "error", err)
		}
		return
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.HasSuffix(e.Name(), ".json") {
			s.endLeftover(ctx, path)
		}
		if err := os.Remove(path); err != nil {
			s.cfg.Log.Warn("note of a process", "error", err)
		}
	}
}

func (s *Supervisor) endLeftover(ctx context.Context, path string) {
	b, err := os.ReadFile(path)
	if err != nil {
		s.cfg.Log.Warn("note of a process", "error", err)
		return
	}
	var id runner.Ident
	if err := json.Unmarshal(b, &id); err != nil {
		s.cfg.Log.Warn("note of a process is damaged", "file", path, "error", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	p, err := s.cfg.Runner.Adopt(ctx, id, runner.Spec{Instance: id.Instance, RunDir: s.runDir(id.Instance), LogDir: filepath.Join(s.cfg.LogDir, fileName(id.Instance))})
	if errors.Is(err, runner.ErrGone) {
		return
	}
	if err != nil {
		s.cfg.Log.Warn("a process of an earlier start could not be ended; it ends itself when its lease lapses", "instance", id.Instance, "pid", id.Pid, "error", err)
		return
	}
	if err := p.Kill(); err != nil {
		s.cfg.Log.Warn("a process of an earlier start could not be ended", "instance", id.Instance, "pid", id.Pid, "error", err)
		return
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
	}
	s.cfg.Log.Info("ended a process of an earlier start", "instance", id.Instance, "pid", id.Pid)
}
