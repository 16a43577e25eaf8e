package membrane

import "sync/atomic"

// By the words of HTTP these change nothing.
const (
	methodGet  = "HTTP GET"
	methodHead = "HTTP HEAD"
)

// unsaved counts what was answered and is not part of an acknowledged checkpoint. A process whose calls are transactions tells by the marks of its answers: each
// mark is one entry of its journal. Of any other each answered call counts that may have changed something.
type unsaved struct {
	mark  atomic.Uint64 // the highest that an answer depended on
	calls atomic.Uint64 // answered, without a mark
	saved atomic.Uint64 // of those, the ones in the last acknowledged checkpoint
}

// answered notes an answer of a method that is about to be given.
func (b *Backend) answered(method string, mark uint64) {
	if mark == 0 {
		if !b.methods.TxnCalls && !b.methods.Get(method).NoSideEffects && method != methodGet && method != methodHead {
			b.unsaved.calls.Add(1)
		}
		return
	}
	for old := b.unsaved.mark.Load(); mark > old && !b.unsaved.mark.CompareAndSwap(old, mark); old = b.unsaved.mark.Load() {
	}
}

// Answered is how many answers without a mark were given so far, for CountSaved: asked before a checkpoint is begun.
func (b *Backend) Answered() uint64 { return b.unsaved.calls.Load() }

// CountSaved says that a checkpoint was acknowledged that was begun when Answered said n.
func (b *Backend) CountSaved(n uint64) {
	for old := b.unsaved.saved.Load(); n > old && !b.unsaved.saved.CompareAndSwap(old, n); old = b.unsaved.saved.Load() {
	}
}

// Unsaved is how much was answered since the last acknowledged checkpoint: changes where the component's calls are transactions, else calls that may have changed
// something.
func (b *Backend) Unsaved() uint64 {
	var n uint64
	if mark, done := b.unsaved.mark.Load(), b.Committed(); mark > done {
		n = mark - done
	}
	if all, saved := b.unsaved.calls.Load(), b.unsaved.saved.Load(); all > saved {
		n += all - saved
	}
	return n
}
