package members

import (
	"context"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// buckets of an exchange: the first six bits of a node's place.
const buckets = 64

func (e *entry) bucket() int { return int(e.point[0] >> 2) }

// box holds of whom one member is still to be told. One goroutine empties it, with as many in a message as have gathered.
type box struct {
	ids  map[peer.ID]bool
	done []chan<- struct{} // told when it is empty
}

// runningPeers returns the members to talk to, in random order. Locked.
func (m *Members) runningPeers(but peer.ID) []peer.ID {
	var out []peer.ID
	for id, e := range m.entries {
		if e != m.self && id != but && e.running() {
			out = append(out, id)
		}
	}
	slices.Sort(out) // so that a seed means something
	m.rng.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// announce tells up to fanOut members of a node at once, and leaves the rest to gossip. Locked.
func (m *Members) announce(id peer.ID) {
	to := m.runningPeers(id)
	for _, p := range to[:min(len(to), fanOut)] {
		m.tell(p, id)
	}
	if len(to) > fanOut {
		m.dirty[id] = true
	}
}

// flushGossip passes the news on to three random members. Locked.
func (m *Members) flushGossip() {
	if len(m.dirty) == 0 {
		return
	}
	to := m.runningPeers("")
	for _, p := range to[:min(len(to), gossipTo)] {
		for id := range m.dirty {
			if id != p {
				m.tell(p, id)
			}
		}
	}
	clear(m.dirty)
}

// tell puts a node into a member's box. Locked.
func (m *Members) tell(to, about peer.ID) {
	b := m.outbox[to]
	if b == nil {
		b = &box{ids: map[peer.ID]bool{}}
		if !m.spawn(func() { m.empty(to, b) }) {
			return
		}
		m.outbox[to] = b
	}
	b.ids[about] = true
}

// empty sends what gathers in a box until nothing does.
func (m *Members) empty(to peer.ID, b *box) {
	for {
		m.mu.Lock()
		if len(b.ids) == 0 {
			delete(m.outbox, to)
			done := b.done
			m.mu.Unlock()
			for _, c := range done {
				c <- struct{}{}
			}
			return
		}
		push := &wirev1.ViewPush{}
		for id := range b.ids {
			if e := m.entries[id]; e != nil && !e.expelled {
				push.States = append(push.States, e.told().toWire())
			}
			if delete(b.ids, id); len(push.States) == maxStates {
				break
			}
		}
		m.mu.Unlock()
		m.sent.Add(1)
		if _, err := m.view(to, &wirev1.ViewRequest{What: &wirev1.ViewRequest_Push{Push: push}}); err != nil {
			m.failedSends.Add(1)
		}
	}
}

// view makes one call of the view protocol. A member that does not answer is looked into.
func (m *Members) view(to peer.ID, req *wirev1.ViewRequest) (*wirev1.ViewReply, error) {
	ctx, cancel := context.WithTimeout(m.ctx, callTimeout+2*m.cfg.Profile.Probe)
	defer cancel()
	var reply wirev1.ViewReply
	err := m.caller.Call(ctx, to, ViewProtocol, req, &reply)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil || peers.CodeOf(err) != wirev1.Failure_OK {
		m.heard(to)
		return &reply, err
	}
	if e := m.entries[to]; e != nil && m.ctx.Err() == nil {
		m.inquire(e, causeContact, "does not answer")
	}
	return nil, err
}

// answer serves the view protocol.
func (m *Members) answer(ctx context.Context, from peer.ID, req *wirev1.ViewRequest) (*wirev1.ViewReply, error) {
	if !m.IsMember(from) {
		m.badMessages.Add(1)
		return nil, peers.Fail(wirev1.Failure_NOT_MEMBER, "%s has no admission of %s on record", m.id.ShortString(), from.ShortString())
	}
	if ask := req.GetAsk(); ask != nil {
		return m.vote(ctx, from, ask)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.heard(from)
	switch what := req.GetWhat().(type) {
	case *wirev1.ViewRequest_Push:
		m.mergeAll(from, what.Push.GetStates())
		return &wirev1.ViewReply{}, nil
	case *wirev1.ViewRequest_Digest:
		return m.answerDigest(from, what.Digest)
	case *wirev1.ViewRequest_Diff:
		m.mergeAll(from, what.Diff.GetStates())
		return &wirev1.ViewReply{Push: m.statesOf(what.Diff.GetWant())}, nil
	}
	m.badMessages.Add(1)
	return nil, peers.Fail(wirev1.Failure_FORMAT, "a request of the view protocol that this version does not know")
}

// mergeAll merges what can be read and counts the rest. Locked.
func (m *Members) mergeAll(from peer.ID, states []*wirev1.MemberState) {
	if len(states) > maxStates {
		m.badMessages.Add(1)
		states = states[:maxStates]
	}
	for _, w := range states {
		s, err := stateFromWire(w)
		if err != nil {
			m.badMessages.Add(1)
			m.log.Debug("dropped what a member says of a node", "node", from, "err", err)
			continue
		}
		m.merge(from, s)
	}
}

func (m *Members) statesOf(ids [][]byte) *wirev1.ViewPush {
	push := &wirev1.ViewPush{}
	for _, id := range ids {
		if e := m.entries[peer.ID(id)]; e != nil && !e.expelled && len(push.States) < maxStates {
			push.States = append(push.States, e.told().toWire())
		}
	}
	return push
}

// digest returns a hash of each bucket. Locked.
func (m *Members) digest() []uint64 {
	out := make([]uint64, buckets)
	for _, e := range m.entries {
		if !e.expelled {
			out[e.bucket()] ^= e.told().hash()
		}
	}
	return out
}

// against returns what this node holds against another. Locked.
func (m *Members) against(id peer.ID) *wirev1.Verdict {
	if e := m.entries[id]; e != nil && e.verdict.covers(e.info.version()) {
		return verdictToWire(e.verdict)
	}
	return nil
}

// hearAgainst refutes what the other side holds against this node. Locked.
func (m *Members) hearAgainst(w *wirev1.Verdict) {
	if v, err := verdictFromWire(w); err != nil {
		m.badMessages.Add(1)
	} else if v.kind != Alive {
		m.refute(v.at, v.evidence)
	}
}

// exchange compares views with a member and brings both up to date.
func (m *Members) exchange(to peer.ID) error {
	m.mu.Lock()
	digest := &wirev1.ViewDigest{Buckets: m.digest(), Self: m.self.told().toWire(), Verdict: m.against(to)}
	m.mu.Unlock()
	reply, err := m.view(to, &wirev1.ViewRequest{What: &wirev1.ViewRequest_Digest{Digest: digest}})
	if err != nil {
		return err
	}
	sum := reply.GetSummary()
	m.mu.Lock()
	m.hearAgainst(sum.GetVerdict())
	m.mergeAll(to, []*wirev1.MemberState{sum.GetSelf()})
	diff := m.diff(sum)
	m.mu.Unlock()
	if diff == nil {
		return nil
	}
	reply, err = m.view(to, &wirev1.ViewRequest{What: &wirev1.ViewRequest_Diff{Diff: diff}})
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mergeAll(to, reply.GetPush().GetStates())
	return nil
}

func (m *Members) answerDigest(from peer.ID, d *wirev1.ViewDigest) (*wirev1.ViewReply, error) {
	if len(d.GetBuckets()) != buckets {
		m.badMessages.Add(1)
		return nil, peers.Fail(wirev1.Failure_FORMAT, "a digest of %d buckets, want %d", len(d.GetBuckets()), buckets)
	}
	m.hearAgainst(d.GetVerdict())
	sum := &wirev1.ViewSummary{Verdict: m.against(from)}
	m.mergeAll(from, []*wirev1.MemberState{d.GetSelf()})
	differs := [buckets]bool{}
	for i, h := range m.digest() {
		if differs[i] = h != d.GetBuckets()[i]; differs[i] {
			sum.Buckets = append(sum.Buckets, uint32(i))
		}
	}
	for _, e := range m.entries {
		if differs[e.bucket()] && !e.expelled {
			sum.Items = append(sum.Items, &wirev1.ViewSummary_Item{Id: []byte(e.id), Hash: e.told().hash()})
		}
	}
	sum.Self = m.self.told().toWire()
	return &wirev1.ViewReply{Summary: sum}, nil
}

// diff returns what the other side should get and give; nil when the views are equal. Locked.
func (m *Members) diff(sum *wirev1.ViewSummary) *wirev1.ViewDiff {
	out := &wirev1.ViewDiff{}
	theirs := map[peer.ID]uint64{}
	for _, it := range sum.GetItems() {
		id := peer.ID(it.GetId())
		theirs[id] = it.GetHash()
		e := m.entries[id]
		if (e == nil || (!e.expelled && e.told().hash() != it.GetHash())) && len(out.Want) < maxStates {
			out.Want = append(out.Want, it.GetId())
		}
	}
	differs := [buckets]bool{}
	for _, i := range sum.GetBuckets() {
		if i < buckets {
			differs[i] = true
		}
	}
	for id, e := range m.entries {
		if h, ok := theirs[id]; differs[e.bucket()] && !e.expelled && (!ok || h != e.told().hash()) && len(out.States) < maxStates {
			out.States = append(out.States, e.told().toWire())
		}
	}
	if len(out.Want) == 0 && len(out.States) == 0 {
		return nil
	}
	return out
}

// meetSomebody exchanges views with a random member. Locked.
func (m *Members) meetSomebody() {
	if to := m.runningPeers(""); len(to) > 0 {
		m.spawn(func() { _ = m.exchange(to[0]) }) // view has counted and looked into the failure
	}
}

// pushNow tells members of a node and waits until it is done or ctx ends.
func (m *Members) pushNow(ctx context.Context, about peer.ID) {
	m.mu.Lock()
	to := m.runningPeers(about)
	to = to[:min(len(to), fanOut)]
	done := make(chan struct{}, len(to))
	waiting := 0
	for _, p := range to {
		m.tell(p, about)
		if b := m.outbox[p]; b != nil {
			b.done = append(b.done, done)
			waiting++
		}
	}
	m.mu.Unlock()
	for range waiting {
		select {
		case <-done:
		case <-ctx.Done():
			return
		case <-time.After(callTimeout):
			return
		}
	}
}
