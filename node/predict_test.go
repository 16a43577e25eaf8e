package node

import (
	"math"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/facts"
)

// How long a restart would take goes by what was measured: of the component by its owner, and of restores by the node that would do it.
func TestARestartIsPredictedFromWhatWasMeasured(t *testing.T) {
	hosts := map[peer.ID]hostReport{
		"fast": {Facts: facts.Facts{restoreFact: 200}}, "slow": {Facts: facts.Facts{restoreFact: 50}}, "new": {Facts: facts.Facts{}},
	}
	r := instanceReport{LaunchMs: 40, BeginMs: 5, StartedMs: 900}
	for _, c := range []struct {
		what    string
		next    peer.ID
		mib     uint64
		standby string
		hosts   map[peer.ID]hostReport
		want    float64
	}{
		{"no state", "fast", 0, "", hosts, 75},
		{"a large one, by a fast node", "fast", 100, "", hosts, 575},
		{"by a slow one", "slow", 100, "", hosts, 2075},
		{"by one that has restored nothing: the mean", "new", 100, "", hosts, 875},
		{"nobody has", "new", 100, "", nil, 930},
		{"a standby is ready there", "slow", 100, "there", hosts, 35},
		{"a standby is ready elsewhere", "slow", 100, "elsewhere", hosts, 2075},
	} {
		in := &apiv1.Instance{WouldRestartOn: "there", CheckpointBytes: c.mib << 20, StandbyNode: c.standby}
		if got := predictRestart(in, r, c.next, c.hosts); math.Abs(got-c.want) > 0.001 {
			t.Errorf("%s: %.1f ms, want %.1f", c.what, got, c.want)
		}
	}
}
