package arbiter

import (
	"time"

	"github.com/coppice-project/coppice/internal/sim/history"
)

// linOp is one operation on one key, as a client saw it.
type linOp struct {
	name      string
	call, ret time.Duration
	unknown   bool // it may have happened, at any time after the call
	// step returns the states that the operation can lead to and whether its answer fits. For an unknown outcome all effects count.
	step func(s linState) (linState, bool)
}

// linState is the model: what a register is.
type linState struct {
	exists       bool
	epoch, nonce uint64
	seq          uint64
	root, body   string
}

// linearizable returns "" or where the search for an order of the operations got stuck.
func linearizable(ops []linOp) string {
	list := make([]history.Op[linState], len(ops))
	for i, o := range ops {
		list[i] = history.Op[linState]{Client: i, Name: o.name, Call: o.call, Return: o.ret, Unknown: o.unknown, Step: o.step}
	}
	_, stuck := history.Check(linState{}, list, 0)
	return stuck
}
