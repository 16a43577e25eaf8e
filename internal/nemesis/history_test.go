package nemesis

import (
	"fmt"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// history is what clients were answered, in the real order of calls and answers.
type history struct {
	begun time.Time

	mu  sync.Mutex // guards ops
	ops []porcupine.Operation
}

// put and get are the operations on a register.
type (
	put    struct{ key, value string }
	get    struct{ key string }
	gotten struct {
		value string
		known bool
	}
)

// inDoubt is the return time of what was never answered: it may have happened at any time since, or never.
const inDoubt = math.MaxInt64

func newHistory() *history { return &history{begun: time.Now()} }

func (h *history) now() int64 { return int64(time.Since(h.begun)) }

func (h *history) add(client int, input any, call int64, output any, returned int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: input, Call: call, Output: output, Return: returned})
}

// registers is a set of registers that begin empty.
var registers = porcupine.Model{
	Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
		by := map[string][]porcupine.Operation{}
		for _, op := range ops {
			by[keyOf(op.Input)] = append(by[keyOf(op.Input)], op)
		}
		out := make([][]porcupine.Operation, 0, len(by))
		for _, list := range by {
			out = append(out, list)
		}
		return out
	},
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		switch in := input.(type) {
		case put:
			return true, in.value
		case get:
			g, ok := output.(gotten)
			return ok && (!g.known || g.value == state), state
		}
		return false, state
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v → %+v", input, output) },
}

func keyOf(input any) string {
	switch in := input.(type) {
	case put:
		return in.key
	case get:
		return in.key
	}
	return ""
}

// linearizable fails the test unless the history has an order that one register for each key could have had.
func (h *history) linearizable(t *testing.T) (total, doubtful int) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, op := range h.ops {
		if op.Return == inDoubt {
			doubtful++
		}
	}
	patience := max(2*time.Minute, time.Duration(len(h.ops))*time.Millisecond) // of long runs
	switch porcupine.CheckOperationsTimeout(registers, h.ops, patience) {
	case porcupine.Illegal:
		t.Errorf("the history of %d operations on the registers is not linearizable", len(h.ops))
	case porcupine.Unknown:
		t.Errorf("%s were not enough to check the history of %d operations", patience, len(h.ops))
	case porcupine.Ok:
	}
	return len(h.ops), doubtful
}

// The checker finds what is to be found: a read of what was overwritten before it began, and a write that was lost.
func TestTheCheckerFindsWhatIsWrong(t *testing.T) {
	for name, ops := range map[string][]porcupine.Operation{
		"stale": {{Input: put{"a", "1"}, Call: 1, Return: 2}, {Input: put{"a", "2"}, Call: 3, Return: 4}, {Input: get{"a"}, Output: gotten{"1", true}, Call: 5, Return: 6}},
		"lost":  {{Input: put{"a", "1"}, Call: 1, Return: 2}, {Input: get{"a"}, Output: gotten{"", true}, Call: 3, Return: 4}},
		"undone": {
			{Input: put{"a", "1"}, Call: 1, Return: 2},
			{Input: put{"a", "2"}, Call: 3, Return: inDoubt},
			{Input: get{"a"}, Output: gotten{"2", true}, Call: 5, Return: 6},
			{Input: get{"a"}, Output: gotten{"1", true}, Call: 7, Return: 8},
		},
	} {
		if porcupine.CheckOperations(registers, ops) {
			t.Errorf("%s: not found", name)
		}
	}
	fine := []porcupine.Operation{{Input: put{"a", "1"}, Call: 1, Return: inDoubt}, {Input: get{"a"}, Output: gotten{"", true}, Call: 3, Return: 4}, {Input: get{"a"}, Output: gotten{"1", true}, Call: 5, Return: 6}}
	if !porcupine.CheckOperations(registers, fine) {
		t.Error("a write in doubt may come late")
	}
}
