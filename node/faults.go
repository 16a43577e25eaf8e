package node

import (
	"log/slog"
	"slices"
	"sync"
	"time"
)

// faults keeps the last failure of each background work of the node, so that status shows what goes wrong now.
type faults struct {
	log *slog.Logger

	mu   sync.Mutex // guards last
	last map[string]fault
}

type fault struct {
	why string
	at  time.Time
}

// faultShown is how long a failure is shown after it was last seen.
const faultShown = time.Minute

func newFaults(log *slog.Logger) *faults { return &faults{log: log, last: map[string]fault{}} }

// set notes how a piece of background work went. A nil error clears what was noted.
func (f *faults) set(what string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		delete(f.last, what)
		return
	}
	old, had := f.last[what]
	f.last[what] = fault{err.Error(), time.Now()}
	if !had || old.why != err.Error() {
		f.log.Warn(what, "error", err)
	}
}

// list returns what went wrong lately, one line each.
func (f *faults) list() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for what, x := range f.last {
		if time.Since(x.at) < faultShown {
			out = append(out, what+": "+x.why)
		}
	}
	slices.Sort(out)
	return out
}
