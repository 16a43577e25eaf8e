package supervisor

import (
	"log/slog"
	"testing"
	"time"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
)

// A healthy node hears of the arbiter in time in each profile: its leases are not doubted, and it counts as steady.
func TestAHealthyNodeKeepsItsLeases(t *testing.T) {
	for _, profile := range []members.Profile{members.LAN, members.WAN} {
		most, err := arbiter.Unheard(profile.Name)
		if err != nil {
			t.Fatal(err)
		}
		p := patienceOf(profile.Name)
		if p.away < most || p.outOfTouch <= p.away || p.confirm >= profile.Silence {
			t.Errorf("%s: %+v, but a healthy node hears nothing for up to %s and others act after %s", profile.Name, p, most, profile.Silence)
		}
		var now, heard time.Duration
		l := &lease{boot: func() time.Duration { return now }, touch: func() time.Duration { return now - heard }, log: slog.New(slog.DiscardHandler), bears: p}
		l.away.Store(-int64(time.Hour))
		for range 600 {
			now += leaseTick
			if l.look(func() {}); now-heard >= most-leaseTick {
				heard = now
			}
			if !l.holds() || !l.steady(now) {
				t.Fatalf("%s: after %s, %s after the last word: holds %v, steady %v", profile.Name, now, now-heard, l.holds(), l.steady(now))
			}
		}
		for now-heard <= p.outOfTouch+leaseTick { // and then it is cut off
			now += leaseTick
			l.look(func() {})
		}
		if l.holds() || !l.cutOff() {
			t.Errorf("%s: holds its leases %s after the last word", profile.Name, now-heard)
		}
	}
}
