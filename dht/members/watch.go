package members

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/unison"
)

// ackEvery: so many beats ask for one answer, which measures the round trip and shows that the watcher is there.
const ackEvery = 4

// watcher is one of this node's watchers, and the goroutine that pushes heartbeats to it.
type watcher struct {
	cancel context.CancelFunc
	acked  time.Duration // boot time of its last sign of life, or of the stream's opening
}

// watched is a node that this one watches.
type watched struct {
	heard  time.Duration // boot time from which its silence counts
	beats  bool          // heartbeats have come
	stream peers.Stream  // nil: none yet, or it ended
}

// chooseWatchers picks this node's watchers anew after a change of the view. Locked.
func (m *Members) chooseWatchers() {
	var ids []peer.ID
	if !m.leaving {
		ids = m.pickWatchers()
	}
	for id, w := range m.watchers {
		if !slices.Contains(ids, id) {
			w.cancel()
			delete(m.watchers, id)
		}
	}
	for _, id := range ids {
		if m.watchers[id] != nil {
			continue
		}
		ctx, cancel := context.WithCancel(m.ctx)
		w := &watcher{cancel: cancel, acked: m.boot()}
		if !m.spawn(func() { m.pushBeats(ctx, id, w) }) {
			cancel()
			return
		}
		m.watchers[id] = w
	}
	if !slices.Equal(ids, m.self.info.Watchers) && !m.leaving {
		info := m.self.info.clone()
		info.Watchers = ids
		info.Counter++
		m.self.info = &info
		m.dirty[m.id] = true
		m.touch(m.self, "update")
		m.refresh = false // nothing that matters here changed
	}
}

// recheck notes whom a change of one node may concern: itself, as watched or as watcher, and if it runs no more those it watched. Locked.
func (m *Members) recheck(e *entry, old shown, now State) {
	m.look = append(m.look, e)
	was := old.info != nil && old.state.Running()
	if was && !now.Running() {
		m.lookAll = time.Now()
	} else if !was && m.lookAll.IsZero() {
		m.lookAll = time.Now().Add(time.Second)
	}
	if e == m.self || m.watchers[e.id] != nil || m.uneven || len(m.watchers) < m.cfg.Profile.Watchers {
		m.refresh = true
		return
	}
	for id := range m.watchers {
		if w := m.entries[id]; w != nil && keys.Closer(m.self.point, e.point, w.point) {
			m.refresh = true
			return
		}
	}
}

// pickWatchers returns the closest members, at most half of them (rounded up) of one zone while there are others. Locked.
func (m *Members) pickWatchers() []peer.ID {
	now := time.Now()
	type near struct {
		e *entry
		d keys.Point
	}
	var able, shunned []near
	for _, e := range m.order {
		if e == m.self || !e.running() {
			continue
		}
		n := near{e, keys.Distance(m.self.point, e.point)}
		if now.Before(e.shunned) {
			shunned = append(shunned, n)
		} else {
			able = append(able, n)
		}
	}
	byDistance := func(a, b near) int { return bytes.Compare(a.d[:], b.d[:]) }
	slices.SortFunc(able, byDistance)
	slices.SortFunc(shunned, byDistance)
	k := m.cfg.Profile.Watchers
	most := (k + 1) / 2
	zones := map[string]int{}
	var out, rest []peer.ID
	m.uneven = len(shunned) > 0
	mixed := slices.ContainsFunc(able, func(n near) bool { return n.e.info.Zone != able[0].e.info.Zone })
	for _, n := range able {
		if z := n.e.info.Zone; len(out) < k && zones[z] < most {
			zones[z]++
			out = append(out, n.e.id)
		} else {
			m.uneven = m.uneven || mixed && len(out) < k
			rest = append(rest, n.e.id)
		}
	}
	for _, n := range shunned {
		rest = append(rest, n.e.id)
	}
	return append(out, rest[:max(0, min(k-len(out), len(rest)))]...)
}

// chooseWatched starts the clock for those who named this node as watcher, and for those whose watchers are all gone. Locked.
func (m *Members) chooseWatched(now time.Time) {
	list := m.look
	m.look = nil
	if !m.lookAll.IsZero() && !now.Before(m.lookAll) {
		m.lookAll, list = time.Time{}, m.order
	}
	at := m.boot()
	for _, e := range list {
		w := m.watched[e.id]
		if e == m.self || !e.running() || e.unheard {
			if w != nil && w.stream == nil {
				delete(m.watched, e.id)
			}
			continue
		}
		want := e.suspect != "" || slices.Contains(e.info.Watchers, m.id) || m.orphan(e)
		switch {
		case want && w == nil:
			m.watched[e.id] = &watched{heard: at}
		case !want && w != nil && w.stream == nil:
			delete(m.watched, e.id)
		}
	}
}

// orphan reports whether none of a node's watchers runs and this node is among those closest to it. Locked.
func (m *Members) orphan(e *entry) bool {
	if e.info.Boot == 0 || slices.ContainsFunc(e.info.Watchers, func(id peer.ID) bool {
		w := m.entries[id]
		return w != nil && w != e && w.running()
	}) {
		return false
	}
	closer := 0
	for _, o := range m.order {
		if o != e && o != m.self && o.running() && keys.Closer(e.point, o.point, m.self.point) {
			if closer++; closer == m.cfg.Profile.Watchers {
				return false
			}
		}
	}
	return true
}

// pushBeats keeps one watch stream to a watcher open until ctx ends.
func (m *Members) pushBeats(ctx context.Context, to peer.ID, w *watcher) {
	defer w.cancel()
	wait := m.cfg.Profile.Heartbeat / 2
	for ctx.Err() == nil {
		opened := time.Now()
		m.pushStream(ctx, to, w)
		if time.Since(opened) > 10*m.cfg.Profile.Heartbeat {
			wait = m.cfg.Profile.Heartbeat / 2
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, 8*m.cfg.Profile.Heartbeat)
	}
}

// pushStream opens a stream and pushes heartbeats until it breaks, its watcher does not answer, or ctx ends.
func (m *Members) pushStream(ctx context.Context, to peer.ID, w *watcher) {
	open, cancel := context.WithTimeout(ctx, m.cfg.Profile.Silence)
	s, err := m.cfg.Peers.Open(open, to, WatchProtocol)
	cancel()
	if err != nil {
		m.noWatcher(ctx, to)
		return
	}
	p := &beats{m: m, to: to, w: w, s: s, sent: map[uint64]time.Time{}, broken: make(chan struct{})}
	m.mu.Lock()
	w.acked = m.boot()
	reading := m.spawn(p.readAcks)
	m.mu.Unlock()
	if reading {
		p.run(ctx)
		<-p.broken
	}
	_ = s.Reset() // after a proper end this changes nothing
}

// noWatcher: a watcher cannot be reached. Either it is dead or it is only this node that does not get there; then another is chosen.
func (m *Members) noWatcher(ctx context.Context, to peer.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[to]
	if ctx.Err() != nil || e == nil {
		return
	}
	m.inquire(e, causeContact, "does not take heartbeats")
	if w := m.watchers[to]; w != nil && m.boot()-w.acked > 4*m.silence(e) {
		e.shunned = time.Now().Add(shunFor)
		m.refresh = true
	}
}

// beats is one watch stream, on the side of the node that is watched.
type beats struct {
	m      *Members
	to     peer.ID
	w      *watcher
	s      peers.Stream
	broken chan struct{} // closed when no more answers come

	mu   sync.Mutex // guards the rest
	sent map[uint64]time.Time
	rtt  time.Duration // newest, not yet told
}

func (p *beats) run(ctx context.Context) {
	ticker := unison.New(p.m.cfg.Profile.Heartbeat, string(p.m.id))
	defer ticker.Stop()
	var told version
	for seq := uint64(1); ; seq++ {
		overdue, lost := p.patience()
		if lost {
			p.m.noWatcher(ctx, p.to)
			_ = p.s.Reset()
			return
		}
		beat := &wirev1.WatchBeat{Seq: seq, Ack: seq%ackEvery == 1 || overdue}
		p.m.mu.Lock()
		if v := p.m.self.info.version(); v != told {
			told = v
			beat.Self = p.m.self.told().toWire()
		}
		p.m.mu.Unlock()
		if p.write(beat) != nil {
			_ = p.s.Reset()
			return
		}
		select {
		case <-ticker.C:
			ticker.Next()
		case <-p.broken:
			return
		case <-ctx.Done():
			if p.write(&wirev1.WatchBeat{Seq: seq + 1, Unwatch: true}) != nil || p.s.Close() != nil {
				_ = p.s.Reset()
			}
			return
		}
	}
}

// patience: overdue when the watcher should have answered, lost when it is of no use any more.
func (p *beats) patience() (overdue, lost bool) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	e := p.m.entries[p.to]
	if e == nil {
		return false, true
	}
	age := p.m.boot() - p.w.acked
	limit := p.m.silence(e) + ackEvery*p.m.cfg.Profile.Heartbeat
	if age > limit {
		p.m.inquire(e, causeContact, "does not answer heartbeats")
	}
	return age > (ackEvery+1)*p.m.cfg.Profile.Heartbeat, age > 4*limit
}

func (p *beats) write(b *wirev1.WatchBeat) error {
	p.mu.Lock()
	if b.Ack {
		p.sent[b.Seq] = time.Now()
		delete(p.sent, b.Seq-16*ackEvery)
	}
	b.RttUs = uint32(min(p.rtt.Microseconds(), 1<<31))
	p.rtt = 0
	p.mu.Unlock()
	return writeFrame(p.s, b, p.m.cfg.Profile.Silence)
}

func (p *beats) readAcks() {
	defer close(p.broken)
	r := bufio.NewReaderSize(p.s, 256)
	for {
		var ack wirev1.WatchAck
		if readFrame(r, &ack) != nil {
			_ = p.s.Reset()
			return
		}
		p.mu.Lock()
		at, ok := p.sent[ack.GetSeq()]
		delete(p.sent, ack.GetSeq())
		rtt := time.Since(at)
		if ok {
			p.rtt = max(rtt, time.Microsecond)
		}
		p.mu.Unlock()
		p.m.mu.Lock()
		p.w.acked = p.m.boot()
		p.m.heard(p.to)
		if e := p.m.entries[p.to]; ok && e != nil {
			e.measured(rtt)
		}
		p.m.hearAgainst(ack.GetVerdict())
		p.m.mu.Unlock()
	}
}

// watch serves a watch stream: from is watched by this node.
func (m *Members) watch(from peer.ID, s peers.Stream) {
	if !m.IsMember(from) {
		m.badMessages.Add(1)
		_ = s.Reset()
		return
	}
	w := m.beginWatch(from, s)
	unwatch, err := m.readBeats(from, s, w)
	m.mu.Lock()
	defer m.mu.Unlock()
	if w.stream == s {
		w.stream = nil
	}
	if unwatch {
		_ = s.Close()
		if e := m.entries[from]; e != nil {
			m.look = append(m.look, e)
		}
		return
	}
	_ = s.Reset()
	if errors.Is(err, errBeat) {
		m.badMessages.Add(1)
		if e := m.entries[from]; e != nil && !e.blamed {
			e.blamed = true
			m.log.Warn("a watch stream carried what is no heartbeat; further ones are only counted", "node", m.name(from), "err", err)
		}
	}
	if e := m.entries[from]; e != nil && w == m.watched[from] && w.stream == nil {
		m.inquire(e, causeClosed, "watch stream closed")
	}
}

func (m *Members) beginWatch(from peer.ID, s peers.Stream) *watched {
	m.mu.Lock()
	defer m.mu.Unlock()
	w := m.watched[from]
	if w == nil {
		w = &watched{}
		m.watched[from] = w
	}
	if w.stream != nil {
		_ = w.stream.Reset() // the newest counts
	}
	w.stream, w.beats = s, true
	m.heard(from)
	return w
}

func (m *Members) readBeats(from peer.ID, s peers.Stream, w *watched) (unwatch bool, err error) {
	r := bufio.NewReaderSize(s, 512)
	for {
		if err := s.SetReadDeadline(time.Now().Add(time.Minute + 10*m.cfg.Profile.Silence)); err != nil {
			return false, err
		}
		var beat wirev1.WatchBeat
		if err := readFrame(r, &beat); err != nil {
			return false, err
		}
		m.mu.Lock()
		against := m.takeBeat(from, w, &beat)
		m.mu.Unlock()
		if beat.GetUnwatch() {
			return true, nil
		}
		if !beat.GetAck() && against == nil {
			continue
		}
		if err := writeFrame(s, &wirev1.WatchAck{Seq: beat.GetSeq(), Verdict: against}, m.cfg.Profile.Silence); err != nil {
			return false, err
		}
	}
}

// takeBeat takes in a heartbeat and returns what this node holds against its sender. Locked.
func (m *Members) takeBeat(from peer.ID, w *watched, beat *wirev1.WatchBeat) *wirev1.Verdict {
	m.heard(from)
	w.heard = m.boot()
	if self := beat.GetSelf(); self != nil {
		m.mergeAll(from, []*wirev1.MemberState{self})
	}
	if e := m.entries[from]; e != nil && beat.GetRttUs() != 0 {
		e.measured(time.Duration(beat.GetRttUs()) * time.Microsecond)
	}
	if m.watched[from] == nil && w.stream != nil {
		m.watched[from] = w // it was given up and lives
	}
	return m.against(from)
}
