// Package history checks what clients saw of something shared: whether there is an order of their operations that respects real time and
// a model, with porcupine. An operation whose answer never came may have happened at any time after its call, or not at all that anybody
// could tell: its return is put at the end of time.
//
// It says nothing about liveness, and is as good as its model.
package history

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// Op is one operation, as a client saw it. S is the state of the model.
type Op[S comparable] struct {
	Client       int
	Name         string // for people, with the answer
	Call, Return time.Duration
	Unknown      bool // in doubt: Return does not count
	// Step returns the state after the operation and whether its answer fits the state before. For an unknown outcome every answer fits,
	// and the state after is as if it had been carried out.
	Step func(S) (S, bool)
}

// Verdict is what a check came to.
type Verdict int

const (
	// Fits: there is such an order.
	Fits Verdict = iota
	// Impossible: there is none.
	Impossible
	// Undecided: the time was not enough to tell.
	Undecided
)

// Check looks for an order of the operations, starting from a state. With Impossible it says where it got stuck. limit 0 is no limit; in a
// synctest bubble, whose time stands still meanwhile, no other makes sense.
func Check[S comparable](from S, ops []Op[S], limit time.Duration) (Verdict, string) {
	list := make([]porcupine.Operation, len(ops))
	for i, o := range ops {
		end := int64(o.Return)
		if o.Unknown {
			end = math.MaxInt64
		}
		list[i] = porcupine.Operation{ClientId: o.Client, Input: i, Call: int64(o.Call), Return: end}
	}
	model := porcupine.Model{
		Init:  func() any { return from },
		Step:  func(s, in, _ any) (bool, any) { next, fits := ops[in.(int)].Step(s.(S)); return fits, next },
		Equal: func(a, b any) bool { return a.(S) == b.(S) },
	}
	switch res, info := porcupine.CheckOperationsVerbose(model, list, limit); res {
	case porcupine.Ok:
		return Fits, ""
	case porcupine.Unknown:
		return Undecided, ""
	default:
		return Impossible, stuck(from, ops, info)
	}
}

// stuck describes the end of the longest order that was found.
func stuck[S comparable](from S, ops []Op[S], info porcupine.LinearizationInfo) string {
	var longest []porcupine.Operation
	for _, part := range info.PartialLinearizationsOperations() {
		for _, order := range part {
			if len(order) > len(longest) {
				longest = order
			}
		}
	}
	state, done := from, map[int]bool{}
	for _, o := range longest {
		i := o.Input.(int)
		state, _ = ops[i].Step(state)
		done[i] = true
	}
	end := time.Duration(math.MaxInt64)
	for i, o := range ops {
		if !done[i] && !o.Unknown {
			end = min(end, o.Return)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "after %d of %d operations, in state %+v, none fits of:", len(longest), len(ops), state)
	for i, o := range ops {
		if !done[i] && o.Call <= end {
			fmt.Fprintf(&b, "\n  %s", o)
		}
	}
	return b.String()
}

// String says what the operation was, and when.
func (o Op[S]) String() string {
	if o.Unknown {
		return fmt.Sprintf("%s [%s, in doubt]", o.Name, o.Call)
	}
	return fmt.Sprintf("%s [%s, %s]", o.Name, o.Call, o.Return)
}
