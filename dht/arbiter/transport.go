package arbiter

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/internal/planted"
)

// transport is raft's network transport over peers with what the library leaves out: it keeps snapshots that are older than what is
// applied from being installed (the library would go back and then panic), keeps book of what each follower acknowledged, retries a request once when a
// pooled stream was stale, and lets the node start an election in itself.
type transport struct {
	*raft.NetworkTransport
	layer *streams
	rpcs  chan raft.RPC // what raft consumes
	stop  chan struct{}
	done  chan struct{}
	// applied is raft's applied index, and inLog says whether raft's log, or its end, holds an entry; set once raft is there.
	applied func() uint64
	inLog   func(index uint64) bool
	timeout time.Duration
	ids     *idCache

	mu       sync.Mutex // guards progress
	progress map[peer.ID]*progress
}

// progress is what this node, as a leader, knows about a follower.
type progress struct {
	matched uint64    // acknowledged: the follower's log equals ours up to here
	told    uint64    // highest commit index sent to it
	term    uint64    // its term when it acknowledged
	heard   time.Time // last answer
}

var (
	_ raft.Transport   = (*transport)(nil)
	_ raft.WithPreVote = (*transport)(nil)
	_ raft.WithClose   = (*transport)(nil)
)

func newTransport(p peers.Peers, self peer.ID, d door, timeout time.Duration, log hclog.Logger, ids *idCache) *transport {
	layer := newStreams(p, self, d)
	t := &transport{
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: layer, MaxPool: 3, Timeout: timeout, Logger: log,
		}),
		layer: layer, rpcs: make(chan raft.RPC), stop: make(chan struct{}), done: make(chan struct{}),
		timeout: timeout, ids: ids, progress: map[peer.ID]*progress{},
	}
	t.TimeoutScale = 1 << 20
	return t
}

// start forwards requests to raft, but for those that the guard answers.
func (t *transport) start(applied func() uint64, inLog func(index uint64) bool) {
	t.applied, t.inLog = applied, inLog
	go t.forward()
}

func (t *transport) forward() {
	defer close(t.done)
	for {
		select {
		case rpc := <-t.NetworkTransport.Consumer():
			if resp, err := t.guard(rpc); resp != nil || err != nil {
				rpc.Respond(resp, err)
				continue
			}
			select {
			case t.rpcs <- rpc:
			case <-t.stop:
				return
			}
		case <-t.stop:
			return
		}
	}
}

// guard answers in raft's stead what the library would do wrongly, and mends requests that it would refuse for ever; raft decides about
// the rest. What is applied is committed, so that a leader's log holds the same (Ongaro & Ousterhout, "In Search of an Understandable
// Consensus Algorithm", §5.4.3, Leader Completeness). Therefore:
//   - a snapshot that is not newer than what is applied is acknowledged, not installed (ibid., figure 13, rule 6): the library would take
//     the node back. Were it refused instead, a leader whose first snapshot arrived while the answer was lost would send it for ever.
//   - entries after one that is applied and compacted away are taken without comparing it: the library refuses them, its leader steps
//     back to the snapshot before, which is acknowledged as above, and so on.
//   - nothing is taken as committed that the request does not reach (ibid., figure 2, AppendEntries rule 5): the library counts to the end
//     of the node's own log, where entries of another leader may stand yet.
func (t *transport) guard(rpc raft.RPC) (resp any, err error) {
	switch req := rpc.Command.(type) {
	case *raft.InstallSnapshotRequest:
		if planted.Bug("snapshot-older") {
			return nil, nil
		}
		if _, err := decodeConfiguration(req.Configuration); err != nil {
			return &raft.InstallSnapshotResponse{RPCHeader: t.header()}, errors.Join(err, drain(rpc.Reader))
		}
		if req.LastLogIndex > t.applied() {
			return nil, nil
		}
		// A leader of a term that is over may be told so too: its snapshot is of committed entries all the same.
		return &raft.InstallSnapshotResponse{RPCHeader: t.header(), Term: req.Term, Success: true}, drain(rpc.Reader)
	case *raft.AppendEntriesRequest:
		req.LeaderCommitIndex = min(req.LeaderCommitIndex, req.PrevLogEntry+uint64(len(req.Entries)))
		if applied := t.applied(); req.PrevLogEntry > 0 && req.PrevLogEntry <= applied && !t.inLog(req.PrevLogEntry) {
			afterApplied(req, applied)
		}
	}
	return nil, nil
}

// drain reads a snapshot to its end, or the next request on the stream would be read out of its middle.
func drain(r io.Reader) error {
	if r == nil {
		return nil
	}
	_, err := io.Copy(io.Discard, r)
	return err
}

// afterApplied cuts from a request what is applied already, the entry before the first to compare included.
func afterApplied(req *raft.AppendEntriesRequest, applied uint64) {
	req.PrevLogEntry, req.PrevLogTerm = 0, 0 // raft compares nothing with entry 0
	for len(req.Entries) > 0 && req.Entries[0].Index <= applied {
		req.Entries = req.Entries[1:]
	}
}

// Consumer implements raft.Transport.
func (t *transport) Consumer() <-chan raft.RPC { return t.rpcs }

// ended says whether Close was called.
func (t *transport) ended() bool {
	select {
	case <-t.stop:
		return true
	default:
		return false
	}
}

// Close ends all streams and the forwarding. It is called by raft's shutdown too.
func (t *transport) Close() error {
	t.mu.Lock()
	select {
	case <-t.stop:
		t.mu.Unlock()
		return nil
	default:
	}
	close(t.stop)
	t.mu.Unlock()
	return t.NetworkTransport.Close()
}

// electSelf makes raft start an election now, as a leader that hands over would have it do. Elections may start at any time, so this is
// safe; pre-vote is skipped and voters answer although they remember a leader.
func (t *transport) electSelf() {
	resp := make(chan raft.RPCResponse, 1)
	rpc := raft.RPC{Command: &raft.TimeoutNowRequest{RPCHeader: t.header()}, RespChan: resp}
	select {
	case t.rpcs <- rpc:
	case <-t.stop:
	}
}

func (t *transport) header() raft.RPCHeader {
	addr := []byte(t.LocalAddr())
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: addr, Addr: addr}
}

// again calls f, and once more when it failed at once: the pooled stream was stale.
func (t *transport) again(f func() error) error {
	begun := time.Now()
	err := f()
	for range 3 { // as many as are pooled
		if err == nil || time.Since(begun) > t.timeout/4 || errors.Is(err, peers.ErrUnreachable) || !t.layer.isOpen() {
			break
		}
		err = f()
	}
	return err
}

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, to raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	err := t.again(func() error {
		*resp = raft.AppendEntriesResponse{}
		return t.NetworkTransport.AppendEntries(id, to, args, resp)
	})
	if err == nil {
		t.note(id, args, resp)
	} else {
		t.forget(id) // it may have restarted
	}
	return err
}

// RequestVote implements raft.Transport.
func (t *transport) RequestVote(id raft.ServerID, to raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.again(func() error {
		*resp = raft.RequestVoteResponse{}
		return t.NetworkTransport.RequestVote(id, to, args, resp)
	})
}

// RequestPreVote implements raft.WithPreVote.
func (t *transport) RequestPreVote(id raft.ServerID, to raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.again(func() error {
		*resp = raft.RequestPreVoteResponse{}
		return t.NetworkTransport.RequestPreVote(id, to, args, resp)
	})
}

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, to raft.ServerAddress) (raft.AppendPipeline, error) {
	inner, err := t.NetworkTransport.AppendEntriesPipeline(id, to)
	if err != nil {
		return nil, err
	}
	p := &pipeline{AppendPipeline: inner, t: t, id: id, out: make(chan raft.AppendFuture), stop: make(chan struct{})}
	go p.run()
	return p, nil
}

// pipeline keeps book of what passes a pipeline.
type pipeline struct {
	raft.AppendPipeline
	t    *transport
	id   raft.ServerID
	out  chan raft.AppendFuture
	stop chan struct{}
	once sync.Once
}

// run hands answers on. Raft's decoder ends after the first that is no success, and with the term; its sender may be waiting then for room in the
// pipeline, which only answers that are taken make, and would wait for ever, also through raft's shutdown. So what comes later is taken here.
func (p *pipeline) run() {
	over := false
	for {
		select {
		case f := <-p.AppendPipeline.Consumer():
			p.t.note(p.id, f.Request(), f.Response())
			if over {
				continue
			}
			select {
			case p.out <- f:
				over = !f.Response().Success || f.Response().Term > f.Request().Term
			case <-p.stop:
				return
			case <-p.t.stop:
				over = true
			}
		case <-p.stop:
			return
		case <-p.t.stop:
			if err := p.Close(); err != nil {
				return // the connection is gone, and everybody was let go
			}
		}
	}
}

func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	f, err := p.AppendPipeline.AppendEntries(args, resp)
	if err == nil {
		p.t.tell(p.id, args.LeaderCommitIndex)
	}
	return f, err
}

func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.out }

func (p *pipeline) Close() error {
	p.once.Do(func() { close(p.stop) })
	return p.AppendPipeline.Close()
}

func (t *transport) peerLocked(id raft.ServerID) *progress {
	pid, ok := t.ids.decode(string(id))
	if !ok {
		return &progress{}
	}
	p := t.progress[pid]
	if p == nil {
		p = &progress{}
		t.progress[pid] = p
	}
	return p
}

// note books an answered AppendEntries.
func (t *transport) note(id raft.ServerID, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peerLocked(id)
	p.heard = time.Now()
	if !resp.Success {
		return
	}
	p.told = max(p.told, args.LeaderCommitIndex)
	matched := args.PrevLogEntry
	if n := len(args.Entries); n > 0 {
		matched = args.Entries[n-1].Index
	}
	if resp.Term > p.term {
		p.term, p.matched = resp.Term, matched
	}
	p.matched = max(p.matched, matched)
}

func (t *transport) tell(id raft.ServerID, commit uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peerLocked(id)
	p.told = max(p.told, commit)
}

// forget drops what the follower was told.
func (t *transport) forget(id raft.ServerID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peerLocked(id).told = 0
}

// of returns what is known about a follower.
func (t *transport) of(id peer.ID) progress {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.progress[id]; p != nil {
		return *p
	}
	return progress{}
}
