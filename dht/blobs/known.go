package blobs

import (
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"
)

// knownNodes is how many nodes are remembered of a peer, twice over.
const knownNodes = 4096

// knowledge is which nodes peers are believed to have complete: those they acknowledged, and those on the way to them ahead of what is
// sent next on the same stream. It only saves bytes and round trips: a peer that has lost a node says so.
type knowledge struct {
	mu       sync.Mutex // guards all below
	peers    map[peer.ID]*recent
	inflight map[peer.ID]int
	blamed   map[peer.ID]struct{}
}

// recent is a set that forgets: when young is full it becomes old, and the former old ones go.
type recent struct{ young, old map[Hash]struct{} }

func newKnowledge() *knowledge {
	return &knowledge{peers: map[peer.ID]*recent{}, inflight: map[peer.ID]int{}, blamed: map[peer.ID]struct{}{}}
}

// blame reports whether it is the first time that a peer is blamed for garbage; for at most knownNodes peers.
func (k *knowledge) blame(id peer.ID) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, ok := k.blamed[id]; ok || len(k.blamed) >= knownNodes {
		return false
	}
	k.blamed[id] = struct{}{}
	return true
}

// begin counts a push to a peer, unless there are most already; end takes it off.
func (k *knowledge) begin(id peer.ID, most int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.inflight[id] >= most {
		return false
	}
	k.inflight[id]++
	return true
}

func (k *knowledge) end(id peer.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.inflight[id]--; k.inflight[id] == 0 {
		delete(k.inflight, id)
	}
}

func (k *knowledge) learn(id peer.ID, h Hash) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.peers[id]
	if r == nil {
		r = &recent{young: map[Hash]struct{}{}}
		k.peers[id] = r
	}
	if len(r.young) >= knownNodes {
		r.young, r.old = map[Hash]struct{}{}, r.young
	}
	r.young[h] = struct{}{}
}

func (k *knowledge) has(id peer.ID, h Hash) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.peers[id]
	if r == nil {
		return false
	}
	if _, ok := r.young[h]; ok {
		return true
	}
	_, ok := r.old[h]
	return ok
}

func (k *knowledge) forget(id peer.ID, hs ...Hash) {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.peers[id]
	if r == nil {
		return
	}
	for _, h := range hs {
		delete(r.young, h)
		delete(r.old, h)
	}
}

// forgetAll drops what is known of a peer that may have lost it: its disk was replaced, or it was away for long.
func (k *knowledge) forgetAll(id peer.ID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.peers, id)
}
