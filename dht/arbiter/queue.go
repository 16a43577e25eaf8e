package arbiter

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	maxBatch      = 512     // commands of one entry
	maxBatchBytes = 1 << 20 // of them, but for a single larger one
	maxQueue      = 1 << 16 // commands that wait on one node
)

// queue holds the commands of this node until they go into an entry: while one entry is under way, the next gathers.
type queue struct {
	pulse pulse

	mu      sync.Mutex // guards the rest
	waiting []*pending
	taken   int
	closed  bool
}

// pending is one command of one caller.
type pending struct {
	cmd  *wirev1.ArbiterCommand
	size int
	ctx  context.Context
	done chan outcome // buffered
	// gone and out are guarded by the queue's mu: the caller gave up; the command may have left this node.
	gone, out bool
}

// outcome is what became of a command.
type outcome struct {
	res   *wirev1.ArbiterResult
	doubt bool // an earlier try may have been carried out
	err   error
}

func newQueue() *queue { return &queue{} }

func (q *queue) add(ctx context.Context, cmd *wirev1.ArbiterCommand) (*pending, error) {
	p := &pending{cmd: cmd, size: proto.Size(cmd), ctx: ctx, done: make(chan outcome, 1)}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, ErrClosed
	}
	if len(q.waiting) >= maxQueue {
		return nil, fmt.Errorf("%d commands wait already: %w", maxQueue, ErrNoLeader)
	}
	q.waiting = append(q.waiting, p)
	q.pulse.beat()
	return p, nil
}

// take removes the next commands to go into one entry and marks them as out.
func (q *queue) take() []*pending {
	q.mu.Lock()
	defer q.mu.Unlock()
	var batch []*pending
	size, n := 0, 0
	for _, p := range q.waiting {
		if !p.gone {
			if len(batch) == maxBatch || len(batch) > 0 && size+p.size > maxBatchBytes {
				break
			}
			p.out = true
			batch = append(batch, p)
			size += p.size
		}
		n++
	}
	clear(q.waiting[:n])
	q.waiting = q.waiting[n:]
	q.taken = len(batch)
	return batch
}

// put returns commands that certainly were not carried out, to the front.
func (q *queue) put(batch []*pending) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.taken = 0
	for _, p := range batch {
		p.out = false
	}
	if q.closed {
		for _, p := range batch {
			p.done <- outcome{err: ErrClosed}
		}
		return
	}
	q.waiting = append(append(make([]*pending, 0, len(batch)+len(q.waiting)), batch...), q.waiting...)
}

// withdraw is called by a caller that gives up. out: the command may have left this node.
func (q *queue) withdraw(p *pending) (out bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p.gone = true
	return p.out
}

func (q *queue) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.waiting) + q.taken
}

func (q *queue) settle() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.taken = 0
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for _, p := range q.waiting {
		p.done <- outcome{err: ErrClosed}
	}
	q.waiting = nil
	q.pulse.beat()
}

// next waits for a command.
func (q *queue) next(ctx context.Context) bool {
	for {
		changed := q.pulse.next()
		q.mu.Lock()
		some := len(q.waiting) > 0
		q.mu.Unlock()
		if some {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// batch is an entry under way.
type batch struct {
	commands []*pending
	entry    []byte
	inc      uint64 // the incarnation whose index stands in the entry
	doubt    bool   // an earlier try may have been carried out
}

// proposeLoop carries commands to the leader, one entry at a time. An entry in doubt is sent again, as it was, until it is answered or
// nobody waits for it any more.
func (a *Arbiter) proposeLoop(ctx context.Context) {
	for ctx.Err() == nil && a.queue.next(ctx) {
		leader, changed := a.where.current()
		if leader == "" {
			a.findLeader(ctx, changed)
			continue
		}
		commands := a.queue.take()
		if len(commands) == 0 {
			continue
		}
		b, err := a.newBatch(commands)
		if err != nil {
			b.deliver(nil, err)
			continue
		}
		a.carry(ctx, b)
		a.queue.settle()
	}
}

func (a *Arbiter) newBatch(commands []*pending) (*batch, error) {
	known := a.known.now()
	e := &wirev1.ArbiterEntry{Format: 1, Shard: thisShard, Since: known.index, Proposer: []byte(a.cfg.Self)}
	for _, p := range commands {
		e.Commands = append(e.Commands, p.cmd)
	}
	b := &batch{commands: commands, inc: known.inc}
	var err error
	b.entry, err = proto.Marshal(e)
	return b, err
}

// deliver gives each caller its part of the answer.
func (b *batch) deliver(results []*wirev1.ArbiterResult, err error) {
	for i, p := range b.commands {
		o := outcome{doubt: b.doubt, err: err}
		if err == nil {
			o.res = results[i]
		}
		p.done <- o
	}
}

// carry brings a batch to its end.
func (a *Arbiter) carry(ctx context.Context, b *batch) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer b.whileWanted(cancel)()
	req := a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Propose{Propose: b.entry}, Since: b.inc})
	for pause := newPause(); ; {
		leader, changed := a.where.current()
		if ctx.Err() != nil {
			b.deliver(nil, ErrClosed) // or nobody listens
			return
		}
		if leader == "" {
			if !b.doubt {
				a.queue.put(b.commands)
				return
			}
			a.findLeader(ctx, changed)
			continue
		}
		resp, err := a.attempt(ctx, leader, changed, req)
		verdict := a.judge(leader, resp, err)
		switch verdict {
		case carried:
			if n := len(resp.GetResults()); n != len(b.commands) {
				b.deliver(nil, fmt.Errorf("the leader answered %d of %d commands: %w", n, len(b.commands), ErrInDoubt))
				return
			}
			b.deliver(resp.GetResults(), nil)
			return
		case rejected:
			b.deliver(nil, errors.New(resp.GetReason()))
			return
		case doubtful:
			b.doubt = true
		case notDone:
			if !b.doubt {
				a.queue.put(b.commands)
				pause.wait(ctx)
				return
			}
		}
		pause.wait(ctx)
	}
}

// whileWanted cancels when the last caller has given up.
func (b *batch) whileWanted(cancel func()) (stop func()) {
	var mu sync.Mutex
	left := len(b.commands)
	stops := make([]func() bool, left)
	for i, p := range b.commands {
		stops[i] = context.AfterFunc(p.ctx, func() {
			mu.Lock()
			defer mu.Unlock()
			if left--; left == 0 {
				cancel()
			}
		})
	}
	return func() {
		for _, f := range stops {
			f()
		}
	}
}

type verdict int

const (
	carried  verdict = iota
	notDone          // certainly
	doubtful         // it may have been done, or be done later
	rejected         // certainly not done, and it never will be
)

// attempt makes one call of the leader, which may be this node. It ends when another leader is known.
func (a *Arbiter) attempt(ctx context.Context, leader peer.ID, changed <-chan struct{}, req *wirev1.ArbiterRequest) (*wirev1.ArbiterResponse, error) {
	if leader == a.cfg.Self {
		return a.serve(ctx, a.cfg.Self, req), nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*a.t.RPC)
	defer cancel()
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-changed:
				var now peer.ID
				if now, changed = a.where.current(); now != leader {
					cancel()
					return
				}
			case <-done:
				return
			}
		}
	}()
	resp := new(wirev1.ArbiterResponse)
	call := a.caller.Call
	if req.GetPropose() != nil {
		call = a.caller.Once // sent again unseen, "not the leader" would say nothing about the first copy
	}
	err := call(ctx, leader, protoCall, req, resp)
	return resp, err
}
