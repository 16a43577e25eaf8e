package arbiter

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
)

// TestIdleIsQuiet: what an idle group sends, before TLS and TCP.
func TestIdleIsQuiet(t *testing.T) {
	for profile, most := range map[string]float64{"lan": 8000, "wan": 2000} {
		t.Run(profile, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t, 31)
				defer c.close()
				ends := map[int]*peers.Endpoint{}
				c.adjust = func(cfg *Config) {
					cfg.Profile, cfg.Timings = profile, Timings{}
					ends[len(ends)] = cfg.Peers.(*peers.Endpoint)
				}
				c.grow(7)
				c.settled(2*time.Minute, 5, 0)
				time.Sleep(time.Minute)
				before := map[int]uint64{}
				for i, e := range ends {
					_, before[i] = e.Sent()
				}
				const span = 100 * time.Second
				time.Sleep(span)
				var all, top float64
				for i, e := range ends {
					_, b := e.Sent()
					rate := float64(b-before[i]) / span.Seconds()
					all += rate
					top = max(top, rate)
				}
				t.Logf("%s: mean %.0f B/s a node, leader %.0f B/s", profile, all/7, top)
				if all/7 > most/4 || top > most {
					t.Errorf("too much: mean %.0f, most %.0f B/s", all/7, top)
				}
			})
		})
	}
}
