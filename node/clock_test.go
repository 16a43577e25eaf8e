package node

import (
	"testing"
	"time"
)

// A clock that is wrong by years, or jumps, does not tell what time it is in the cluster, as long as most are right.
func TestTheTimeOfTheClusterIsThatOfMost(t *testing.T) {
	var boot time.Duration
	c := newClusterClock(func() time.Duration { return boot })
	right := time.Date(2030, 5, 1, 12, 0, 0, 0, time.UTC)
	ahead := func(of time.Time, clocks ...time.Time) (out []time.Duration) {
		for _, x := range clocks {
			out = append(out, x.Sub(of))
		}
		return out
	}
	in1970, in2100 := time.Unix(300, 0), right.AddDate(70, 0, 0)
	for _, x := range []struct {
		name   string
		own    time.Time
		others []time.Time
		want   time.Time
	}{
		{"alone", in1970, nil, in1970},
		{"1970 and one that is right", in1970, []time.Time{right}, right},
		{"right, and one in 1970", right, []time.Time{in1970}, right},
		{"1970 among three", in1970, []time.Time{right, right.Add(time.Second)}, right},
		{"2100 among three", in2100, []time.Time{right, right.Add(time.Second)}, right.Add(time.Second)},
		{"right between both", right, []time.Time{in2100, in1970}, right},
		{"right, and two in 1970 of five", right, []time.Time{in1970, in1970, right, right}, right},
	} {
		c.look(x.own, ahead(x.own, x.others...))
		if got := c.now(); !got.Equal(x.want) {
			t.Errorf("%s: %s, want %s", x.name, got, x.want)
		}
		boot += time.Minute
		if got := c.now(); !got.Equal(x.want.Add(time.Minute)) {
			t.Errorf("%s, a minute later: %s", x.name, got)
		}
	}
}
