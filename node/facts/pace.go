package facts

import "time"

// Pace is how often a node tells what it measures and compares with others what it was told. What it tells goes to five holders each time, which
// over a slow link is most of what an idle node sends.
type Pace struct {
	Reports time.Duration // how long what was told counts: it is told again after a third, or after a sixth if it has changed
	Records time.Duration // between two comparisons of records; 0: their default
	Events  time.Duration // the same of events
	Attempt time.Duration // how long a holder of records may take to answer; 0: their default
	Rounds  time.Duration // of placement where nothing happens, each of which asks all nodes for what was told; 0: its default
}

// PaceOf a profile.
func PaceOf(profile string) Pace {
	if profile == "wan" {
		return Pace{Reports: 3 * time.Minute, Records: time.Minute, Events: 30 * time.Second, Attempt: 1500 * time.Millisecond, Rounds: 30 * time.Second}
	}
	return Pace{Reports: 30 * time.Second, Rounds: 10 * time.Second}
}
