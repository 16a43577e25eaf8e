package arbiter

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"

	"github.com/hashicorp/go-hclog"
)

// raftLog passes what raft has to say to slog, one level lower: an error of raft's is a peer that did not answer, as a rule.
type raftLog struct {
	log  *slog.Logger
	name string
	args []any
}

func newRaftLog(l *slog.Logger) hclog.Logger { return &raftLog{log: l, name: "raft"} }

var levels = map[hclog.Level]slog.Level{hclog.Info: slog.LevelDebug, hclog.Warn: slog.LevelDebug, hclog.Error: slog.LevelInfo}

// Log implements hclog.Logger.
func (r *raftLog) Log(level hclog.Level, msg string, args ...any) {
	to, ok := levels[level]
	if !ok {
		return // trace and debug
	}
	if !r.log.Enabled(context.Background(), to) {
		return
	}
	out := make([]any, 0, len(args))
	for _, a := range args {
		if f, isFormat := a.(hclog.Format); isFormat && len(f) > 0 {
			a = fmt.Sprintf(fmt.Sprint(f[0]), f[1:]...)
		}
		out = append(out, a)
	}
	r.log.Log(context.Background(), to, r.name+": "+msg, out...)
}

// The rest implements hclog.Logger.

func (r *raftLog) Trace(string, ...any)          {}
func (r *raftLog) Debug(string, ...any)          {}
func (r *raftLog) Info(msg string, args ...any)  { r.Log(hclog.Info, msg, args...) }
func (r *raftLog) Warn(msg string, args ...any)  { r.Log(hclog.Warn, msg, args...) }
func (r *raftLog) Error(msg string, args ...any) { r.Log(hclog.Error, msg, args...) }
func (r *raftLog) IsTrace() bool                 { return false }
func (r *raftLog) IsDebug() bool                 { return false }
func (r *raftLog) IsInfo() bool                  { return true }
func (r *raftLog) IsWarn() bool                  { return true }
func (r *raftLog) IsError() bool                 { return true }
func (r *raftLog) ImpliedArgs() []any            { return r.args }
func (r *raftLog) With(args ...any) hclog.Logger {
	return &raftLog{log: r.log.With(args...), name: r.name, args: append(r.args, args...)}
}
func (r *raftLog) Name() string                   { return r.name }
func (r *raftLog) Named(name string) hclog.Logger { return r.ResetNamed(r.name + "." + name) }
func (r *raftLog) ResetNamed(name string) hclog.Logger {
	return &raftLog{log: r.log, name: name, args: r.args}
}
func (r *raftLog) SetLevel(hclog.Level)  {}
func (r *raftLog) GetLevel() hclog.Level { return hclog.Info }

func (r *raftLog) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(r.StandardWriter(o), "", 0)
}

func (r *raftLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer { return lineWriter{r} }

type lineWriter struct{ r *raftLog }

func (w lineWriter) Write(p []byte) (int, error) {
	w.r.Info(string(p))
	return len(p), nil
}
