package history

import (
	"strings"
	"testing"
	"time"
)

// write and read of one number.
func write(n int, call, ret time.Duration, unknown bool) Op[int] {
	return Op[int]{Name: "write", Call: call, Return: ret, Unknown: unknown, Step: func(int) (int, bool) { return n, true }}
}

func read(n int, call, ret time.Duration) Op[int] {
	return Op[int]{Name: "read", Call: call, Return: ret, Step: func(s int) (int, bool) { return s, s == n }}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name string
		ops  []Op[int]
		want Verdict
	}{
		{"nothing", nil, Fits},
		{"in order", []Op[int]{write(1, 0, 1, false), read(1, 2, 3)}, Fits},
		{"a stale read", []Op[int]{write(1, 0, 1, false), write(2, 2, 3, false), read(1, 4, 5)}, Impossible},
		{"at the same time", []Op[int]{write(1, 0, 9, false), read(0, 1, 2), read(1, 3, 4)}, Fits},
		{"there and gone", []Op[int]{write(1, 0, 9, false), read(1, 1, 2), read(0, 3, 4)}, Impossible},
		{"in doubt and done late", []Op[int]{write(1, 0, 0, true), read(0, 5, 6), read(1, 7, 8)}, Fits},
		{"in doubt and never done", []Op[int]{write(1, 0, 0, true), read(0, 5, 6)}, Fits},
		{"not before its call", []Op[int]{read(1, 0, 1), write(1, 2, 0, true)}, Impossible},
	} {
		got, why := Check(0, c.ops, 0)
		if got != c.want || (got == Impossible) != strings.Contains(why, "none fits") {
			t.Errorf("%s: %v %q", c.name, got, why)
		}
	}
}
