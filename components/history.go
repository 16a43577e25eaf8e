package components

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// HistoryFormat is the newest format of a History that this version knows.
const HistoryFormat = 1

const (
	// DefaultHistory is how many earlier checkpoints are kept where the manifest does not say. MaxHistory bounds it: a history is one register.
	DefaultHistory = 10
	MaxHistory     = 500
)

// Why an earlier checkpoint is kept.
const (
	WhyByHand        = "by hand"
	WhyBeforeSwap    = "before swap"
	WhyBeforeRestore = "before restore"
	WhyBeforeUndo    = "before undo"
	WhyPeriodic      = "periodic"
	WhyBranch        = "branch" // a stored branch that was gone back to
)

// Retention says which earlier checkpoints of a component are kept.
type Retention struct {
	Count int
	Age   time.Duration // 0: however old
}

// RetentionOf is what the manifest says about it.
func RetentionOf(spec *componentsv1.ComponentSpec) Retention {
	r := Retention{Count: DefaultHistory}
	st := spec.GetState()
	if st != nil && st.History != nil {
		r.Count = int(min(st.GetHistory(), MaxHistory))
	}
	r.Age, _ = parseAge(st.GetHistoryAge()) // a manifest with another one is refused
	return r
}

// parseAge reads a duration of hours (36h) or days (30d); "" is 0.
func parseAge(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	wrong := fmt.Errorf("found %q, expected a duration from 1h on, such as 36h or 30d", shorten(s))
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil || n == 0 {
			return 0, wrong
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < time.Hour {
		return 0, wrong
	}
	return d, nil
}

// CheckpointID is how people name an entry of a history: c7.
func CheckpointID(number uint64) string { return "c" + strconv.FormatUint(number, 10) }

// Newest is the entry that was made last; nil: there is none.
func Newest(h *componentsv1.History) *componentsv1.HistoryEntry {
	if n := len(h.GetEntries()); n > 0 {
		return h.GetEntries()[n-1]
	}
	return nil
}

// Remember adds an entry to a history, takes out what its retention does not keep, and returns the entry as it is kept: with a number of its own, or, where
// the last one is of the same checkpoint, that. nil: it is not kept, and the history is as it was but for those that are too old.
func Remember(h *componentsv1.History, e *componentsv1.HistoryEntry, r Retention) *componentsv1.HistoryEntry {
	last := Newest(h)
	if last != nil && slices.Equal(last.GetRoot(), e.GetRoot()) {
		if last.GetWhy() == WhyPeriodic {
			last.Why = e.GetWhy()
		}
		e = last
	} else {
		e.UnixMs = max(e.GetUnixMs(), last.GetUnixMs()) // the order of numbers is that of times
		e.Number = h.GetLast() + 1
		h.Entries = append(h.Entries, e)
	}
	thin(h, r, e.GetUnixMs())
	if !slices.Contains(h.GetEntries(), e) {
		return nil
	}
	h.Last = max(h.GetLast(), e.GetNumber())
	return e
}

// Forget takes out what a retention does not keep, and says whether that was anything.
func Forget(h *componentsv1.History, r Retention, nowUnixMs uint64) bool {
	before := len(h.GetEntries())
	thin(h, r, nowUnixMs)
	return len(h.GetEntries()) < before
}

// thin takes out what is too old and, of what is too much, the periodic entries that are missed least, as long as these are more than a third; else the oldest
// of the others.
func thin(h *componentsv1.History, r Retention, nowUnixMs uint64) {
	if r.Age > 0 {
		h.Entries = slices.DeleteFunc(h.Entries, func(e *componentsv1.HistoryEntry) bool {
			return nowUnixMs > e.GetUnixMs() && nowUnixMs-e.GetUnixMs() > uint64(r.Age.Milliseconds())
		})
	}
	periodic := func(e *componentsv1.HistoryEntry) bool { return e.GetWhy() == WhyPeriodic }
	for len(h.Entries) > r.Count {
		n := 0
		for _, e := range h.Entries {
			if periodic(e) {
				n++
			}
		}
		at := slices.IndexFunc(h.Entries, func(e *componentsv1.HistoryEntry) bool { return !periodic(e) })
		if n > r.Count/3 || at < 0 {
			at = leastMissed(h.Entries, nowUnixMs, periodic)
		}
		h.Entries = slices.Delete(h.Entries, at, at+1)
	}
}

// leastMissed is the periodic entry whose loss would leave the smallest hole for its age: what stays lies ever wider apart the older it is. The oldest goes
// only when it is the last one.
func leastMissed(list []*componentsv1.HistoryEntry, nowUnixMs uint64, periodic func(*componentsv1.HistoryEntry) bool) int {
	best, hole := -1, 0.0
	for i, e := range list {
		if !periodic(e) {
			continue
		}
		if best < 0 {
			best, hole = i, 1e300
		}
		if i == 0 {
			continue
		}
		next := nowUnixMs
		if i+1 < len(list) {
			next = list[i+1].GetUnixMs()
		}
		age := float64(nowUnixMs-min(nowUnixMs, e.GetUnixMs())) + 1
		if x := float64(next-min(next, list[i-1].GetUnixMs())) / age; x < hole {
			best, hole = i, x
		}
	}
	return best
}

// Moment names an entry of a history: by its id (c7), by the number of its checkpoint (42), or by a time.
type Moment struct {
	ID   string
	Time time.Time
}

func (m Moment) String() string {
	if m.ID != "" {
		return m.ID
	}
	return m.Time.UTC().Format(time.RFC3339)
}

// ErrNoCheckpoint is wrapped where a history has no such entry.
var ErrNoCheckpoint = errors.New("there is no such checkpoint")

// numbered finds an entry by its number; nil: it is not kept.
func numbered(list []*componentsv1.HistoryEntry, number uint64) *componentsv1.HistoryEntry {
	if at := slices.IndexFunc(list, func(e *componentsv1.HistoryEntry) bool { return e.GetNumber() == number }); at >= 0 {
		return list[at]
	}
	return nil
}

// Replaced notes that the state of another entry took the place of one, if there is an entry of that state.
func Replaced(h *componentsv1.History, left *componentsv1.HistoryEntry, root []byte) {
	for _, e := range h.GetEntries() {
		if slices.Equal(e.GetRoot(), root) {
			left.Then = e.GetNumber()
		}
	}
}

// Find returns the entry that is meant: of a time the last one that was made until then, or what was gone back to from it.
func Find(h *componentsv1.History, m Moment) (*componentsv1.HistoryEntry, error) {
	list := h.GetEntries()
	if len(list) == 0 {
		return nil, fmt.Errorf("%w: its history is empty", ErrNoCheckpoint)
	}
	has := fmt.Sprintf("its history has %d, %s to %s", len(list), CheckpointID(list[0].GetNumber()), CheckpointID(list[len(list)-1].GetNumber()))
	if len(list) == 1 {
		has = "its history has " + CheckpointID(list[0].GetNumber())
	}
	if m.ID != "" {
		for _, e := range slices.Backward(list) {
			if CheckpointID(e.GetNumber()) == m.ID || strconv.FormatUint(e.GetSeq(), 10) == m.ID {
				return e, nil
			}
		}
		return nil, fmt.Errorf("%w: %s is not kept; %s", ErrNoCheckpoint, shorten(m.ID), has)
	}
	at := m.Time.UnixMilli()
	for _, e := range slices.Backward(list) {
		if int64(e.GetUnixMs()) > at {
			continue
		}
		if then := numbered(list, e.GetThen()); then != nil {
			return then, nil
		}
		return e, nil
	}
	return nil, fmt.Errorf("%w: the oldest that is kept, %s, is of %s, which is after %s", ErrNoCheckpoint, CheckpointID(list[0].GetNumber()),
		time.UnixMilli(int64(list[0].GetUnixMs())).UTC().Format(time.RFC3339), m)
}

// Branch says whether the moment names a branch, in full (app/name-0@branch-n2-1) or by its id (@branch-n2-1), and which register of the instance's
// that is.
func (m Moment) Branch(instance string) (key string, is bool, err error) {
	of, rest, is := strings.Cut(m.ID, branchMark)
	if is && of != "" && of != instance {
		return "", true, fmt.Errorf("%w: %s is a branch of %s, not of %s", ErrNoCheckpoint, shorten(m.ID), shorten(of), instance)
	}
	return BranchesOf(instance) + rest, is, nil
}

// EntryOfBranch is a branch as a history has it that was gone back to it.
func EntryOfBranch(b *componentsv1.Branch) *componentsv1.HistoryEntry {
	return &componentsv1.HistoryEntry{
		Seq: b.GetBaseSeq() + b.GetCommits(), Incarnation: b.GetIncarnation(), Epoch: b.GetEpoch(), Root: b.GetRoot(), Mark: b.GetMark(), UnixMs: b.GetUntilUnixMs(),
		Digest: b.GetDigest(), Version: b.GetVersion(), Schema: b.GetSchema(), Bytes: b.GetBytes(), Why: WhyBranch,
	}
}
