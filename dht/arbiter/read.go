package arbiter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// Read returns a register as a linearizable read finds it: after every command that had been answered before Read was called. It is
// answered by the leader, which first makes sure that it still leads. The error wraps the context's, and ErrNoLeader.
func (a *Arbiter) Read(ctx context.Context, key string) (Register, bool, error) {
	if err := checkKey(key); err != nil {
		return Register{}, false, fmt.Errorf("read: %w", err)
	}
	resp, err := a.ask(ctx, a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Read{Read: key}}))
	if err != nil {
		return Register{}, false, fmt.Errorf("read %s: %w", key, err)
	}
	r, ok := value(fromWire(resp.GetRegister()))
	return r, ok, nil
}

// Sync returns when the local view holds everything that had been committed when Sync was called, checkpoints included.
func (a *Arbiter) Sync(ctx context.Context) error {
	resp, err := a.ask(ctx, a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_ReadIndex{ReadIndex: true}}))
	if err == nil {
		err = a.catchUp(ctx, point{resp.GetWhere().GetIncarnation(), resp.GetIndex()})
	}
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// catchUp waits for the view, hurrying the feed.
func (a *Arbiter) catchUp(ctx context.Context, to point) error {
	for {
		a.follow.flush()
		part, cancel := context.WithTimeout(ctx, a.t.FeedKeepalive/4)
		err := a.view.wait(part, to)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// ask has the leader answer something that changes nothing, however often it takes.
func (a *Arbiter) ask(ctx context.Context, req *wirev1.ArbiterRequest) (*wirev1.ArbiterResponse, error) {
	for pause := newPause(); ; pause.wait(ctx) {
		leader, changed := a.where.current()
		if leader == "" {
			a.findLeader(ctx, changed)
		} else {
			resp, err := a.attempt(ctx, leader, changed, req)
			switch a.judge(leader, resp, err) {
			case carried:
				return resp, nil
			case rejected:
				return nil, errors.New(resp.GetReason())
			case notDone, doubtful:
			}
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w (%w)", ErrNoLeader, context.Cause(ctx))
		}
		select {
		case <-a.closing:
			return nil, ErrClosed
		default:
		}
	}
}

func (a *Arbiter) serveReadIndex(ctx context.Context) *wirev1.ArbiterResponse {
	index, err := a.reads.index(ctx)
	switch {
	case err == nil:
		return &wirev1.ArbiterResponse{Index: index}
	case errors.Is(err, raft.ErrNotLeader):
		return notLeader()
	default:
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_BUSY, Reason: err.Error()}
	}
}

// rounds gathers linearizable reads: while one round of confirmations is under way, the next gathers.
type rounds struct {
	a *Arbiter

	mu      sync.Mutex // guards the rest
	running bool
	waiting *round
}

type round struct {
	done  chan struct{}
	index uint64
	err   error
}

// index returns a log index up to which the machine has applied, and that covers everything committed when index was called.
func (s *rounds) index(ctx context.Context) (uint64, error) {
	if r := s.a.raft.Load(); r == nil || r.State() != raft.Leader || s.a.halted.Load() || s.a.superseded() {
		return 0, raft.ErrNotLeader
	}
	s.mu.Lock()
	if s.waiting == nil {
		s.waiting = &round{done: make(chan struct{})}
	}
	r := s.waiting
	if !s.running {
		if !s.a.serving.enter() {
			s.waiting = nil
			s.mu.Unlock()
			return 0, raft.ErrNotLeader
		}
		s.running = true
		go s.run()
	}
	s.mu.Unlock()
	select {
	case <-r.done:
		return r.index, r.err
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

func (s *rounds) run() {
	defer s.a.serving.leave()
	for {
		s.mu.Lock()
		r := s.waiting
		s.waiting = nil
		s.running = r != nil
		s.mu.Unlock()
		if r == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), s.a.t.RPC)
		r.index, r.err = s.a.confirm(ctx)
		cancel()
		close(r.done)
	}
}

// confirm is Raft's read index. It takes the commit index, once something of this leader's own term is committed; makes sure, with
// messages sent after that, that a majority still takes this node for the leader; and waits for the machine. raft.VerifyLeader would
// count answers to messages that were sent before.
func (a *Arbiter) confirm(ctx context.Context) (uint64, error) {
	r := a.raft.Load()
	if r == nil || r.State() != raft.Leader {
		return 0, raft.ErrNotLeader
	}
	term := r.CurrentTerm()
	if planted.Bug("leader-local-read") && a.fsm.shown.Load() != nil {
		return a.fsm.applied.Load(), nil
	}
	commit, err := a.commitOfTerm(ctx, r, term)
	if err != nil {
		return 0, err
	}
	if err := a.stillLeading(ctx, r, term); err != nil {
		return 0, err
	}
	// Entries that are no commands never reach the machine.
	index := commit
	var l raft.Log
	for ; index > a.fsm.applied.Load(); index-- {
		if err := a.disk.GetLog(index, &l); err != nil {
			return 0, fmt.Errorf("entry %d: %w", index, err)
		}
		if l.Type == raft.LogCommand {
			break
		}
	}
	if err := a.fsm.waitApplied(ctx, index); err != nil {
		return 0, err
	}
	return index, nil
}

// commitOfTerm waits until an entry of the term is committed and returns the commit index.
func (a *Arbiter) commitOfTerm(ctx context.Context, r *raft.Raft, term uint64) (uint64, error) {
	for {
		if r.State() != raft.Leader || r.CurrentTerm() != term {
			return 0, raft.ErrNotLeader
		}
		commit := r.CommitIndex()
		var l raft.Log
		if commit > 0 && a.disk.GetLog(commit, &l) == nil && (l.Term == term || planted.Bug("read-before-own-term")) {
			return commit, nil
		}
		if !sleep(ctx, time.Millisecond) {
			return 0, errors.New("the new leader has not committed anything yet")
		}
	}
}

// stillLeading asks the voters with heartbeats of this term.
func (a *Arbiter) stillLeading(ctx context.Context, r *raft.Raft, term uint64) error {
	voters, _ := a.configuration(r)
	need := len(voters)/2 + 1
	agreed := 0
	answers := make(chan bool, len(voters))
	for _, id := range voters {
		if id == a.cfg.Self {
			agreed++
			continue
		}
		go func() { answers <- a.heartbeat(id, term) }()
	}
	for asked := len(voters) - agreed; agreed < need && asked > 0; asked-- {
		select {
		case yes := <-answers:
			if yes {
				agreed++
			}
		case <-ctx.Done():
			return fmt.Errorf("%d of %d voters confirmed in time", agreed, need)
		}
	}
	if agreed < need {
		return fmt.Errorf("%d of %d voters confirmed", agreed, need)
	}
	return nil
}

func (a *Arbiter) heartbeat(id peer.ID, term uint64) bool {
	req := &raft.AppendEntriesRequest{RPCHeader: a.trans.Load().header(), Term: term}
	var resp raft.AppendEntriesResponse
	err := a.trans.Load().AppendEntries(raft.ServerID(id.String()), raft.ServerAddress(id.String()), req, &resp)
	return err == nil && resp.Success && resp.Term == term
}
