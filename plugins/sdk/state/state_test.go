package state

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

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

// Two clients come at once with one key and different requests: one of them is carried out, the other waits for that and is refused.
func TestTwoRequestsAtOnceUnderOneKey(t *testing.T) {
	s := New(1, Limits{})
	ctx := t.Context()
	inside, finish := make(chan struct{}), make(chan struct{})
	type result struct {
		body string
		err  error
	}
	results := make(chan result, 2)
	go func() {
		body, _, err := do(ctx, s, Call{Key: "c/1", Fingerprint: 7}, func(tx *Txn) (string, error) {
			close(inside)
			<-finish
			return add(5)(tx)
		})
		results <- result{body, err}
	}()
	<-inside
	second := make(chan result, 1)
	go func() {
		body, _, err := do(ctx, s, Call{Key: "c/1", Fingerprint: 8}, add(6))
		second <- result{body, err}
	}()
	close(finish)
	if r := <-results; r.err != nil || r.body != "5" {
		t.Errorf("the first: %q, %v", r.body, r.err)
	}
	if r := <-second; !errors.Is(r.err, ErrKeyReused) {
		t.Errorf("the second: %q, %v", r.body, r.err)
	}
	if s.Mark() != 1 {
		t.Errorf("mark %d: want one effect", s.Mark())
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
