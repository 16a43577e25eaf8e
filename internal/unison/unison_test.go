package unison

import (
	"testing"
	"testing/synctest"
	"time"
)

// Tickers of one key that were made at different times tick at the same instants; those of another key at others.
func TestTickersOfOneKeyTickTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := New(100*time.Millisecond, "n1")
		defer a.Stop()
		time.Sleep(37 * time.Millisecond)
		b, c, other := New(100*time.Millisecond, "n1"), New(500*time.Millisecond, "n1"), New(100*time.Millisecond, "n2")
		defer b.Stop()
		defer c.Stop()
		defer other.Stop()
		at := map[*Ticker][]int64{}
		begin := time.Now()
		for time.Since(begin) < 5*time.Second {
			select {
			case now := <-a.C:
				at[a] = append(at[a], now.UnixNano())
				a.Next()
			case now := <-b.C:
				at[b] = append(at[b], now.UnixNano())
				b.Next()
			case now := <-c.C:
				at[c] = append(at[c], now.UnixNano())
				c.Next()
			case now := <-other.C:
				at[other] = append(at[other], now.UnixNano())
				other.Next()
			}
		}
		for _, x := range []struct {
			t     *Ticker
			every time.Duration
			in    *Ticker
		}{{a, 100 * time.Millisecond, a}, {b, 100 * time.Millisecond, a}, {c, 500 * time.Millisecond, a}, {other, 100 * time.Millisecond, other}} {
			if n := len(at[x.t]); n < int(5*time.Second/x.every)-2 {
				t.Fatalf("%d ticks in 5 s, every %s", n, x.every)
			}
			for _, when := range at[x.t] {
				if (when-at[x.in][0])%int64(100*time.Millisecond) != 0 {
					t.Fatalf("a tick %s beside the others'", time.Duration((when-at[x.in][0])%int64(100*time.Millisecond)))
				}
			}
		}
		if (at[a][0]-at[other][0])%int64(100*time.Millisecond) == 0 {
			t.Fatal("two keys beat in step")
		}
	})
}

// Who is late with a tick does not get two at once for it, and is in step again with the next.
func TestALateReceiverIsInStepAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := New(100*time.Millisecond, "n1")
		defer a.Stop()
		first := <-a.C
		time.Sleep(470 * time.Millisecond)
		a.Next()
		second := <-a.C
		if d := second.Sub(first); d != 600*time.Millisecond {
			t.Fatalf("the tick after a pause of 470 ms came %s after the one before it", d)
		}
		a.Next()
		if d := (<-a.C).Sub(second); d != 100*time.Millisecond {
			t.Fatal(d)
		}
	})
}
