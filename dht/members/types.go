package members

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// State is what this node holds of a member.
type State uint8

const (
	// Alive: heard, or told of by one who heard it.
	Alive State = iota
	// Suspect: this node, one of its watchers, has not heard it; the others are being asked. Not told to others.
	Suspect
	// Dead: confirmed, or remembered from an earlier run of this node and not met since.
	Dead
	// Left: said goodbye, or was expelled.
	Left
	// Quarantined: alive, but died too often of late; not used until its back-off is over (30 s, doubling to 10 min) or it is readmitted.
	Quarantined
)

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "unknown"
}

var stateNames = [...]string{"alive", "suspect", "dead", "left", "quarantined"}

// Running reports whether a member in this state is taken to run: alive, suspect or quarantined.
func (s State) Running() bool { return s == Alive || s == Suspect || s == Quarantined }

// Info is what a node says of itself. Values handed out share their slices and map: do not change them.
type Info struct {
	ID                                peer.ID
	Name                              string
	Addrs                             []string
	Zone, Role                        string
	Labels                            map[string]string
	CPUMillis, MemoryBytes, DiskBytes uint64
	Version, Platform                 string
	Boot                              uint64 // random per process start
	Counter                           uint64 // raised with every change and refutation
	StartedUnixMs                     int64  // by the node's own clock; orders its boots, so it may be raised a little to outrank an earlier one
	Draining, NoVoter, NoHolder       bool
	MaxFormat                         uint32
	Watchers                          []peer.ID

	readmitted version // an operator said that deaths of earlier versions count no more; zero: nobody did
	rest       string  // what a newer version says besides, as it stands in the message: it is passed on
}

func (i Info) clone() Info {
	i.Addrs = slices.Clone(i.Addrs)
	i.Labels = maps.Clone(i.Labels)
	i.Watchers = slices.Clone(i.Watchers)
	return i
}

// sameFor reports whether subscribers need not be told of the difference.
func (i Info) sameFor(o Info) bool {
	return i.ID == o.ID && i.Name == o.Name && i.Zone == o.Zone && i.Role == o.Role && i.CPUMillis == o.CPUMillis &&
		i.MemoryBytes == o.MemoryBytes && i.DiskBytes == o.DiskBytes && i.Version == o.Version && i.Platform == o.Platform &&
		i.Boot == o.Boot && i.Draining == o.Draining && i.NoVoter == o.NoVoter && i.NoHolder == o.NoHolder &&
		i.MaxFormat == o.MaxFormat && slices.Equal(i.Addrs, o.Addrs) && maps.Equal(i.Labels, o.Labels)
}

// Member is a member as this node sees it.
type Member struct {
	Info
	State      State
	Since      time.Time     // this node has seen it in this state since then
	Evidence   string        // why it is in this state
	RTT        time.Duration // smoothed; 0 where no heartbeats pass between the two
	Connection string        // "direct", "relayed" …, "" while there is none
}

// Change is a difference in the view. A member that is new here has an Old without an ID; Old.Boot != New.Boot (both set) says that
// the old process is gone, whatever the states. Changes of RTT, Connection, Counter and Watchers alone are not told.
type Change struct {
	Old, New Member
	Trigger  string // admitted, heard, update, reboot, refuted, suspect, refused, silence, goodbye, expelled, quarantine, readmitted
}

// version orders what a node says of itself.
type version struct {
	started       int64
	boot, counter uint64
}

func (i Info) version() version { return version{i.StartedUnixMs, i.Boot, i.Counter} }

func (v version) compare(o version) int {
	return cmp.Or(cmp.Compare(v.started, o.started), cmp.Compare(v.boot, o.boot), cmp.Compare(v.counter, o.counter))
}

func (v version) sameBoot(o version) bool { return v.started == o.started && v.boot == o.boot }

// verdict ends what a node says of itself, up to a version. It is replaced, never changed; nil is none.
type verdict struct {
	kind     State // Dead or Left
	at       version
	evidence string
	by       []peer.ID
	proof    bool
	since    time.Time // when it was decided, by this node's clock
}

// covers reports whether the verdict ends this version.
func (v *verdict) covers(i version) bool { return v != nil && v.at.compare(i) >= 0 }

// newer orders verdicts; of two at the same version the goodbye counts.
func (v *verdict) newer(o *verdict) bool {
	if o == nil || v == nil {
		return v != nil
	}
	return cmp.Or(v.at.compare(o.at), cmp.Compare(v.kind, o.kind)) > 0
}
