package history

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Count is one addition of one to a counter that began at zero, as its client saw it.
type Count struct {
	Call, Return time.Duration
	Value        int64 // that was answered
	Unknown      bool  // in doubt: Return and Value do not count, and it may be carried out at any time after its call, or never
}

// CheckCount looks for an order of additions, as Check does, and always decides: with hundreds in doubt no search does. "": there is one; else what is in the way.
//
// The answered ones are ordered by their values. What lies between was done by some that are in doubt, each of which can only have been after its call; so those
// that were called first go first. What is left is whether each answered one, which took its turn after all before it had been called, did so before it returned.
func CheckCount(list []Count) string {
	var answered []Count
	var doubt []time.Duration
	for _, c := range list {
		if c.Unknown {
			doubt = append(doubt, c.Call)
		} else {
			answered = append(answered, c)
		}
	}
	slices.SortFunc(answered, func(a, b Count) int { return cmp.Compare(a.Value, b.Value) })
	slices.Sort(doubt)
	var done int64       // additions so far
	var at time.Duration // the last of them was then at the earliest
	for _, c := range answered {
		for done < c.Value-1 {
			if len(doubt) == 0 {
				return fmt.Sprintf("%d was answered at %s, and %d were added by then at the most", c.Value, c.Return, done+1)
			}
			done, at, doubt = done+1, max(at, doubt[0]), doubt[1:]
		}
		if c.Value != done+1 {
			return fmt.Sprintf("%d was answered at %s, and twice, or below what was there", c.Value, c.Return)
		}
		done, at = c.Value, max(at, c.Call)
		if at > c.Return {
			return fmt.Sprintf("%d was answered at %s, and what is counted before it was called at %s: something answered was lost, or is counted twice", c.Value, c.Return, at)
		}
	}
	return ""
}
