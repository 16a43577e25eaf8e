package arbiter

import (
	"bufio"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	protoFeed     = protocol.ID("/coppice/feed/1")
	feedPart      = 512 << 10 // bytes of registers after which an update is split
	maxFeeds      = 4096      // served at once
	feedWriteTime = 10 * time.Second
)

// feeder serves one follower: a snapshot if need be, then changes, pure checkpoints of a key at most once per FeedCoalesce.
type feeder struct {
	a      *Arbiter
	stream peers.Stream
	flush  chan struct{} // the follower wants what is held back

	pos     point
	lineage uint64               // to which pos belongs
	sent    map[string]time.Time // when a checkpoint of the key went out last
	held    map[string]heldBack
	where   *wirev1.ArbiterWhere
	last    time.Time // when something was sent
}

type heldBack struct {
	due   time.Time
	index uint64 // of the first change held back
}

// serveFeed implements peers.Handler.
func (a *Arbiter) serveFeed(from peer.ID, s peers.Stream) {
	if a.feeds.Add(1) > maxFeeds {
		a.feeds.Add(-1)
		_ = s.Reset()
		return
	}
	defer a.feeds.Add(-1)
	defer func() { _ = s.Reset() }()
	r := bufio.NewReaderSize(s, 1<<10)
	if err := s.SetReadDeadline(time.Now().Add(a.t.RPC * 4)); err != nil {
		return
	}
	req := new(wirev1.ArbiterFeedRequest)
	if err := (protodelim.UnmarshalOptions{MaxSize: 4 << 10}).UnmarshalFrom(r, req); err != nil {
		return
	}
	if err := ours(req.GetShard()); err != nil {
		a.log.Warn("arbiter: feed refused", "node", from, "err", err)
		return
	}
	st := a.view.now()
	a.meet(incarnation{req.GetIncarnation(), req.GetLineage()})
	if !st.fromRaft || a.superseded() || req.GetCluster() != "" && req.GetCluster() != st.meta.Cluster {
		a.log.Debug("feed refused", "node", from, "cluster", req.GetCluster(), "current", st.fromRaft)
		return
	}
	if err := s.SetReadDeadline(time.Time{}); err != nil {
		return
	}
	f := &feeder{a: a, stream: s, flush: make(chan struct{}, 1), pos: point{req.GetIncarnation(), req.GetIndex()}, lineage: req.GetLineage(), sent: map[string]time.Time{}, held: map[string]heldBack{}}
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		f.listen(r)
	}()
	f.run(gone)
	_ = s.Reset()
	<-gone
}

// listen takes the follower's wishes until the stream ends.
func (f *feeder) listen(r *bufio.Reader) {
	for {
		req := new(wirev1.ArbiterFeedRequest)
		if err := (protodelim.UnmarshalOptions{MaxSize: 4 << 10}).UnmarshalFrom(r, req); err != nil {
			return
		}
		if req.GetFlush() {
			select {
			case f.flush <- struct{}{}:
			default:
			}
		}
	}
}

func (f *feeder) run(gone <-chan struct{}) {
	flush := false
	for {
		changes, st, next, ok := f.a.view.since(f.pos.index)
		if !st.fromRaft {
			return
		}
		var err error
		if !ok || f.pos.inc != st.at.inc || f.lineage != st.meta.Lineage {
			err = f.snapshot(st)
		} else {
			err = f.changes(changes, st, flush)
		}
		if err != nil {
			return
		}
		flush = false
		timer := time.NewTimer(f.untilDue())
		select {
		case <-next:
		case <-timer.C:
		case <-f.flush:
			flush = true
		case <-gone:
			timer.Stop()
			return
		case <-f.a.closing:
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// untilDue is how long nothing need be sent.
func (f *feeder) untilDue() time.Duration {
	at := f.last.Add(f.a.t.FeedKeepalive)
	for _, h := range f.held {
		if h.due.Before(at) {
			at = h.due
		}
	}
	return max(0, time.Until(at))
}

func (f *feeder) snapshot(st *viewState) error {
	var regs []*wirev1.ArbiterRegister
	size := 0
	it := st.tree.Root().Iterator()
	for _, v, ok := it.Next(); ok; _, v, ok = it.Next() {
		r := toWire(v.(*Register))
		regs = append(regs, r)
		if size += proto.Size(r); size >= feedPart {
			if err := f.send(&wirev1.ArbiterFeedUpdate{Shard: thisShard, Snapshot: true, Registers: regs}); err != nil {
				return err
			}
			regs, size = nil, 0
		}
	}
	f.pos, f.lineage = st.at, st.meta.Lineage
	clear(f.held)
	clear(f.sent)
	f.where = nil
	return f.send(f.stamp(&wirev1.ArbiterFeedUpdate{Shard: thisShard, Snapshot: true, Done: true, Registers: regs}, st))
}

func (f *feeder) changes(changes []change, st *viewState, flush bool) error {
	now := time.Now()
	out := map[string]uint64{} // key -> index of its last change
	var order []string
	add := func(key string, index uint64) {
		if _, there := out[key]; !there {
			order = append(order, key)
		}
		out[key] = index
	}
	for _, c := range changes {
		h, isHeld := f.held[c.key]
		switch due := f.sent[c.key].Add(f.a.t.FeedCoalesce); {
		case c.soft && now.Before(due) && out[c.key] == 0:
			if !isHeld {
				h = heldBack{due: due, index: c.index}
			}
			f.held[c.key] = h
		default:
			add(c.key, c.index)
		}
	}
	for key, h := range f.held {
		if _, going := out[key]; !going && (flush || !now.Before(h.due)) {
			add(key, h.index)
		}
	}
	for _, key := range order {
		delete(f.held, key)
		f.sent[key] = now
	}
	f.forgetSent(now)
	f.pos = st.at
	return f.sendChanges(order, out, st, flush)
}

// forgetSent drops marks that hold nothing back any more.
func (f *feeder) forgetSent(now time.Time) {
	if len(f.sent) < 1024 {
		return
	}
	for key, at := range f.sent {
		if now.Sub(at) > f.a.t.FeedCoalesce {
			delete(f.sent, key)
		}
	}
}

func (f *feeder) sendChanges(order []string, index map[string]uint64, st *viewState, flush bool) error {
	var regs []*wirev1.ArbiterRegister
	size := 0
	for _, key := range order {
		r := toWire(treeGet(st.tree, key))
		if r == nil {
			r = &wirev1.ArbiterRegister{Key: key, Index: index[key], Incarnation: st.at.inc, Deleted: true}
		}
		regs = append(regs, r)
		if size += proto.Size(r); size >= feedPart {
			if err := f.send(&wirev1.ArbiterFeedUpdate{Shard: thisShard, Registers: regs, Incarnation: st.at.inc, Lineage: st.meta.Lineage}); err != nil {
				return err
			}
			regs, size = nil, 0
		}
	}
	u := f.stamp(&wirev1.ArbiterFeedUpdate{Shard: thisShard, Registers: regs}, st)
	if len(regs) == 0 && u.GetWhere() == nil && !flush && time.Since(f.last) < f.a.t.FeedKeepalive {
		return nil
	}
	return f.send(u)
}

// stamp says how far the update brings the follower.
func (f *feeder) stamp(u *wirev1.ArbiterFeedUpdate, st *viewState) *wirev1.ArbiterFeedUpdate {
	u.Incarnation, u.Lineage, u.Index, u.Complete = st.at.inc, st.meta.Lineage, st.at.index, st.at.index
	for _, h := range f.held {
		u.Complete = min(u.Complete, h.index-1)
	}
	u.AgeMs = uint64(max(0, f.a.leaderAge()) / time.Millisecond)
	where := f.a.whereNow()
	where.Index = 0 // stands in the update
	if !proto.Equal(where, f.where) {
		f.where, u.Where = where, where
	}
	return u
}

func (f *feeder) send(u *wirev1.ArbiterFeedUpdate) error {
	if err := f.stream.SetWriteDeadline(time.Now().Add(feedWriteTime)); err != nil {
		return err
	}
	f.last = time.Now()
	_, err := protodelim.MarshalTo(f.stream, u)
	return err
}
