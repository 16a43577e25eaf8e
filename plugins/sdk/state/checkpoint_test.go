package state

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

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
	if _, _, err := old.Restore(source(good), []uint32{1}); err != nil {
		t.Fatalf("the undamaged one: %v", err)
	}
}

func TestLostConnectionChangesNothing(t *testing.T) {
	s, old := New(1, Limits{}), New(1, Limits{})
	history(t, s, rand.New(rand.NewPCG(3, 3)), 60)
	history(t, old, rand.New(rand.NewPCG(5, 5)), 5)
	before, good, lost := dump(old), frames(t, s, 0), errors.New("connection lost")
	n := 0
	_, _, err := old.Restore(func() (*componentv1.StateFrame, error) {
		if n++; n > 3 {
			return nil, lost
		}
		return good[n-1], nil
	}, []uint32{1})
	if !errors.Is(err, lost) || dump(old) != before {
		t.Fatal(err)
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
