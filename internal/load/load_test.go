package load

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	kvv1 "github.com/coppice-project/coppice/plugins/kv/v1"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

// scripted answers as told and notes what it was asked.
type scripted struct {
	answers []error // one per attempt; then all are answered
	asked   []string
}

func (s *scripted) ask(_ context.Context, gw int, r request) (reply, error) {
	s.asked = append(s.asked, fmt.Sprintf("g%d %s %s %s%s %d %s", gw, r.kind, r.key, r.cart, r.name, r.quantity, r.isbn))
	if len(s.answers) == 0 {
		return reply{number: 1}, nil
	}
	err := s.answers[0]
	s.answers = s.answers[1:]
	return reply{}, err
}

func runnerFor(t *testing.T, seed uint64, keys int) *Runner {
	t.Helper()
	r := &Runner{
		cfg: Config{
			Seed: seed, Run: "t", Ledger: filepath.Join(t.TempDir(), "ledger"), Gateways: []Gateway{{Name: "a"}, {Name: "b"}}, Reads: 0.3, KVKeys: keys,
			KV: "kv/kv", KVClients: 1, ValueBytes: 8, Deadline: time.Second, Attempt: time.Second,
		},
		stats: newStats(), changed: make(chan struct{}),
	}
	for i := range 100 {
		r.books = append(r.books, fmt.Sprint(1000+i))
	}
	var err error
	if r.ledger, err = createLedger(r.cfg.Ledger); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.ledger.close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func steps(t *testing.T, seed uint64, shop bool, n int) []string {
	t.Helper()
	s := &scripted{}
	c := newClient(runnerFor(t, seed, 4), 0, "t.c0", "x", s, shop)
	for range n {
		c.step(t.Context(), time.Now())
	}
	return s.asked
}

func TestSeedDecidesWhatClientsDo(t *testing.T) {
	for _, shop := range []bool{true, false} {
		a, b, other := steps(t, 1, shop, 200), steps(t, 1, shop, 200), steps(t, 2, shop, 200)
		if !slices.Equal(a, b) {
			t.Errorf("shop %t: the same seed does other things", shop)
		}
		if slices.Equal(a, other) {
			t.Errorf("shop %t: another seed does the same", shop)
		}
	}
}

// Each order of a cart is of another book, or two orders could not be told apart when they are read back.
func TestOrdersOfACartHaveDifferentBooks(t *testing.T) {
	seen := map[string]bool{}
	for _, line := range steps(t, 3, true, 2000) {
		f := strings.Fields(line)
		if f[1] != opAdd {
			continue
		}
		what := f[3] + " " + f[len(f)-1]
		if seen[what] {
			t.Fatalf("%s twice", what)
		}
		seen[what] = true
	}
}

func TestRepeatsWithTheSameKeyElsewhere(t *testing.T) {
	s := &scripted{answers: []error{errors.New("gone"), errors.New("gone"), nil}}
	c := newClient(runnerFor(t, 1, 0), 0, "t.c0", "x", s, true)
	res := c.execute(t.Context(), op{kind: opOrder, cart: "c"})
	if res.outcome != answered || res.attempts != 3 || len(s.asked) != 3 {
		t.Fatalf("%+v %q", res, s.asked)
	}
	for i, want := range []string{"g0 order t.c0/1 ", "g1 order t.c0/1 ", "g0 order t.c0/1 "} {
		if !strings.HasPrefix(s.asked[i], want) {
			t.Errorf("attempt %d: %q", i, s.asked[i])
		}
	}
	s.answers = []error{&finalError{"only 1 copies of it are left"}}
	if res := c.execute(t.Context(), op{kind: opOrder, cart: "c"}); res.outcome != refused || res.attempts != 1 {
		t.Errorf("a refusal: %+v", res)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.answers = []error{errors.New("gone")}
	if res := c.execute(ctx, op{kind: opOrder, cart: "c"}); res.outcome != doubt {
		t.Errorf("an end without an answer: %+v", res)
	}
}

func TestWhatIsReadBack(t *testing.T) {
	add := func(outcome string) *Entry { return &Entry{Kind: opAdd, ISBN: "1", Quantity: 2, Outcome: outcome} }
	order := func(outcome string) *Entry { return &Entry{Kind: opOrder, ISBN: "1", Outcome: outcome, Number: 7} }
	placed := func(number uint64, copies uint32) *shopv1.Order {
		return &shopv1.Order{Number: number, Lines: []*shopv1.Line{{Isbn: "1", Quantity: copies}}}
	}
	for name, x := range map[string]struct {
		b                       bought
		orders                  []*shopv1.Order
		inCart                  uint32
		found, missing, doubled int
	}{
		"all there":              {bought{add(Answered), order(Answered)}, []*shopv1.Order{placed(7, 2)}, 0, 2, 0, 0},
		"not ordered yet":        {bought{add: add(Answered)}, nil, 2, 1, 0, 0},
		"order lost":             {bought{add(Answered), order(Answered)}, nil, 2, 1, 1, 0},
		"another order":          {bought{add(Answered), order(Answered)}, []*shopv1.Order{placed(8, 2)}, 0, 1, 1, 0},
		"both lost":              {bought{add(Answered), order(Answered)}, nil, 0, 0, 2, 0},
		"ordered twice":          {bought{add(Answered), order(Answered)}, []*shopv1.Order{placed(7, 2), placed(8, 2)}, 0, 0, 0, 1},
		"added twice":            {bought{add(Answered), order(Answered)}, []*shopv1.Order{placed(7, 4)}, 0, 1, 0, 1},
		"in doubt, there":        {bought{add(Answered), order(Doubt)}, []*shopv1.Order{placed(7, 2)}, 0, 1, 0, 0},
		"in doubt, not there":    {bought{add(Answered), order(Doubt)}, nil, 2, 1, 0, 0},
		"add in doubt":           {bought{add: add(Doubt)}, nil, 0, 0, 0, 0},
		"add in doubt, twice":    {bought{add: add(Doubt)}, nil, 4, 0, 0, 1},
		"order that was refused": {bought{add(Answered), order(Refused)}, []*shopv1.Order{placed(7, 2)}, 0, 1, 0, 1},
	} {
		rep := &Report{}
		checkBook(name, &x.b, "1", x.orders, x.inCart, rep)
		if rep.Found != x.found || rep.Missing != x.missing || rep.Doubled != x.doubled {
			t.Errorf("%s: %+v", name, rep)
		}
	}
}

func TestVersionsCountWrites(t *testing.T) {
	var w *written
	for _, e := range []Entry{{Outcome: Answered, Value: "a"}, {Outcome: Doubt, Value: "b"}, {Outcome: Refused, Value: "c"}, {Outcome: Answered, Value: "d"}} {
		w = w.with(e)
	}
	for _, x := range []struct {
		version                 uint64
		value                   string
		found, missing, doubled int
	}{
		{2, "d", 2, 0, 0}, {3, "d", 2, 0, 0}, {1, "d", 1, 1, 0}, {5, "d", 2, 0, 2}, {2, "a", 2, 1, 0},
	} {
		rep := &Report{}
		checkKey(&kvv1.Pair{Key: "k", Value: x.value, Version: x.version}, w, rep)
		if rep.Found != x.found || rep.Missing != x.missing || rep.Doubled != x.doubled {
			t.Errorf("version %d, value %s: %+v", x.version, x.value, rep)
		}
	}
}

func TestFigures(t *testing.T) {
	s := newStats()
	at := time.Unix(1000, 0)
	send := func(intended, done time.Duration, outcome uint8, attempts int, node string) {
		s.end(0, call{intended: at.Add(intended).UnixNano(), comp: "c", write: true}, result{
			reply: reply{node: node}, outcome: outcome, done: at.Add(done), attempts: attempts, why: "why",
		})
	}
	for i := range 10 {
		send(time.Duration(i)*10*time.Millisecond, time.Duration(i)*10*time.Millisecond+time.Millisecond, answered, 1, "n1")
	}
	send(100*time.Millisecond, 400*time.Millisecond, answered, 3, "n2")
	send(410*time.Millisecond, 420*time.Millisecond, refused, 1, "")
	s.begin(1, call{intended: at.Add(430 * time.Millisecond).UnixNano(), comp: "c"})
	f := s.figures(Window{From: at, To: at.Add(500 * time.Millisecond), Component: "c"})
	if f.Calls != 13 || f.Answered != 11 || f.Refused != 1 || f.Retried != 1 || f.UnderWay != 1 || f.Nodes["n1"] != 10 || f.Rate != 22 || f.Why != "why" {
		t.Errorf("%+v", f)
	}
	if f.Gap != 309*time.Millisecond || !f.GapFrom.Equal(at.Add(91*time.Millisecond)) || f.P50 != 1 || f.Max != 300 {
		t.Errorf("gap %s from %s, p50 %g, max %g", f.Gap, f.GapFrom, f.P50, f.Max)
	}
	if got := s.first(FirstQuery{After: at, Component: "c", NotNode: "n1"}); !got.Found || got.Node != "n2" || !got.Time.Equal(at.Add(400*time.Millisecond)) {
		t.Errorf("first by another node: %+v", got)
	}
	if got := s.first(FirstQuery{After: at, Component: "c", Node: "n3"}); got.Found {
		t.Errorf("first by n3: %+v", got)
	}
}

func TestLedgerIsReadAsWritten(t *testing.T) {
	r := runnerFor(t, 1, 0)
	c := newClient(r, 0, "t.c0", "kv/kv", &scripted{answers: []error{nil, &finalError{"no"}}}, false)
	c.r.cfg.Reads = 0
	for range 3 {
		c.step(t.Context(), time.Now())
	}
	if err := r.ledger.flush(); err != nil {
		t.Fatal(err)
	}
	got, err := ReadLedger(r.cfg.Ledger)
	if err != nil || len(got) != 3 {
		t.Fatalf("%d entries, %v", len(got), err)
	}
	if got[0].Outcome != Answered || got[1].Outcome != Refused || got[2].Key != "t.c0/3" || got[0].Via != "a" || got[0].Value == "" {
		t.Errorf("%+v", got)
	}
}

func TestServeAnswersEachCommand(t *testing.T) {
	var in, out bytes.Buffer
	fmt.Fprintln(&in, `{"do":"verify"}`)
	fmt.Fprintln(&in, `{"do":"start","config":{"run":"x"}}`)
	fmt.Fprintln(&in, `{`)
	if err := Serve(t.Context(), &in, &out); err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(&out)
	for _, want := range []string{"started first", "no gateway", "unexpected end"} {
		var a answer
		if err := dec.Decode(&a); err != nil || !strings.Contains(a.Error, want) {
			t.Errorf("%q, want %q (%v)", a.Error, want, err)
		}
	}
}
