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

// runningPeers returns the other members that run. Locked.
func (m *Members) runningPeers(but peer.ID) []peer.ID {
	var out []peer.ID
	for _, e := range m.order {
		if e != m.self && e.id != but && e.running() {
			out = append(out, e.id)
		}
	}
	return out
}

// company returns whom news goes to: all that run where they are few, else partners, of whom each node chooses some and takes in those who
// chose it. So a node of a large cluster keeps up a bounded number of connections, and a newcomer is told things as soon as it has told
// somebody. Locked.
func (m *Members) company() []*entry {
	alive := 0
	for _, e := range m.order {
		if e != m.self && e.running() {
			if alive++; alive > fanOut {
				break
			}
		}
	}
	if alive <= fanOut {
		m.partners = m.partners[:0]
		for _, e := range m.order {
			if e != m.self && e.running() {
				m.partners = append(m.partners, e)
			}
		}
		return m.partners
	}
	m.partners = slices.DeleteFunc(m.partners, func(e *entry) bool { return !e.running() })
	for len(m.partners) < chosen {
		m.adopt(m.anybody())
	}
	return m.partners
}

// adopt makes a running node a partner while there is room. Locked.
func (m *Members) adopt(e *entry) {
	if e != nil && e != m.self && len(m.partners) < fanOut && e.running() && !slices.Contains(m.partners, e) {
		m.partners = append(m.partners, e)
	}
}

// anybody returns another node that runs, any alike; nil when there is none. Locked.
func (m *Members) anybody() *entry {
	for range 16 { // most of them run
		if e := m.order[m.rng.IntN(len(m.order))]; e != m.self && e.running() {
			return e
		}
	}
	from := m.rng.IntN(len(m.order))
	for i := range m.order {
		if e := m.order[(from+i)%len(m.order)]; e != m.self && e.running() {
			return e
		}
	}
	return nil
}

// announce tells partners of a node at once, and leaves the rest to gossip. Locked.
func (m *Members) announce(id peer.ID) {
	to := m.company()
	for _, p := range to {
		if p.id != id {
			m.tell(p.id, id)
		}
	}
	if len(m.order) > len(to)+2 {
		m.dirty[id] = true
	}
}

// pass notes that there is news of a node to be passed on. Locked.
func (m *Members) pass(id peer.ID, trigger string) {
	m.dirty[id] = true
	if trigger == "update" || trigger == "heard" {
		return
	}
	m.urgent = true
	soon := time.Now().Add(meetAfterNews/2 + m.jitter(meetAfterNews))
	if len(m.order) > fanOut+1 && !m.nextMeet.IsZero() && soon.Before(m.nextMeet) {
		m.nextMeet = soon
	}
}

// passOn tells a few partners the news, unless it was just done. Locked.
func (m *Members) passOn(now time.Time) {
	every, most := newsEvery, newsTo
	if m.urgent {
		every, most = urgentEvery, urgentTo
	}
	if len(m.dirty) == 0 || now.Sub(m.flushed) < every {
		return
	}
	m.flushed, m.urgent = now, false
	to := slices.Clone(m.company())
	m.rng.Shuffle(len(to), func(i, j int) { to[i], to[j] = to[j], to[i] })
	for _, p := range to[:min(len(to), most)] {
		for id := range m.dirty {
			if id != p.id {
				m.tell(p.id, id)
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
	m.adopt(m.entries[from])
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
	m.passOn(time.Now())
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
	for _, e := range m.order {
		if !e.expelled {
			out[e.bucket()] ^= e.hash()
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
	} else if v != nil {
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
	for _, e := range m.order {
		switch {
		case e.expelled:
		case differs[e.bucket()]:
			sum.Items = append(sum.Items, &wirev1.ViewSummary_Item{Id: []byte(e.id), Hash: e.hash()})
		default:
			m.agreed(e)
		}
	}
	sum.Self = m.self.told().toWire()
	return &wirev1.ViewReply{Summary: sum}, nil
}

// agreed: another member holds the same of a node as this one, which is as good as being told of it. Locked.
func (m *Members) agreed(e *entry) { e.met = e.met || !e.unheard && e.info.Boot != 0 }

// diff returns what the other side should get and give; nil when the views are equal. Locked.
func (m *Members) diff(sum *wirev1.ViewSummary) *wirev1.ViewDiff {
	out := &wirev1.ViewDiff{}
	theirs := map[peer.ID]uint64{}
	for _, it := range sum.GetItems() {
		id := peer.ID(it.GetId())
		theirs[id] = it.GetHash()
		e := m.entries[id]
		if (e == nil || (!e.expelled && e.hash() != it.GetHash())) && len(out.Want) < maxStates {
			out.Want = append(out.Want, it.GetId())
		}
	}
	differs := [buckets]bool{}
	for _, i := range sum.GetBuckets() {
		if i < buckets {
			differs[i] = true
		}
	}
	for _, e := range m.order {
		h, ok := theirs[e.id]
		switch same := ok && h == e.hash() || !differs[e.bucket()]; {
		case e.expelled:
		case same:
			m.agreed(e)
		case len(out.States) < maxStates:
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
	to := m.anybody()
	if to == nil {
		return
	}
	m.spawn(func() {
		if m.exchange(to.id) == nil {
			return
		}
		m.mu.Lock() // view has counted and looked into the failure; another one is met soon
		defer m.mu.Unlock()
		if soon := time.Now().Add(meetAfterNews/2 + m.jitter(meetAfterNews)); soon.Before(m.nextMeet) {
			m.nextMeet = soon
		}
	})
}

// pushNow tells members of a node and waits until it is done or ctx ends.
func (m *Members) pushNow(ctx context.Context, about peer.ID) {
	m.mu.Lock()
	to := m.company()
	done := make(chan struct{}, len(to))
	waiting := 0
	for _, p := range to {
		if p.id == about {
			continue
		}
		m.tell(p.id, about)
		if b := m.outbox[p.id]; b != nil {
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
