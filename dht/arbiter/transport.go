package arbiter

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/internal/planted"
)

// transport is raft's network transport over peers with what the library leaves out: it refuses snapshots that are older than what is
// applied (the library would go back and then panic), keeps book of what each follower acknowledged, retries a request once when a
// pooled stream was stale, and lets the node start an election in itself.
type transport struct {
	*raft.NetworkTransport
	layer *streams
	rpcs  chan raft.RPC // what raft consumes
	stop  chan struct{}
	done  chan struct{}
	// applied is raft's applied index, set once raft is there.
	applied func() uint64
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

// start forwards requests to raft, but for those that the guard refuses.
func (t *transport) start(applied func() uint64) {
	t.applied = applied
	go t.forward()
}

func (t *transport) forward() {
	defer close(t.done)
	for {
		select {
		case rpc := <-t.NetworkTransport.Consumer():
			if err := t.guard(rpc); err != nil {
				rpc.Respond(&raft.InstallSnapshotResponse{}, err)
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

// guard refuses an InstallSnapshot that would take this node back, or whose configuration cannot be read.
func (t *transport) guard(rpc raft.RPC) error {
	req, ok := rpc.Command.(*raft.InstallSnapshotRequest)
	if !ok {
		return nil
	}
	if planted.Bug("snapshot-older") {
		return nil
	}
	_, err := decodeConfiguration(req.Configuration)
	if applied := t.applied(); err == nil && req.LastLogIndex <= applied {
		err = fmt.Errorf("snapshot up to %d refused: applied up to %d already", req.LastLogIndex, applied)
	}
	if err != nil && rpc.Reader != nil {
		_, drained := io.Copy(io.Discard, rpc.Reader) // or the next request on the stream would be read out of its middle
		err = errors.Join(err, drained)
	}
	return err
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

func (p *pipeline) run() {
	for {
		select {
		case f := <-p.AppendPipeline.Consumer():
			p.t.note(p.id, f.Request(), f.Response())
			select {
			case p.out <- f:
			case <-p.stop:
				return
			}
		case <-p.stop:
			return
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
