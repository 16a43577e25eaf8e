package arbiter

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	iradix "github.com/hashicorp/go-immutable-radix"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// feedUpdate is an update as the view takes it.
type feedUpdate struct {
	whole     *iradix.Tree // a snapshot, or
	registers []*Register
	life      incarnation // of the feeder's state
	at        point
	complete  uint64
	meta      *meta
}

// follower keeps the local view current through a voter's feed while this node's own machine is not.
type follower struct {
	a *Arbiter

	mu     sync.Mutex // guards the rest
	stream peers.Stream
	from   peer.ID
	ever   bool          // a feed was heard
	heard  time.Duration // when, on the boot-time clock
	age    time.Duration // how old the feeder's own knowledge was then
}

// staleness returns how old the local view may be, when it comes from a feed; < 0: no feed was ever heard.
func (f *follower) staleness() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.ever {
		return -1
	}
	return f.a.cfg.BootTime() - f.heard + f.age
}

// flush asks the feeder for what it holds back. Without a feed there is nothing to ask; the next one starts complete.
func (f *follower) flush() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stream == nil {
		return
	}
	err := f.stream.SetWriteDeadline(time.Now().Add(f.a.t.RPC))
	if err == nil {
		_, err = protodelim.MarshalTo(f.stream, &wirev1.ArbiterFeedRequest{Flush: true})
	}
	if err != nil {
		_ = f.stream.Reset() // the reader notices and goes elsewhere
	}
}

// run follows until the context ends.
func (f *follower) run(ctx context.Context) {
	wait := 20 * time.Millisecond
	failed := map[peer.ID]time.Time{}
	for ctx.Err() == nil {
		if f.a.machineCurrent() {
			if st := f.a.fsm.shown.Load(); st != nil {
				f.a.view.takeMachine(st)
			}
			f.pause(ctx, 250*time.Millisecond)
			continue
		}
		to := f.choose(failed)
		if to == "" {
			f.a.seek(ctx)
			f.pause(ctx, wait)
			wait = min(2*wait, time.Second)
			continue
		}
		f.a.view.leaveMachine()
		heard, err := f.follow(ctx, to, failed)
		if heard {
			wait = 20 * time.Millisecond
		}
		if err != nil && ctx.Err() == nil {
			f.a.log.Debug("feed ended", "node", to, "err", err)
			failed[to] = time.Now()
			f.pause(ctx, wait)
			wait = min(2*wait, time.Second)
		}
	}
}

func (f *follower) pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// choose picks a voter that did not fail of late, any of them alike, so that the load spreads; the leader, which has more to send than the
// others, only while there is nobody else.
func (f *follower) choose(failed map[peer.ID]time.Time) peer.ID {
	voters, _, _ := f.a.where.group()
	leader, _ := f.a.where.current()
	var good []peer.ID
	for _, v := range voters {
		if at, bad := failed[v]; v != f.a.cfg.Self && (!bad || time.Since(at) > 2*f.a.t.FeedKeepalive) {
			good = append(good, v)
		}
	}
	if len(good) == 0 {
		return ""
	}
	if i := slices.Index(good, leader); i >= 0 && len(good) > 1 {
		good = slices.Delete(good, i, i+1)
	}
	return good[f.a.cfg.Rand()%uint64(len(good))]
}

// follow reads one feed until it ends, is too old, somebody better is there, or the own machine is current.
func (f *follower) follow(ctx context.Context, to peer.ID, failed map[peer.ID]time.Time) (heard bool, err error) {
	open, cancel := context.WithTimeout(ctx, f.a.t.RPC)
	s, err := f.a.cfg.Peers.Open(open, to, protoFeed)
	cancel()
	if err != nil {
		return false, err
	}
	defer func() { _ = s.Reset() }()
	stop := context.AfterFunc(ctx, func() { _ = s.Reset() })
	defer stop()
	st := f.a.view.now()
	req := &wirev1.ArbiterFeedRequest{Cluster: st.meta.Cluster, Incarnation: st.at.inc, Lineage: st.meta.Lineage, Index: st.complete, Shard: thisShard}
	if err := s.SetWriteDeadline(time.Now().Add(f.a.t.RPC)); err != nil {
		return false, err
	}
	if _, err := protodelim.MarshalTo(s, req); err != nil {
		return false, err
	}
	f.setStream(s, to)
	defer f.setStream(nil, "")
	r := bufio.NewReaderSize(s, 16<<10)
	var whole *iradix.Txn
	for {
		if err := s.SetReadDeadline(time.Now().Add(3*f.a.t.FeedKeepalive + f.a.t.RPC)); err != nil {
			return heard, err
		}
		u := new(wirev1.ArbiterFeedUpdate)
		if err := (protodelim.UnmarshalOptions{MaxSize: peers.MaxMessage}).UnmarshalFrom(r, u); err != nil {
			return heard, err
		}
		if whole, err = f.take(u, whole); err != nil {
			return heard, err
		}
		heard = true
		if age := time.Duration(u.GetAgeMs()) * time.Millisecond; u.GetIndex() > 0 && age > 3*f.a.t.Heartbeat+f.a.t.FeedKeepalive {
			return heard, fmt.Errorf("the feeder has not heard the leader for %s", age)
		}
		if f.a.machineCurrent() || f.a.view.now().fromRaft {
			return heard, nil // the machine has caught up; should it fall behind again, the feed must begin anew
		}
		if leader, _ := f.a.where.current(); leader == to && whole == nil && f.choose(failed) != to {
			return heard, nil // it has come to lead: the next feed goes on from here
		}
	}
}

func (f *follower) setStream(s peers.Stream, from peer.ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stream, f.from = s, from
}

// take gives an update to the view. It returns the snapshot being gathered.
func (f *follower) take(u *wirev1.ArbiterFeedUpdate, whole *iradix.Txn) (*iradix.Txn, error) {
	if err := ours(u.GetShard()); err != nil {
		return nil, err
	}
	if in := (incarnation{u.GetIncarnation(), u.GetLineage()}); !in.none() && u.GetIndex() > 0 {
		f.a.meet(in)
		if _, seen := f.a.disk.incarnations(); in.before(seen) {
			return nil, fmt.Errorf("the feeder is of incarnation %s, %s was met", in, seen)
		}
	}
	var regs []*Register
	for _, w := range u.GetRegisters() {
		r := fromWire(w)
		if checkKey(r.Key) != nil {
			return nil, errors.New("a register without a proper key")
		}
		regs = append(regs, r)
	}
	up := &feedUpdate{registers: regs, life: incarnation{u.GetIncarnation(), u.GetLineage()}, at: point{u.GetIncarnation(), u.GetIndex()}, complete: u.GetComplete()}
	if w := u.GetWhere(); w != nil {
		f.a.hear(w)
		if w.GetMeta() != nil {
			m := metaFromWire(w.GetMeta())
			up.meta = &m
		}
	}
	if u.GetSnapshot() {
		if whole == nil {
			whole = iradix.New().Txn()
		}
		for _, r := range regs {
			whole.Insert([]byte(r.Key), r)
		}
		if !u.GetDone() {
			return whole, nil
		}
		up.whole, up.registers = whole.CommitOnly(), nil
	}
	if err := f.a.view.fromFeed(up); err != nil {
		return nil, err
	}
	if u.GetIndex() > 0 {
		f.mu.Lock()
		f.ever, f.heard, f.age = true, f.a.cfg.BootTime(), time.Duration(u.GetAgeMs())*time.Millisecond
		f.mu.Unlock()
	}
	return nil, nil
}
