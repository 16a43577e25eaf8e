package history

import (
	"math/rand/v2"
	"testing"
	"time"
)

// CheckCount says what porcupine says, of thousands of short histories of which some were tampered with.
func TestCheckCountDecidesAsPorcupineDoes(t *testing.T) {
	verdicts := map[bool]int{}
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 3))
		var list []Count
		var now time.Duration
		value := int64(0)
		for range 2 + r.IntN(7) {
			c := Count{Call: now}
			now += time.Duration(r.IntN(3))
			if r.IntN(4) == 0 {
				c.Unknown = true
				value += int64(r.IntN(2))
			} else {
				value++
				c.Value = value
			}
			c.Return = now + time.Duration(r.IntN(4))
			now += time.Duration(r.IntN(3))
			list = append(list, c)
		}
		if r.IntN(2) == 0 {
			list[r.IntN(len(list))].Value += int64(r.IntN(3)) - 1
		}
		var ops []Op[int64]
		for i, c := range list {
			ops = append(ops, Op[int64]{Client: i, Call: c.Call, Return: c.Return, Unknown: c.Unknown, Step: func(s int64) (int64, bool) { return s + 1, c.Unknown || s+1 == c.Value }})
		}
		verdict, _ := Check(int64(0), ops, 0)
		why := CheckCount(list)
		if (why == "") != (verdict == Fits) {
			t.Fatalf("seed %d: porcupine says %d, CheckCount %q, of %+v", seed, verdict, why, list)
		}
		verdicts[why == ""]++
	}
	if verdicts[true] < 500 || verdicts[false] < 500 {
		t.Errorf("too few of one kind: %v", verdicts)
	}
}
