package main

import (
	"testing"
	"time"
)

// What people write after --at.
func TestEarlier(t *testing.T) {
	c := &cli{now: func() time.Time { return time.Date(2026, 11, 22, 9, 0, 0, 0, time.Local) }}
	today := time.Date(2026, 11, 22, 8, 30, 0, 0, time.Local)
	for at, want := range map[string]time.Time{
		"2026-11-22T10:00:00Z": time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC), "2026-11-22T10:00:00.5+02:00": time.Date(2026, 11, 22, 8, 0, 0, 5e8, time.UTC),
		"08:30": today, "08:30:00": today, "2026-11-22 08:30": today, "2026-11-22T08:30:00": today,
	} {
		if m, err := c.earlier(at); err != nil || !m.GetTime().AsTime().Equal(want) {
			t.Errorf("%s: %v, %v", at, m, err)
		}
	}
	for at, want := range map[string]uint64{"90m": 5_400_000, "1h30m": 5_400_000, "20s ago": 20_000} {
		if m, err := c.earlier(at); err != nil || m.AgoMs == nil || m.GetAgoMs() != want {
			t.Errorf("%s: %v, %v", at, m, err)
		}
	}
	for _, at := range []string{"c7", "42", "0", "@branch-n2-1", "shop/store-0@branch-n2-1"} {
		if m, err := c.earlier(at); err != nil || m.GetId() != at {
			t.Errorf("%s: %v, %v", at, m, err)
		}
	}
	for _, at := range []string{"", " ", "25:61", "2026-13-40", "10:00 tomorrow", "-5m"} {
		if m, err := c.earlier(at); err == nil {
			t.Errorf("%q was taken for %v", at, m)
		}
	}
}
