package members

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// cause is why this node looks into another.
type cause uint8

const (
	causeSilence cause = iota // nothing came for too long
	causeClosed               // the connection or the watch stream ended
	causeContact              // it did not answer a call
	causeHint                 // somebody reports it dead
)

// starved reports whether this node was too late itself to judge others' silence.
func (m *Members) starved() bool { return m.late.now() > lateAfter }

// slack is the factor on timeouts: 1 + late/200 ms, at most maxSlack.
func (m *Members) slack() float64 {
	late := m.late.now()
	if late <= lateAfter {
		return 1
	}
	return min(maxSlack, 1+float64(late)/float64(lateAfter))
}

// silence is how long a node may be silent. Locked.
func (m *Members) silence(e *entry) time.Duration {
	p := m.cfg.Profile
	d := p.Silence + time.Duration(p.RTTs)*e.rtt.p99()
	return time.Duration(float64(d) * m.slack())
}

// stoodStill: this process did not run for so long that nothing it remembers of others' silence means anything.
func (m *Members) stoodStill(d time.Duration) {
	m.log.Warn("this process stood still; watching begins afresh", "for", d)
	m.mu.Lock()
	m.suspends++ // ends running inquiries without a result
	now := m.boot()
	for _, w := range m.watched {
		w.heard = now
	}
	for _, w := range m.watchers {
		w.acked = now
	}
	m.meetSomebody() // to learn what was said meanwhile, of this node first of all
	m.meetSomebody()
	m.mu.Unlock()
	if m.cfg.Suspended != nil {
		m.cfg.Suspended(d)
	}
}

// checkSilence looks into those who were silent for too long. Locked.
func (m *Members) checkSilence() {
	now := m.boot()
	for id, w := range m.watched {
		e := m.entries[id]
		age := now - w.heard
		if e == nil || age <= m.silence(e) {
			continue
		}
		m.inquire(e, causeSilence, fmt.Sprintf("silent for %v", age.Round(time.Millisecond)))
	}
}

// heard notes a sign of life from a node itself. Locked.
func (m *Members) heard(id peer.ID) {
	e := m.entries[id]
	if e == nil {
		return
	}
	e.lonely = 0
	e.lastByte = m.boot()
	if w := m.watched[id]; w != nil {
		w.heard = m.boot()
	}
	if e.suspect != "" {
		e.suspect = ""
		m.touch(e, "heard")
	}
}

// hears reports whether a node's heartbeats are coming in right now. Locked.
func (m *Members) hears(id peer.ID) bool {
	w := m.watched[id]
	return w != nil && w.stream != nil && m.boot()-m.entries[id].lastByte < m.cfg.Profile.Silence/2
}

// inquire looks into a node on a goroutine of its own, unless that is going on or it is known not to run. Locked.
func (m *Members) inquire(e *entry, why cause, evidence string) {
	if e == m.self || e.asking || !e.running() || m.leaving || e.unheard {
		return
	}
	q := &inquiry{m: m, e: e, cause: why, evidence: clip(evidence), at: e.info.version(), suspends: m.suspends, began: m.boot()}
	e.asking = m.spawn(q.run)
}

// inquiry finds out whether one life of a node goes on: by dialling it afresh and by asking who should hear it.
type inquiry struct {
	m        *Members
	e        *entry
	cause    cause
	evidence string
	at       version
	suspends int
	began    time.Duration

	refused  bool      // a dial was refused: proof
	alive    string    // who heard it, and when
	agree    []peer.ID // who did not
	asked    int       // who could be asked
	answered int       // who answered, starved ones included
}

func (q *inquiry) run() {
	select {
	case q.m.slots <- struct{}{}:
		defer func() { <-q.m.slots }()
	case <-q.m.ctx.Done():
	}
	if q.m.ctx.Err() == nil {
		q.look()
	}
	q.m.mu.Lock()
	defer q.m.mu.Unlock()
	q.e.asking = false
	if q.m.ctx.Err() == nil {
		q.decide()
	}
}

// look gathers evidence. After a closed connection the dial tells nearly always and the others are not bothered.
func (q *inquiry) look() {
	probed := make(chan peers.Outcome, 1)
	go func() {
		ctx, cancel := context.WithTimeout(q.m.ctx, q.m.cfg.Profile.Probe)
		defer cancel()
		probed <- q.m.cfg.Links.Probe(ctx, q.e.id)
	}()
	votes := make(chan vote, maxPeers)
	voters := 0
	outcome := peers.Silent
	if q.cause == causeSilence {
		voters = q.ask(votes)
		outcome = <-probed
	} else if outcome = <-probed; outcome == peers.Silent {
		voters = q.ask(votes)
	}
	switch outcome {
	case peers.Refused:
		q.refused = true
	case peers.Reached:
		q.alive = "its process answers"
	}
	for range voters {
		q.count(<-votes)
	}
	q.asked = voters
	if outcome == peers.Reached && q.cause == causeClosed {
		_ = q.m.exchange(q.e.id) // perhaps it is another life that answers; if this fails, heartbeats decide
	}
}

type vote struct {
	by  peer.ID
	err error
	*wirev1.ViewVote
}

// ask puts the question to the node's watchers, or when fewer than three are left to the closest members.
func (q *inquiry) ask(votes chan<- vote) int {
	m := q.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if q.e.running() && q.e.suspect == "" && q.current() {
		q.e.suspect = q.evidence
		m.touch(q.e, "suspect")
	}
	voters := m.votersFor(q.e)
	n := 0
	for _, id := range voters {
		req := &wirev1.ViewRequest{What: &wirev1.ViewRequest_Ask{Ask: &wirev1.ViewAsk{Id: []byte(q.e.id), Boot: q.at.boot}}}
		if m.spawn(func() {
			ctx, cancel := context.WithTimeout(m.ctx, m.cfg.Profile.Ask)
			defer cancel()
			var reply wirev1.ViewReply
			err := m.caller.Call(ctx, id, ViewProtocol, req, &reply)
			votes <- vote{id, err, reply.GetVote()}
		}) {
			n++
		}
	}
	return n
}

func (m *Members) votersFor(e *entry) []peer.ID {
	var out []peer.ID
	for _, id := range e.info.Watchers {
		if w := m.entries[id]; w != nil && w != m.self && w != e && w.running() {
			out = append(out, id)
		}
	}
	if len(out) >= 3 {
		return out
	}
	others := slices.DeleteFunc(m.runningPeers(e.id), func(id peer.ID) bool { return slices.Contains(out, id) })
	keys.Sort(e.point, others)
	return append(out, others[:min(len(others), 3-len(out))]...)
}

func (q *inquiry) count(v vote) {
	if v.err != nil || v.ViewVote == nil {
		return
	}
	q.answered++
	heard := time.Duration(min(v.GetHeardMs(), uint64(time.Hour.Milliseconds()))) * time.Millisecond
	switch {
	case v.GetStarved():
	case v.GetOutcome() == wirev1.ViewVote_REFUSED:
		q.refused = true
		q.agree = append(q.agree, v.by)
	case v.GetOutcome() == wirev1.ViewVote_REACHED, v.GetWatching() && heard < q.m.cfg.Profile.Silence-q.m.cfg.Profile.Heartbeat:
		q.alive = fmt.Sprintf("%s hears it", v.by.ShortString())
	case v.GetDead(), v.GetWatching(), v.GetOutcome() == wirev1.ViewVote_SILENT:
		q.agree = append(q.agree, v.by)
	}
}

// current reports whether the question still stands: the same life, not heard since, no standstill in between. Locked.
func (q *inquiry) current() bool {
	if !q.e.running() || !q.e.info.version().sameBoot(q.at) || q.m.suspends != q.suspends {
		return false
	}
	return q.e.lastByte < q.began
}

// silent reports whether this node itself can say that the other is silent. Locked.
func (q *inquiry) silent() bool {
	w := q.m.watched[q.e.id]
	p := q.m.cfg.Profile
	return !q.m.starved() && (w == nil || !w.beats || q.m.boot()-q.e.lastByte >= p.Silence-p.Heartbeat)
}

// decide draws the conclusion. Locked.
func (q *inquiry) decide() {
	m, e := q.m, q.e
	if !q.refused && (q.alive != "" || !q.current()) {
		q.clear()
		return
	}
	if q.refused {
		if e.running() && e.info.version().sameBoot(q.at) && q.alive == "" {
			m.condemn(e, append(q.agree, m.id), true, "connection refused: its process is gone")
			return
		}
		q.clear()
		return
	}
	votes := len(q.agree)
	if q.silent() {
		votes++
		q.agree = append(q.agree, m.id)
	}
	switch {
	case votes >= 2:
		m.condemn(e, q.agree, false, fmt.Sprintf("%s; confirmed by %s", q.evidence, names(m.name, q.agree)))
	case votes == 1 && q.asked == 0:
		m.condemn(e, q.agree, false, q.evidence+"; nobody else to ask")
	case votes == 1 && q.answered == 0:
		if e.lonely++; e.lonely >= 2 { // silence all around: perhaps it is this node that is cut off
			m.condemn(e, q.agree, false, q.evidence+"; nobody else answers either")
			return
		}
		q.again()
	default:
		q.again()
	}
}

// clear ends a suspicion. The node gets another full time of silence. Locked.
func (q *inquiry) clear() {
	m, e := q.m, q.e
	if q.alive != "" {
		e.lonely = 0
		if w := m.watched[e.id]; w != nil {
			w.heard = max(w.heard, m.boot())
		}
	}
	if e.suspect != "" {
		e.suspect = ""
		e.evidence = "was silent here: " + q.alive
		m.touch(e, "heard")
	}
}

// again leaves the suspicion standing; unless this node watches, nothing else would look a second time. Locked.
func (q *inquiry) again() {
	m, e := q.m, q.e
	if m.watched[e.id] == nil {
		m.watched[e.id] = &watched{}
	}
	w := m.watched[e.id]
	w.heard = max(w.heard, m.boot()-m.cfg.Profile.Silence/2)
}

// condemn calls one life of a node dead and tells everybody. Locked.
func (m *Members) condemn(e *entry, by []peer.ID, proof bool, evidence string) {
	at := e.info.version()
	at.counter += verdictReach
	e.verdict = &verdict{kind: Dead, at: at, evidence: clip(evidence), by: by[:min(len(by), maxPeers)], proof: proof, since: time.Now()}
	e.suspect, e.lonely = "", 0
	m.deaths.Add(1)
	m.lostNow(e)
	trigger := "silence"
	if proof {
		trigger = "refused"
	}
	m.log.Info("node is dead", "node", m.name(e.id), "evidence", evidence)
	m.touch(e, trigger)
	m.announce(e.id)
}

// vote answers another node's question.
func (m *Members) vote(ctx context.Context, from peer.ID, ask *wirev1.ViewAsk) (*wirev1.ViewReply, error) {
	id, err := idFromWire(ask.GetId())
	if err != nil {
		m.badMessages.Add(1)
		return nil, peers.Fail(wirev1.Failure_FORMAT, "vote: %v", err)
	}
	v := &wirev1.ViewVote{Starved: m.starved()}
	m.mu.Lock()
	m.heard(from)
	if e := m.entries[id]; e != nil {
		v.Dead = e.verdict.covers(e.info.version()) && e.info.Boot == ask.GetBoot()
	}
	if w := m.watched[id]; w != nil && w.beats {
		v.Watching, v.HeardMs = true, uint64(max(0, (m.boot()-m.entries[id].lastByte).Milliseconds()))
	}
	m.mu.Unlock()
	if id == m.id {
		v.Outcome = wirev1.ViewVote_REACHED
	} else if !v.Watching && !v.Dead && !v.Starved {
		ctx, cancel := context.WithTimeout(ctx, m.cfg.Profile.Probe)
		defer cancel()
		v.Outcome = map[peers.Outcome]wirev1.ViewVote_Outcome{
			peers.Silent: wirev1.ViewVote_SILENT, peers.Reached: wirev1.ViewVote_REACHED, peers.Refused: wirev1.ViewVote_REFUSED,
		}[m.cfg.Links.Probe(ctx, id)]
	}
	return &wirev1.ViewReply{Vote: v}, nil
}
