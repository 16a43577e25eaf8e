package members

import (
	"fmt"
	"time"
)

const (
	fanOut        = 64                     // partners: whom a node tells of something urgent directly
	chosen        = 32                     // so many of them, where there are more members, it chooses itself; others chose it
	urgentTo      = 4                      // partners to whom news of deaths and the like is passed on
	newsTo        = 2                      // the same of the rest, which exchanges may bring as well
	urgentEvery   = 100 * time.Millisecond // at most, news of deaths and the like is passed on; what comes in between goes together
	newsEvery     = 500 * time.Millisecond // the same of the rest
	meetAfterNews = time.Second            // after urgent news an exchange follows soon, for gossip misses a few
	tickEvery     = 100 * time.Millisecond // of the loop; also measures the node's own delay
	lateAfter     = 200 * time.Millisecond
	lateWindow    = 5 // seconds over which the worst delay counts
	maxSlack      = 4 // by how much, at most, timeouts widen while the node is starved

	maxInquiries = 32 // at once
	maxContacts  = 32 // redials at once
	maxFirst     = 4  // of them with nodes not met since this node started
	maxUnknown   = 4096
	maxStates    = 4096 // in one push
	maxBeat      = 64 << 10

	keepLost     = 7 * 24 * time.Hour // the long tail: lost members are redialled for so long,
	keepTail     = 1024               // and so many of them, those that were seen last; the others have to come by themselves
	redialFirst  = time.Second
	redialUnmet  = 200 * time.Millisecond // first wait for members not met since this node started
	redialMost   = 5 * time.Minute
	reportPause  = 5 * time.Second // between two looks at a node because of somebody's report
	freshVerdict = 5 * time.Second // older news of a death only makes the node look for itself
	shunFor      = time.Minute     // a watcher that does not answer is not chosen again for so long

	flapWindow  = 2 * time.Minute
	flapDeaths  = 3 // more deaths than this in flapWindow quarantine a node
	flapBackoff = 30 * time.Second
	flapMost    = 10 * time.Minute
	maxEnds     = 64               // of its own lives that a node remembers
	flapForget  = 30 * time.Minute // without a death; then the back-off begins from the start

	// A verdict reaches so many counters ahead of what its author knew, lest an update sent just before a death undo it.
	verdictReach = 1 << 20

	rivalsBeforeAlarm = 3 // more than a clock that was set back explains

	saveEvery   = time.Second
	callTimeout = time.Second // of a push or an exchange
)

// Profile is a set of timeouts. Use LAN, WAN or ProfileOf.
type Profile struct {
	Name      string
	Heartbeat time.Duration // between two beats to each watcher
	Silence   time.Duration // without a byte, then a node is suspect
	RTTs      int           // so many p99 round trips are added to Silence
	Watchers  int           // k; fewer in small clusters
	Probe     time.Duration // how long a fresh dial may take
	Exchange  time.Duration // between two exchanges with a random member, which carry what pushes have missed
	Ask       time.Duration // how long another watcher may take to answer; more than Probe, which it may have to wait for
}

// LAN confirms a silent machine within two seconds; for local it is the same.
var LAN = Profile{
	Name: "lan", Heartbeat: 350 * time.Millisecond, Silence: 1250 * time.Millisecond, Watchers: 5,
	Probe: 250 * time.Millisecond, Ask: 400 * time.Millisecond, Exchange: 10 * time.Second,
}

// WAN costs a fifth of LAN's traffic and confirms a silent machine within six seconds.
var WAN = Profile{
	Name: "wan", Heartbeat: time.Second, Silence: 3500 * time.Millisecond, RTTs: 4, Watchers: 3,
	Probe: time.Second, Ask: 1500 * time.Millisecond, Exchange: 30 * time.Second,
}

// ProfileOf returns the profile of a name: lan, wan or local.
func ProfileOf(name string) (Profile, error) {
	switch name {
	case "lan", "":
		return LAN, nil
	case "local":
		p := LAN
		p.Name = name
		return p, nil
	case "wan":
		return WAN, nil
	}
	return Profile{}, fmt.Errorf("profile %q is unknown: use lan, wan or local", name)
}
