package state

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// do runs one keyed call the way the SDK does and returns its reply's body and mark.
func do(ctx context.Context, s *Store, c Call, fn func(tx *Txn) (string, error)) (string, uint64, error) {
	ticket, remembered, err := s.Admit(ctx, c)
	if err != nil {
		return "", 0, err
	}
	if remembered != nil {
		return string(remembered.GetBody()), remembered.GetMark(), nil
	}
	defer ticket.Done()
	tx := s.NewTxn("test", false)
	defer s.Rollback(tx)
	if err := s.Begin(ctx, tx); err != nil {
		return "", 0, err
	}
	body, err := fn(tx)
	if err != nil {
		return "", 0, err
	}
	mark, err := s.Commit(ctx, tx, ticket, &statev1.Reply{Body: []byte(body)})
	return body, mark, err
}

func add(n uint64) func(*Txn) (string, error) {
	return func(tx *Txn) (string, error) {
		v := tx.Uint64("value") + n
		tx.PutUint64("value", v)
		return fmt.Sprint(v), nil
	}
}

func value(s *Store, key string) (out string) {
	tx := s.NewTxn("read", true)
	if err := s.Begin(context.Background(), tx); err != nil {
		return err.Error()
	}
	v, _ := tx.Get(key)
	return string(v)
}

// frames collects a checkpoint.
func frames(t *testing.T, s *Store, since uint64) []*componentv1.StateFrame {
	t.Helper()
	var out []*componentv1.StateFrame
	_, err := s.Checkpoint(since, 1<<10, func(f *componentv1.StateFrame) error {
		out = append(out, proto.CloneOf(f))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func source(frames []*componentv1.StateFrame) func() (*componentv1.StateFrame, error) {
	return func() (*componentv1.StateFrame, error) {
		if len(frames) == 0 {
			return nil, io.EOF
		}
		f := frames[0]
		frames = frames[1:]
		return f, nil
	}
}

func restored(t *testing.T, fs []*componentv1.StateFrame) *Store {
	t.Helper()
	s := New(1, Limits{})
	if _, _, err := s.Restore(source(fs), []uint32{1}); err != nil {
		t.Fatal(err)
	}
	return s
}

// dump is the whole state as text, to compare two stores by.
func dump(s *Store) string {
	v := s.snapshot()
	var b strings.Builder
	fmt.Fprintf(&b, "mark %d schema %d next %d bytes %d dedupe %d\n", v.mark, v.schema, v.nextCall, v.pairBytes, v.dedupe)
	for k, val := range v.pairs.Ascend(allStrings()) {
		fmt.Fprintf(&b, "%q = %x\n", k, val)
	}
	for k, r := range v.replies.Ascend(allCalls()) {
		fmt.Fprintf(&b, "%v -> %d %x %q %v\n", k, r.GetMark(), r.GetFingerprint(), r.GetBody(), r.GetHeaders())
	}
	for c, n := range v.lows.Ascend(allStrings()) {
		fmt.Fprintf(&b, "%q low %d\n", c, n)
	}
	return b.String()
}

func TestRetryGetsTheSameReply(t *testing.T) {
	s := New(1, Limits{})
	ctx := t.Context()
	first, mark, err := do(ctx, s, Call{Key: "c/1", Fingerprint: 7}, add(5))
	if err != nil || first != "5" || mark != 1 {
		t.Fatalf("first: %q %d %v", first, mark, err)
	}
	again, mark2, err := do(ctx, s, Call{Key: "c/1", Fingerprint: 7}, add(5))
	if err != nil || again != "5" || mark2 != mark {
		t.Fatalf("again: %q %d %v", again, mark2, err)
	}
	if _, _, err := do(ctx, s, Call{Key: "c/1", Fingerprint: 8}, add(6)); !errors.Is(err, ErrKeyReused) {
		t.Fatalf("another request under the same key: %v", err)
	}
	if s.Mark() != 1 {
		t.Fatalf("mark %d", s.Mark())
	}
}

func TestErrorRollsBackAndIsNotRemembered(t *testing.T) {
	s := New(1, Limits{})
	ctx := t.Context()
	boom := errors.New("boom")
	_, _, err := do(ctx, s, Call{Key: "k"}, func(tx *Txn) (string, error) {
		tx.Put("a", []byte("1"))
		return "", boom
	})
	if !errors.Is(err, boom) || value(s, "a") != "" || s.Mark() != 0 {
		t.Fatalf("%v %q %d", err, value(s, "a"), s.Mark())
	}
	if body, _, err := do(ctx, s, Call{Key: "k"}, add(1)); err != nil || body != "1" {
		t.Fatalf("the retry runs: %q %v", body, err)
	}
	_, _, err = do(ctx, s, Call{}, func(tx *Txn) (string, error) {
		tx.Put("a", []byte("1"))
		tx.Put("b", make([]byte, MaxValueBytes+1))
		return "", nil
	})
	if !errors.Is(err, ErrTooLarge) || value(s, "a") != "" {
		t.Fatalf("too large: %v %q", err, value(s, "a"))
	}
}

func TestReadersSeeOneVersion(t *testing.T) {
	s := New(1, Limits{})
	ctx := t.Context()
	for i := range 100 {
		if _, _, err := do(ctx, s, Call{}, func(tx *Txn) (string, error) { tx.Put(fmt.Sprintf("k%02d", i), []byte("old")); return "", nil }); err != nil {
			t.Fatal(err)
		}
	}
	reader := s.NewTxn("reader", true)
	if err := s.Begin(ctx, reader); err != nil {
		t.Fatal(err)
	}
	if _, _, err := do(ctx, s, Call{}, func(tx *Txn) (string, error) {
		for k := range tx.All("k") { // the loop writes what it walks over
			tx.Put(k, []byte("new"))
			tx.Delete("k50")
		}
		return "", nil
	}); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, v := range reader.All("k") {
		if string(v) != "old" {
			t.Fatalf("a reader saw %q", v)
		}
		n++
	}
	if n != 100 || reader.Mark() != 100 {
		t.Fatalf("%d keys at mark %d", n, reader.Mark())
	}
	reader.Put("x", nil)
	if !errors.Is(reader.Err(), ErrReadOnly) {
		t.Fatalf("write in a reader: %v", reader.Err())
	}
}

func TestRangesAndPrefixes(t *testing.T) {
	s := New(1, Limits{})
	keys := []string{"", "a", "a\xff", "a\xff\xff", "ab", "b", "b/1", "b/2", "c", "\xfe", "\xfe1", "\xff", "\xff\xff"}
	if _, _, err := do(t.Context(), s, Call{}, func(tx *Txn) (string, error) {
		for _, k := range keys {
			tx.Put(k, []byte(k))
		}
		return "", nil
	}); err != nil {
		t.Fatal(err)
	}
	tx := s.NewTxn("r", true)
	if err := s.Begin(t.Context(), tx); err != nil {
		t.Fatal(err)
	}
	for _, prefix := range append([]string{"zz", "b/"}, keys...) {
		var want []string
		for _, k := range slices.Sorted(slices.Values(keys)) {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		if got := slices.Sorted(maps.Keys(maps.Collect(tx.All(prefix)))); !slices.Equal(got, want) {
			t.Errorf("prefix %q: %q, want %q", prefix, got, want)
		}
	}
	for range tx.From("a", "b") {
		t.Error("a start beyond the prefix")
	}
	if got := maps.Collect(tx.From("b/", "b/2")); len(got) != 1 {
		t.Errorf("from: %q", got)
	}
	if got := slices.Collect(maps.Keys(maps.Collect(tx.Range("b", "c")))); len(got) != 3 {
		t.Errorf("range: %q", got)
	}
}

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

// history makes a random state.
func history(t *testing.T, s *Store, rng *rand.Rand, calls int) {
	t.Helper()
	if err := makeHistory(t.Context(), s, rng, calls); err != nil {
		t.Fatal(err)
	}
}

func makeHistory(ctx context.Context, s *Store, rng *rand.Rand, calls int) error {
	low := uint64(0)
	for i := range calls {
		c := Call{}
		switch rng.IntN(3) {
		case 0:
			c.Key = fmt.Sprintf("plain %d", rng.IntN(50))
		case 1:
			if rng.IntN(4) == 0 {
				low = s.Mark() - min(s.Mark(), 5)
			}
			c = Call{Key: fmt.Sprintf("caller/%d", s.Mark()+1), Low: low}
		}
		_, _, err := do(ctx, s, c, func(tx *Txn) (string, error) {
			for range rng.IntN(5) {
				k := fmt.Sprintf("key %03d", rng.IntN(300))
				if rng.IntN(4) == 0 {
					tx.Delete(k)
					continue
				}
				tx.Put(k, slices.Repeat([]byte{byte(i)}, rng.IntN(1<<rng.IntN(13))))
			}
			if rng.IntN(10) == 0 {
				if _, err := tx.NextCall(); err != nil {
					return "", err
				}
			}
			return strings.Repeat("r", rng.IntN(20)), nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func TestRestoreIsTheSameState(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		s := New(1, Limits{})
		history(t, s, rng, 100)
		full := frames(t, s, 0)
		if got, want := dump(restored(t, full)), dump(s); got != want {
			t.Fatalf("seed %d: restored\n%s\nwant\n%s", seed, got, want)
		}
		since := s.Mark()
		history(t, s, rng, 30)
		delta := frames(t, s, since)
		if delta[0].GetSinceMark() != since {
			t.Fatalf("seed %d: not a delta", seed)
		}
		r := restored(t, slices.Concat(full, delta))
		if got, want := dump(r), dump(s); got != want {
			t.Fatalf("seed %d: full and delta\n%s\nwant\n%s", seed, got, want)
		}
		if _, _, err := r.Restore(source(delta), []uint32{1}); err != nil || dump(r) != dump(s) {
			t.Fatalf("seed %d: a delta again: %v", seed, err)
		}
		history(t, r, rng, 20) // it goes on from there
	}
}

func TestDeltasEqualFull(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	s, standby := New(1, Limits{}), New(1, Limits{})
	f, err := s.Follow(0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	written := make(chan error, 1)
	go func() { written <- makeHistory(t.Context(), s, rng, 300) }()
	for standby.Mark() < 100 {
		e, err := f.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var fs []*componentv1.StateFrame
		if err := EntryFrames(e, 1<<10, func(f *componentv1.StateFrame) error { fs = append(fs, f); return nil }); err != nil {
			t.Fatal(err)
		}
		if _, _, err := standby.Restore(source(fs), []uint32{1}); err != nil {
			t.Fatal(err)
		}
	}
	live := frames(t, s, standby.Mark()) // while it is being written to
	if _, _, err := standby.Restore(source(live), []uint32{1}); err != nil {
		t.Fatal(err)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if _, _, err := standby.Restore(source(frames(t, s, standby.Mark())), []uint32{1}); err != nil {
		t.Fatal(err)
	}
	if got, want := dump(standby), dump(restored(t, frames(t, s, 0))); got != want {
		t.Fatalf("standby\n%s\nwant\n%s", got, want)
	}
}

func TestFollowerNobodyReads(t *testing.T) {
	s := New(1, Limits{JournalBytes: 4 << 10, BacklogBytes: 8 << 10})
	put := func() error {
		_, _, err := do(t.Context(), s, Call{}, func(tx *Txn) (string, error) { tx.Put("k", make([]byte, 1000)); return "", nil })
		return err
	}
	for range 50 { // nobody follows: the journal only forgets
		if err := put(); err != nil {
			t.Fatal(err)
		}
	}
	if st := s.Stats(); st.JournalBytes > 5<<10 {
		t.Fatalf("journal of %d bytes", st.JournalBytes)
	}
	if _, err := s.Follow(3); !errors.Is(err, ErrGone) {
		t.Fatalf("follow from long ago: %v", err)
	}
	if _, err := s.Follow(51); !errors.Is(err, ErrFuture) {
		t.Fatalf("follow from the future: %v", err)
	}
	if fs := frames(t, s, 3); fs[0].GetSinceMark() != 0 {
		t.Fatal("a checkpoint since a mark that is gone must be full")
	}
	f, err := s.Follow(50)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; put() == nil; n++ {
	}
	if err := put(); !errors.Is(err, ErrBacklog) || n < 8 || n > 10 {
		t.Fatalf("after %d unread entries: %v", n, err)
	}
	for i := range n {
		e, err := f.Next(t.Context())
		if err != nil || e.Mark != uint64(51+i) {
			t.Fatalf("entry %d: %d %v", i, e.Mark, err)
		}
	}
	if err := put(); err != nil {
		t.Fatalf("after reading: %v", err)
	}
	for ; put() == nil; n++ {
	}
	f.Close()
	if err := put(); err != nil {
		t.Fatalf("after the follower has gone: %v", err)
	}
}

func TestDamagedStreamsChangeNothing(t *testing.T) {
	s := New(1, Limits{})
	history(t, s, rand.New(rand.NewPCG(3, 3)), 60)
	good := frames(t, s, 0)
	since := s.Mark()
	history(t, s, rand.New(rand.NewPCG(4, 4)), 5)
	delta := frames(t, s, since)
	old := New(1, Limits{})
	history(t, old, rand.New(rand.NewPCG(5, 5)), 5)
	before := dump(old)
	edit := func(i int, f func(*componentv1.StateFrame)) []*componentv1.StateFrame {
		c := slices.Clone(good)
		c[i] = proto.CloneOf(c[i])
		f(c[i])
		return c
	}
	resealed := func(f func(*componentv1.StateFrame)) func(*componentv1.StateFrame) {
		return func(x *componentv1.StateFrame) { f(x); x.Xxh64 = Digest(x) }
	}
	cases := map[string][]*componentv1.StateFrame{
		"a flipped bit":          edit(2, func(f *componentv1.StateFrame) { f.Data[10] ^= 1 }),
		"a torn frame":           edit(2, func(f *componentv1.StateFrame) { f.Data = f.Data[:10] }),
		"another mark":           edit(0, func(f *componentv1.StateFrame) { f.Mark++ }),
		"a missing frame":        slices.Delete(slices.Clone(good), 2, 3),
		"a repeated frame":       slices.Insert(slices.Clone(good), 2, good[2]),
		"no end":                 good[:len(good)-1],
		"cut in the middle":      good[:len(good)/2],
		"no header":              good[1:],
		"two headers":            slices.Insert(slices.Clone(good), 1, good[0]),
		"an unknown section":     edit(2, resealed(func(f *componentv1.StateFrame) { f.Section = "files" })),
		"an unread schema":       edit(0, resealed(func(f *componentv1.StateFrame) { f.Schema = 9 })),
		"a wrong total":          edit(0, resealed(func(f *componentv1.StateFrame) { f.TotalBytes++ })),
		"an end of another mark": edit(len(good)-1, resealed(func(f *componentv1.StateFrame) { f.Mark++ })),
		"rubbish":                edit(1, resealed(func(f *componentv1.StateFrame) { f.Data = slices.Repeat([]byte{0xff}, 400) })),
		"a delta without base":   delta,
		"a delta with a gap":     slices.Concat(good, slices.Delete(slices.Clone(delta), 1, 2)),
	}
	for name, fs := range cases {
		var corrupt *CorruptError
		if _, _, err := old.Restore(source(fs), []uint32{1}); !errors.As(err, &corrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if dump(old) != before {
			t.Fatalf("%s: the state changed", name)
		}
	}
	broken := errors.New("connection lost")
	n := 0
	_, _, err := old.Restore(func() (*componentv1.StateFrame, error) {
		if n++; n > 3 {
			return nil, broken
		}
		return good[n-1], nil
	}, []uint32{1})
	if !errors.Is(err, broken) || dump(old) != before {
		t.Fatalf("a lost connection: %v", err)
	}
	if _, _, err := old.Restore(source(good), []uint32{1}); err != nil {
		t.Fatalf("the undamaged one: %v", err)
	}
}

func TestLargeValuesCrossFrames(t *testing.T) {
	s := New(1, Limits{})
	big := slices.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	if _, _, err := do(t.Context(), s, Call{Key: "k"}, func(tx *Txn) (string, error) {
		tx.Put("a", big)
		tx.Put("b", nil)
		tx.Put("c", big[:100])
		return string(big[:5000]), nil
	}); err != nil {
		t.Fatal(err)
	}
	if got := dump(restored(t, frames(t, s, 0))); got != dump(s) {
		t.Fatal("a large value did not come back")
	}
	var fs []*componentv1.StateFrame
	f, err := s.Follow(0)
	if err != nil {
		t.Fatal(err)
	}
	e, err := f.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := EntryFrames(e, 0, func(f *componentv1.StateFrame) error { fs = append(fs, f); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(fs) < 4 || dump(restored(t, fs)) != dump(s) {
		t.Fatalf("a large entry in %d frames did not come back", len(fs))
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

func TestUseAfterTheEnd(t *testing.T) {
	s := New(1, Limits{})
	var leaked *Txn
	if _, _, err := do(t.Context(), s, Call{}, func(tx *Txn) (string, error) { leaked = tx; tx.Put("a", []byte("1")); return "", nil }); err != nil {
		t.Fatal(err)
	}
	leaked.Put("a", []byte("2"))
	if _, ok := leaked.Get("a"); ok || !errors.Is(leaked.Err(), ErrEnded) || value(s, "a") != "1" {
		t.Fatalf("%v %q", leaked.Err(), value(s, "a"))
	}
}

// FuzzRestore: whatever comes in, a restore refuses or yields a state that checkpoints and restores to itself.
func FuzzRestore(f *testing.F) {
	s := New(1, Limits{})
	tx := s.NewTxn("seed", false)
	if err := s.Begin(context.Background(), tx); err != nil {
		f.Fatal(err)
	}
	tx.Put("a", []byte("b"))
	if _, err := s.Commit(context.Background(), tx, nil, nil); err != nil {
		f.Fatal(err)
	}
	var seed []byte
	if _, err := s.Checkpoint(0, 0, func(fr *componentv1.StateFrame) error {
		b, err := proto.Marshal(fr)
		seed = append(append(seed, byte(len(b))), b...)
		return err
	}); err != nil {
		f.Fatal(err)
	}
	f.Add(seed, true)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, raw []byte, reseal bool) {
		recv := func() (*componentv1.StateFrame, error) {
			if len(raw) == 0 {
				return nil, io.EOF
			}
			n := min(int(raw[0])+1, len(raw))
			var fr componentv1.StateFrame
			err := proto.Unmarshal(raw[1:n], &fr)
			raw = raw[n:]
			if reseal {
				fr.Xxh64 = Digest(&fr)
			}
			return &fr, err
		}
		r := New(1, Limits{})
		if _, _, err := r.Restore(recv, []uint32{1}); err != nil {
			if dump(r) != dump(New(1, Limits{})) {
				t.Fatal("a refused restore changed the state")
			}
			return
		}
		if got := dump(restored(t, frames(t, r, 0))); got != dump(r) {
			t.Fatalf("restored\n%s\nwant\n%s", got, dump(r))
		}
	})
}
