package arbiter

import (
	"fmt"
	"math"
	"sort"
	"strings"
	"time"
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

// linKey is a place in the search: which operations are done, and the state after them.
type linKey struct {
	done  string
	state linState
}

// linearizable looks for an order of the operations that respects real time and the model (Wing and Gong, with Lowe's memory of what
// was tried). It returns "" or where it got stuck.
func linearizable(ops []linOp) string {
	for i := range ops {
		if ops[i].unknown {
			ops[i].ret = math.MaxInt64
		}
	}
	sort.SliceStable(ops, func(i, j int) bool { return ops[i].call < ops[j].call })
	n := len(ops)
	done := make([]bool, n)
	tried := map[linKey]bool{}
	best := 0
	var stuck string
	var dfs func(s linState, left, count int) bool
	dfs = func(s linState, left, count int) bool {
		if left == 0 {
			return true // only operations in doubt are left, if any
		}
		key := linKey{bits(done), s}
		if tried[key] {
			return false
		}
		tried[key] = true
		// An operation may come next when no other that is not done returned before it was called.
		end := time.Duration(math.MaxInt64)
		for i := range ops {
			if !done[i] {
				end = min(end, ops[i].ret)
			}
		}
		if count > best {
			best = count
			stuck = fmt.Sprintf("after %d of %d operations, in state %+v, none fits of:", count, n, s)
			for i := range ops {
				if !done[i] && ops[i].call <= end {
					stuck += fmt.Sprintf("\n  %s [%s, %s] unknown=%v", ops[i].name, ops[i].call, ops[i].ret, ops[i].unknown)
				}
			}
		}
		for i := range ops {
			if done[i] || ops[i].call > end {
				continue
			}
			next, fits := ops[i].step(s)
			if !fits {
				continue
			}
			done[i] = true
			l := left
			if !ops[i].unknown {
				l--
			}
			if dfs(next, l, count+1) {
				return true
			}
			done[i] = false
		}
		return false
	}
	left := 0
	for _, o := range ops {
		if !o.unknown {
			left++
		}
	}
	if dfs(linState{}, left, 0) {
		return ""
	}
	return stuck
}

func bits(done []bool) string {
	var b strings.Builder
	for i := 0; i < len(done); i += 8 {
		var x byte
		for j := i; j < min(i+8, len(done)); j++ {
			if done[j] {
				x |= 1 << (j - i)
			}
		}
		b.WriteByte(x)
	}
	return b.String()
}
