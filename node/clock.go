package node

import (
	"context"
	"slices"
	"sync"
	"time"
)

// clusterClock is what time it is in the cluster: that of the middle one of the clocks of the nodes that this node hears of. One machine's clock
// may stand in 1970, or jump by hours; what expires must not depend on which node is asked. It is for dates that are written down and compared on
// another node (join tokens), and for nothing that could be measured: who owns what depends on no clock's value.
//
// The median is looked for every minute, and in between the time is counted by CLOCK_BOOTTIME: a jump of this machine's clock is not
// followed before the others were asked.
type clusterClock struct {
	boot func() time.Duration

	mu   sync.Mutex // guards the rest
	wall time.Time  // at the last look
	at   time.Duration
}

func newClusterClock(boot func() time.Duration) *clusterClock {
	return &clusterClock{boot: boot, wall: time.Now().Round(0), at: boot()}
}

// now is the time of the cluster.
func (c *clusterClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wall.Add(c.boot() - c.at)
}

// look takes this machine's clock, and by how much those of others are ahead of it.
func (c *clusterClock) look(own time.Time, ahead []time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall, c.at = own.Round(0).Add(median(append([]time.Duration{0}, ahead...))), c.boot()
}

// median is the middle one; of two in the middle the later: a clock that stands in the past is the more common fault.
func median(list []time.Duration) time.Duration {
	slices.Sort(list)
	return list[len(list)/2]
}

// lookAtClocks compares this machine's clock with what others said of theirs, and returns whether any did. How long ago they said it is
// measured here.
func (n *Node) lookAtClocks(ctx context.Context) bool {
	var ahead []time.Duration
	reports, ages := n.hostFacts(ctx)
	now := time.Now()
	for id, h := range reports {
		if id != n.id && h.WallUnixMs > 0 && n.isAlive(id) {
			ahead = append(ahead, time.UnixMilli(h.WallUnixMs).Add(ages[id]).Sub(now))
		}
	}
	n.clock.look(now, ahead)
	return len(ahead) > 0
}

// clusterNow is the time by which join tokens expire.
func (n *Node) clusterNow() time.Time { return n.clock.now() }
