package membrane

import (
	"context"
	"strconv"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// newest asks a process for the newest mark of its journal. A message of a stream has no mark of its own; what it depends on has a mark that is not above the one
// that the process names when it is asked after the message came. One question serves all who ask before it leaves.
type newest struct {
	mu   sync.Mutex // guards the fields below
	busy bool       // a question is under way
	next *question  // the one after it
}

type question struct {
	done chan struct{}
	mark uint64
	err  error
}

// newestMark is the newest mark of the process's journal, asked for after the call of this method began; 0 where it does not tell.
func (b *Backend) newestMark(ctx context.Context) (uint64, error) {
	b.newest.mu.Lock()
	q := b.newest.next
	if q == nil {
		q = &question{done: make(chan struct{})}
		b.newest.next = q
	}
	if !b.newest.busy {
		b.newest.busy = true
		go b.askNewest()
	}
	b.newest.mu.Unlock()
	select {
	case <-q.done:
		return q.mark, q.err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// askNewest asks as long as somebody wants to know.
func (b *Backend) askNewest() {
	for {
		b.newest.mu.Lock()
		q := b.newest.next
		b.newest.next = nil
		if q == nil {
			b.newest.busy = false
			b.newest.mu.Unlock()
			return
		}
		b.newest.mu.Unlock()
		q.mark, q.err = b.askMark()
		close(q.done)
	}
}

func (b *Backend) askMark() (uint64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), StateStall)
	defer cancel()
	beat, err := b.client.Heartbeat(ctx, &componentv1.Beat{Seq: b.beats.Add(1), DurableMark: b.Committed()})
	if err != nil {
		return 0, err
	}
	mark, err := strconv.ParseUint(beat.GetStatus().GetInfo()[componentv1.InfoMark], 10, 64)
	if err != nil {
		return 0, nil //nolint:nilerr // it does not tell: its streams are not held back
	}
	return mark, nil
}

// settleNow holds back what a stream gave just now until everything that it may depend on is committed, and says whether it may still be given.
func (g *gate) settleNow(ctx context.Context, p *phase) error {
	if g.durable.Load() && p.backend.methods.TxnCalls {
		mark, err := p.backend.newestMark(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return status.FromContextError(ctx.Err()).Err()
			}
			return refuse(doubt, codes.Unavailable, "the answer is discarded: the component does not say what it depends on: %s", err)
		}
		if err := g.awaitMark(ctx, p, mark); err != nil {
			return err
		}
	}
	return g.mayAnswer(p)
}
