package state

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestConcurrentCallsRunOnceEach: many callers, each sending every call several times at once, end with every call counted once.
func TestConcurrentCallsRunOnceEach(t *testing.T) {
	s := New(1, Limits{})
	const callersN, callsN, copies = 8, 50, 3
	var wg sync.WaitGroup
	for c := range callersN {
		for n := range callsN {
			replies := make(chan string, copies)
			for range copies {
				wg.Go(func() {
					body, _, err := do(t.Context(), s, Call{Key: fmt.Sprintf("c%d/%d", c, n)}, add(1))
					if err != nil {
						t.Error(err)
					}
					replies <- body
				})
			}
			wg.Go(func() {
				first := <-replies
				for range copies - 1 {
					if other := <-replies; other != first {
						t.Errorf("two replies to one call: %s and %s", first, other)
					}
				}
			})
		}
	}
	wg.Wait()
	body, _, err := do(t.Context(), s, Call{}, add(0))
	if err != nil || body != fmt.Sprint(callersN*callsN) {
		t.Fatalf("%s %v", body, err)
	}
}

func TestSecondWithTheSameKeyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(1, Limits{})
		begin := time.Now()
		go func() {
			if _, _, err := do(t.Context(), s, Call{Key: "k"}, func(tx *Txn) (string, error) {
				time.Sleep(3 * time.Second)
				return add(1)(tx)
			}); err != nil {
				t.Error(err)
			}
		}()
		synctest.Wait()
		body, _, err := do(t.Context(), s, Call{Key: "k"}, add(1))
		if err != nil || body != "1" || time.Since(begin) != 3*time.Second {
			t.Fatalf("%q %v after %v", body, err, time.Since(begin))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		hold := s.NewTxn("holder", false)
		if err := s.Begin(t.Context(), hold); err != nil {
			t.Fatal(err)
		}
		if _, _, err := do(ctx, s, Call{}, add(1)); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "holder") {
			t.Fatalf("waiting for a held state: %v", err)
		}
		s.Rollback(hold)
	})
}

func TestLowWaterLetsGo(t *testing.T) {
	s := New(1, Limits{})
	ctx := t.Context()
	for n := range 10 {
		if _, _, err := do(ctx, s, Call{Key: fmt.Sprintf("a/b/%d", n), Low: uint64(max(0, n-2))}, add(1)); err != nil {
			t.Fatal(err)
		}
	}
	if st := s.Stats(); st.Replies != 3 {
		t.Fatalf("%d replies are kept", st.Replies)
	}
	if _, _, err := do(ctx, s, Call{Key: "a/b/3"}, add(1)); !errors.Is(err, ErrAnswered) {
		t.Fatalf("a call that was answered and let go: %v", err)
	}
	if body, _, err := do(ctx, s, Call{Key: "a/b/8"}, add(1)); err != nil || body != "9" {
		t.Fatalf("%q %v", body, err)
	}
}

func TestFullTableRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(1, Limits{DedupeBytes: 10 * 300})
		ctx := t.Context()
		call := func(key string, low uint64) error {
			_, _, err := do(ctx, s, Call{Key: key, Low: low}, func(tx *Txn) (string, error) {
				_, _ = add(1)(tx)
				return strings.Repeat("x", 100), nil
			})
			return err
		}
		n := 0
		for ; call(fmt.Sprintf("plain-%d", n), 0) == nil; n++ {
		}
		if err := call("another", 0); !errors.Is(err, ErrTableFull) || n < 9 {
			t.Fatalf("after %d: %v", n, err)
		}
		before := s.Mark()
		if err := call("numbered/1", 1); !errors.Is(err, ErrTableFull) || s.Mark() != before {
			t.Fatalf("%v", err)
		}
		if _, _, err := do(ctx, s, Call{}, add(1)); err != nil {
			t.Fatalf("a call without a key: %v", err)
		}
		if err := call("plain-0", 0); err != nil {
			t.Fatalf("a retry in a full table: %v", err)
		}
		time.Sleep(9 * time.Minute)
		if err := call("plain-0", 0); err != nil { // seen: kept for 10 min from now
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if err := call("another", 0); err != nil {
			t.Fatalf("after the others aged: %v", err)
		}
		mark := s.Mark()
		if err := call("plain-0", 0); err != nil || s.Mark() != mark {
			t.Fatalf("the one seen again was let go: %v", err)
		}
	})
}

func TestFullTableYieldsToLowWater(t *testing.T) {
	s := New(1, Limits{DedupeBytes: 2000})
	n := 1
	call := func(low uint64) error {
		_, _, err := do(t.Context(), s, Call{Key: fmt.Sprintf("c/%d", n), Low: low}, add(1))
		return err
	}
	for ; call(1) == nil; n++ {
	}
	if err := call(uint64(n)); err != nil {
		t.Fatalf("its low-water mark makes room: %v", err)
	}
}

// TestOwnCallsKeepTheirNumbers: a rolled-back transaction's number is taken again, and the low-water mark moves with durability only.
func TestOwnCallsKeepTheirNumbers(t *testing.T) {
	s := New(1, Limits{})
	take := func(fail bool) (n uint64) {
		_, _, err := do(t.Context(), s, Call{}, func(tx *Txn) (string, error) {
			var err error
			if n, err = tx.NextCall(); err == nil && fail {
				err = errors.New("no")
			}
			return "", err
		})
		if (err != nil) != fail {
			t.Fatal(err)
		}
		return n
	}
	if a, b, c := take(true), take(false), take(false); a != 1 || b != 1 || c != 2 {
		t.Fatal(a, b, c)
	}
	if s.CallLow() != 1 {
		t.Fatalf("low %d before anything is durable", s.CallLow())
	}
	s.SetDurable(1)
	if s.CallLow() != 2 {
		t.Fatalf("low %d", s.CallLow())
	}
	r := restored(t, frames(t, s, 0))
	if r.CallLow() != 3 {
		t.Fatalf("restored low %d", r.CallLow())
	}
}
