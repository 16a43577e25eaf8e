package arbiter

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
)

// Raft's decoder ends with the first answer that is no success, while its sender may still wait for room. The sender must come back, or raft's
// shutdown, which waits for it, never ends.
func TestAPipelineLetsItsSenderGo(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse)
		closed bool // the transport's end instead of an answer
	}{
		{name: "refused", answer: func(_ *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) { resp.Success = false }},
		{name: "a newer term", answer: func(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) {
			resp.Success, resp.Term = true, args.Term+1
		}},
		{name: "the transport's end", closed: true, answer: func(_ *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) { resp.Success = true }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tr := &transport{stop: make(chan struct{}), progress: map[peer.ID]*progress{}, ids: &idCache{}}
				inner := &boundedPipeline{out: make(chan raft.AppendFuture, 2), gone: make(chan struct{}), answer: c.answer}
				p := &pipeline{AppendPipeline: inner, t: tr, out: make(chan raft.AppendFuture), stop: make(chan struct{})}
				go p.run()

				// the decoder, as raft's: one answer, and it ends where the answer is no success
				if !c.closed {
					go func() { <-p.Consumer() }()
				}
				sent := make(chan error, 1)
				go func() {
					for range 100 {
						if _, err := p.AppendEntries(&raft.AppendEntriesRequest{Term: 3}, &raft.AppendEntriesResponse{}); err != nil {
							sent <- err
							return
						}
					}
					sent <- nil
				}()
				synctest.Wait()
				if c.closed {
					select {
					case err := <-sent:
						t.Fatalf("sent all without anybody taking an answer: %v", err)
					default:
					}
					close(tr.stop)
				}
				select {
				case err := <-sent:
					if err != nil && !c.closed {
						t.Error(err)
					}
				case <-time.After(time.Minute):
					t.Fatal("the sender waits for ever")
				}
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// boundedPipeline holds few answers, as the library's does.
type boundedPipeline struct {
	out    chan raft.AppendFuture
	gone   chan struct{}
	once   sync.Once
	answer func(*raft.AppendEntriesRequest, *raft.AppendEntriesResponse)
}

func (b *boundedPipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	b.answer(args, resp)
	f := &doneFuture{args: args, resp: resp}
	select {
	case b.out <- f:
		return f, nil
	case <-b.gone:
		return nil, raft.ErrPipelineShutdown
	}
}

func (b *boundedPipeline) Consumer() <-chan raft.AppendFuture { return b.out }

func (b *boundedPipeline) Close() error {
	b.once.Do(func() { close(b.gone) })
	return nil
}

type doneFuture struct {
	args *raft.AppendEntriesRequest
	resp *raft.AppendEntriesResponse
}

func (a *doneFuture) Error() error                          { return nil }
func (a *doneFuture) Start() time.Time                      { return time.Time{} }
func (a *doneFuture) Request() *raft.AppendEntriesRequest   { return a.args }
func (a *doneFuture) Response() *raft.AppendEntriesResponse { return a.resp }
