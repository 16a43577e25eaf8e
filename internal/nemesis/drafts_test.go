package nemesis

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// The drafts are a component that is saved on demand only: `coppice checkpoint` is an operation like any other. Who takes it over, or starts it again, may go
// back to the last acknowledged checkpoint or to any state since, and to no older one; while nothing happens to anybody nothing is lost. It is exactly-one:
// of a safe component saved on demand two owners may answer for a moment, each from its own state.
const draftsComponent = "draft/kv"

// checkpoint saves all keys. outage is a time in which nodes and processes may have died: at any moment of it the state may go back.
type (
	checkpoint struct{}
	outage     struct{}
	// unsure is a put or get that has to do with a fault: before it the state may have gone back.
	unsure struct{ op any }
)

// draft is one key: what it is, and what it may go back to.
type draft struct {
	now  string
	back string // values since the last acknowledged checkpoint, that one included, each ended by a newline
}

func (d draft) values() []string { return strings.Split(strings.TrimSuffix(d.back, "\n"), "\n") }

// all are the states that d may be in after a fault.
func (d draft) all() []any {
	var out []any
	for _, v := range d.values() {
		out = append(out, draft{v, d.back})
	}
	return out
}

// put adds a value to those that may come back.
func (d draft) put(value string) draft {
	if slices.Contains(d.values(), value) {
		return draft{value, d.back}
	}
	return draft{value, d.back + value + "\n"}
}

// draftModel is one key of the drafts, which begins empty.
var draftModel = porcupine.NondeterministicModel{
	Init: func() []any { return []any{draft{"", "\n"}} },
	Step: func(state, input, output any) []any {
		d, ok := state.(draft)
		if !ok {
			return nil
		}
		from := []any{d}
		if u, is := input.(unsure); is {
			from, input = d.all(), u.op
		}
		var out []any
		for _, s := range from {
			d := s.(draft)
			switch in := input.(type) {
			case put:
				out = append(out, d.put(in.value))
			case get:
				if g, ok := output.(gotten); ok && (!g.known || g.value == d.now) {
					out = append(out, d)
				}
			case checkpoint:
				out = append(out, draft{d.now, d.now + "\n"})
			case outage:
				out = append(out, d.all()...)
			}
		}
		return out
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v → %+v", input, output) },
}

// drafts is the history of that component.
type drafts struct {
	*history

	mu      sync.Mutex // guards the rest
	windows [][2]int64 // in which faults were; the last may be open
	saved   int        // checkpoints acknowledged
}

func newDrafts() *drafts { return &drafts{history: newHistory()} }

// during notes a fault and all that follows from it, until the returned function is called.
func (d *drafts) during() (over func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := len(d.windows)
	d.windows = append(d.windows, [2]int64{d.now(), inDoubt})
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.windows[i][1] = d.now()
	}
}

// keyed is the history of one key: its own operations, the checkpoints, and the faults.
func (d *drafts) keyed(key string) []porcupine.Operation {
	d.mu.Lock()
	windows := slices.Clone(d.windows)
	d.mu.Unlock()
	d.history.mu.Lock()
	defer d.history.mu.Unlock()
	var out []porcupine.Operation
	for _, op := range d.ops {
		if _, all := op.Input.(checkpoint); !all && keyOf(op.Input) != key {
			continue
		}
		if slices.ContainsFunc(windows, func(w [2]int64) bool { return op.Call <= w[1] && op.Return >= w[0] }) {
			op.Input = unsure{op.Input}
		}
		out = append(out, op)
	}
	for _, w := range windows {
		out = append(out, porcupine.Operation{ClientId: clients, Input: outage{}, Call: w[0], Return: w[1]})
	}
	return out
}

// check fails the test unless each key has an order of its operations that goes back no further than it may.
func (d *drafts) check(t *testing.T) {
	t.Helper()
	total := 0
	for i := range keys {
		key := fmt.Sprintf("k%d", i)
		ops := d.keyed(key)
		total += len(ops)
		switch porcupine.CheckOperationsTimeout(draftModel.ToModel(), ops, 2*time.Minute) {
		case porcupine.Illegal:
			t.Errorf("%s of the drafts went back behind an acknowledged checkpoint, or back without a fault: the history of %d operations fits no order", key, len(ops))
		case porcupine.Unknown:
			t.Errorf("two minutes were not enough to check the history of %d operations on %s of the drafts", len(ops), key)
		case porcupine.Ok:
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	t.Logf("the drafts went back to no state older than the last of %d acknowledged checkpoints, in %d operations by key", d.saved, total)
}

func (l *clientele) putDraft(id int, rng *rand.Rand, key string) {
	in := put{fmt.Sprintf("k%d", rng.IntN(keys)), key}
	at := l.drafts.now()
	_, tries, err := l.tried(rng, draftsComponent, "Put", fmt.Sprintf(`{"key":%q,"value":%q}`, in.key, in.value), key)
	if tries > 1 || err != nil {
		// Each try may be carried out once: the state that remembered the first may be gone when the next one comes.
		l.drafts.add(id, in, at, nil, inDoubt)
	}
	if err != nil {
		l.doubt(err)
		return
	}
	l.drafts.add(id, in, at, nil, l.drafts.now())
}

func (l *clientele) getDraft(id int, rng *rand.Rand) {
	in := get{fmt.Sprintf("k%d", rng.IntN(keys))}
	at := l.drafts.now()
	out, _, err := l.tried(rng, draftsComponent, "Get", fmt.Sprintf(`{"key":%q}`, in.key), "")
	var pair struct {
		Value string `json:"value"`
	}
	switch {
	case errors.Is(err, errAbsent):
	case err != nil:
		return
	default:
		if err := json.Unmarshal([]byte(out), &pair); err != nil {
			l.t.Errorf("get %s: %v in %q", in.key, err, out)
			return
		}
	}
	l.drafts.add(id, in, at, gotten{pair.Value, true}, l.drafts.now())
}

// save is `coppice checkpoint`. One that is not acknowledged promises nothing.
func (l *clientele) save(id int, rng *rand.Rand) {
	alive := l.c.Alive()
	if len(alive) == 0 {
		return
	}
	c, err := alive[rng.IntN(len(alive))].Client()
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(l.t.Context(), 2*attempt)
	defer cancel()
	at := l.drafts.now()
	if _, err := c.Checkpoint(ctx, &apiv1.CheckpointRequest{Component: draftsComponent, TimeoutMs: uint64(attempt.Milliseconds())}); err != nil {
		return
	}
	l.drafts.add(id, checkpoint{}, at, nil, l.drafts.now())
	l.drafts.mu.Lock()
	defer l.drafts.mu.Unlock()
	l.drafts.saved++
}

// A failover may go back to the last acknowledged checkpoint and to what came after it, to nothing older; and without a fault nothing goes back.
func TestTheModelOfDraftsFindsWhatIsWrong(t *testing.T) {
	write := func(value string, at int64) porcupine.Operation {
		return porcupine.Operation{Input: put{"k0", value}, Call: at, Return: at + 1}
	}
	read := func(value string, at int64) porcupine.Operation {
		return porcupine.Operation{Input: get{"k0"}, Output: gotten{value, true}, Call: at, Return: at + 1}
	}
	save := func(at int64) porcupine.Operation {
		return porcupine.Operation{Input: checkpoint{}, Call: at, Return: at + 1}
	}
	lost := func(ops ...porcupine.Operation) []porcupine.Operation { // a fault from 50 to 60
		d := newDrafts()
		d.ops, d.windows = ops, [][2]int64{{50, 60}}
		return d.keyed("k0")
	}
	calm := func(ops ...porcupine.Operation) []porcupine.Operation {
		d := newDrafts()
		d.ops = ops
		return d.keyed("k0")
	}
	for _, c := range []struct {
		name string
		ops  []porcupine.Operation
		fits bool
	}{
		{"nothing is lost", lost(write("a", 1), save(3), write("b", 5), read("b", 70)), true},
		{"back to the checkpoint", lost(write("a", 1), save(3), write("b", 5), write("c", 7), read("a", 70)), true},
		{"back to a state since", lost(write("a", 1), save(3), write("b", 5), write("c", 7), read("b", 70)), true},
		{"back behind the checkpoint", lost(write("a", 1), write("b", 3), save(5), write("c", 7), read("a", 70)), false},
		{"back to nothing before any checkpoint", lost(write("a", 1), read("", 70)), true},
		{"back to nothing after a checkpoint", lost(write("a", 1), save(3), read("", 70)), false},
		{"back during the fault", lost(write("a", 1), save(3), write("b", 5), read("b", 52), read("a", 54), read("a", 70)), true},
		{"back after the fault", lost(write("a", 1), save(3), write("b", 5), read("b", 70), read("a", 72)), false},
		{"back without a fault", calm(write("a", 1), save(3), write("b", 5), read("a", 7)), false},
		{"a write that is in doubt", calm(write("a", 1), porcupine.Operation{Input: put{"k0", "b"}, Call: 3, Return: inDoubt}, read("a", 5), read("b", 7)), true},
		{"a checkpoint after the fault holds", lost(write("a", 1), write("b", 3), read("b", 62), save(64), read("a", 70)), false},
	} {
		if got := porcupine.CheckOperations(draftModel.ToModel(), c.ops); got != c.fits {
			t.Errorf("%s: it fits is %v", c.name, got)
		}
	}
}
