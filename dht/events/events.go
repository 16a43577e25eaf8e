package events

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// Protocol is the protocol of this package.
const Protocol protocol.ID = "/coppice/event/1"

const (
	writeBatch   = 128 // published events stored and pushed together
	toldWaiting  = 8192
	gapMost      = 15 * time.Second // a gap that nobody filled for so long is given up
	quickPause   = 200 * time.Millisecond
	queueDefault = 1024
)

// Config is what Events needs. Self, Boot, DB, Peers, Caller and Alive are required.
type Config struct {
	Self peer.ID
	// Name of this node, for Event.Node.
	Name string
	// Boot is a number that no other start of this node has.
	Boot uint64
	DB   *pebble.DB
	// Prefix leads all keys in DB; "event/" where empty.
	Prefix string
	Peers  peers.Peers
	Caller *peers.Caller
	// Alive lists the members alive; this node may be among them.
	Alive func() []peer.ID
	Rand  *rand.Rand
	Log   *slog.Logger

	// Keep is the length of the history; 10,000 where 0.
	Keep int
	// SyncEvery is the time between two comparisons; 5 s where 0.
	SyncEvery time.Duration
	// Queue bounds what is published and not yet stored; 1,024 where 0.
	Queue int
}

func (c *Config) fill() error {
	if c.Self == "" || c.DB == nil || c.Peers == nil || c.Caller == nil || c.Alive == nil {
		return errors.New("events: the node's id, a database, peers, a caller and a view are needed")
	}
	if c.Prefix == "" {
		c.Prefix = "event/"
	}
	if c.Rand == nil {
		c.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Keep <= 0 {
		c.Keep = 10_000
	}
	if c.SyncEvery <= 0 {
		c.SyncEvery = 5 * time.Second
	}
	if c.Queue <= 0 {
		c.Queue = queueDefault
	}
	return nil
}

// Events is this node's part of the cluster's events. Its methods may be called from any goroutine.
type Events struct {
	cfg   Config
	queue chan Event
	quick chan peer.ID // compare with this member soon: it has what fills a gap
	push  *pusher
	stats stats

	mu      sync.Mutex // guards all below
	ring    *ring
	closed  bool
	counter uint64
	newest  time.Time // time of this node's newest event
	subs    []subscriber
	nextSub int
	told    []*wirev1.Event // for subscribers
	wake    chan struct{}
}

type subscriber struct {
	id    int
	above string
	f     func(Event)
}

type stats struct {
	published, overflow, received, duplicates, invalid, givenUp, lagged, pushFailed, pushDropped, synced, syncFailed, storeFailed atomic.Uint64
}

// Status is what Events did since the start, and holds.
type Status struct {
	// Kept events in the history, of so many Origins (nodes' boots); Channels with a last event.
	Kept, Origins, Channels int
	// Published here; Overflow: dropped at once because the queue was full; StoreFailed: dropped because the disk failed.
	Published, Overflow, StoreFailed uint64
	// Received from others, Duplicates and Invalid ones among what came.
	Received, Duplicates, Invalid uint64
	// GivenUp gaps, that nobody could fill. Lagged: events that subscribers were not told of because they were too slow.
	GivenUp, Lagged uint64
	// PushFailed, PushDropped: events not pushed to a member because it did not answer, or was too slow; comparison brings them.
	PushFailed, PushDropped uint64
	// Synced comparisons, SyncFailed ones.
	Synced, SyncFailed uint64
}

// Open reads the history and registers the protocol. Nothing that is published is stored before Run runs.
func Open(cfg Config) (*Events, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	r, err := openRing(cfg.DB, cfg.Prefix, cfg.Keep)
	if err != nil {
		return nil, err
	}
	e := &Events{
		cfg: cfg, ring: r, queue: make(chan Event, cfg.Queue), quick: make(chan peer.ID, 1), wake: make(chan struct{}, 1),
	}
	e.push = newPusher(e)
	peers.ServeCalls(cfg.Peers, Protocol, func() *wirev1.EventAsk { return &wirev1.EventAsk{} }, e.serve)
	return e, nil
}

// Publish hands an event in and returns at once. It is stored, pushed to the members and told to subscribers here soon after; where
// too many are waiting it is dropped and counted.
func (e *Events) Publish(ev Event) {
	if ev.Time.IsZero() {
		ev.Time = time.Now()
	}
	if ev.Node == "" {
		ev.Node = e.cfg.Name
	}
	select {
	case e.queue <- ev:
		e.stats.published.Add(1)
	default:
		e.stats.overflow.Add(1)
	}
}

// Run stores and pushes what is published, compares with others and calls subscribers until ctx ends; what was published before that
// is stored and pushed still.
func (e *Events) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { e.write(ctx) })
	wg.Go(func() { e.syncLoop(ctx) })
	wg.Go(func() { e.tellLoop(ctx) })
	wg.Wait()
	return ctx.Err()
}

// Close waits for pushes under way. The database must stay open until then.
func (e *Events) Close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.push.close()
	return nil
}

var errClosed = errors.New("events are closed")

func (e *Events) write(ctx context.Context) {
	for {
		select {
		case ev := <-e.queue:
			e.store(e.more(ev))
		case <-ctx.Done():
			for {
				select {
				case ev := <-e.queue:
					e.store(e.more(ev))
					continue
				default:
				}
				return
			}
		}
	}
}

// more takes what else is waiting, up to a batch.
func (e *Events) more(first Event) []Event {
	list := []Event{first}
	for len(list) < writeBatch {
		select {
		case ev := <-e.queue:
			list = append(list, ev)
		default:
			return list
		}
	}
	return list
}

// store gives published events their identity, keeps and pushes them.
func (e *Events) store(list []Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		e.stats.storeFailed.Add(uint64(len(list)))
		return
	}
	var wires []*wirev1.Event
	for i := range list {
		if list[i].Time.Before(e.newest) {
			list[i].Time = e.newest // so that times never contradict the counters
		}
		e.newest = list[i].Time
		w := list[i].wire()
		e.counter++
		w.Origin, w.Boot, w.Counter = []byte(e.cfg.Self), e.cfg.Boot, e.counter
		wires = append(wires, w)
	}
	fresh, ready, err := e.ring.add(wires)
	if err != nil {
		e.counter -= uint64(len(wires))
		e.stats.storeFailed.Add(uint64(len(list)))
		e.cfg.Log.Error("events could not be kept", "events", len(list), "err", err)
		return
	}
	e.tell(ready)
	e.push.send(fresh, "")
}

// accept keeps what came from a member and returns what was new.
func (e *Events) accept(list []*wirev1.Event, from peer.ID) ([]*wirev1.Event, error) {
	valid := slices.DeleteFunc(slices.Clone(list), func(w *wirev1.Event) bool { return check(w) != nil || e.claimsToBeMine(w) })
	e.stats.invalid.Add(uint64(len(list) - len(valid)))
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, errClosed
	}
	fresh, ready, err := e.ring.add(valid)
	if err != nil {
		e.stats.storeFailed.Add(uint64(len(valid)))
		return nil, err
	}
	e.stats.received.Add(uint64(len(fresh)))
	e.stats.duplicates.Add(uint64(len(valid) - len(fresh)))
	e.tell(ready)
	for _, w := range fresh {
		if len(e.ring.origin(w).extra) > 0 {
			select {
			case e.quick <- from:
			default:
			}
			break
		}
	}
	return fresh, nil
}

// claimsToBeMine: an event of this boot that this node has not published is a lie.
func (e *Events) claimsToBeMine(w *wirev1.Event) bool {
	if string(w.GetOrigin()) != string(e.cfg.Self) || w.GetBoot() != e.cfg.Boot {
		return false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return w.GetCounter() > e.counter
}

// List returns the events of a channel and those below it, from a time on, oldest first: the newest limit of them (0: all).
func (e *Events) List(prefix string, since time.Time, limit int) []Event {
	above := CleanChannel(prefix)
	from := since.UnixMicro()
	if since.IsZero() {
		from = 0
	}
	var found []*wirev1.Event
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	for _, p := range e.ring.order {
		w, err := e.ring.read(p.seq)
		if err != nil {
			e.cfg.Log.Error("events: the history cannot be read", "err", err)
			continue
		}
		if w != nil && w.GetTimeUnixUs() >= from && under(w.GetChannel(), above) {
			found = append(found, w)
		}
	}
	e.mu.Unlock()
	slices.SortFunc(found, compareTime)
	if limit > 0 && len(found) > limit {
		found = found[len(found)-limit:]
	}
	list := make([]Event, len(found))
	for i, w := range found {
		list[i] = fromWire(w)
	}
	return list
}

// Last returns the last event of each channel at or below a prefix, in order of channel, also of those that are silent for so long that
// the history has nothing of them.
func (e *Events) Last(prefix string) []Event {
	above := CleanChannel(prefix)
	e.mu.Lock()
	defer e.mu.Unlock()
	var list []Event
	for channel, w := range e.ring.last {
		if under(channel, above) {
			list = append(list, fromWire(w))
		}
	}
	slices.SortFunc(list, func(a, b Event) int { return strings.Compare(a.Channel, b.Channel) })
	return list
}

// Subscribe calls f for each event, of this node or another, in a channel or below it, that comes to be known from now on, while Run
// runs: on one goroutine, those of one node's boot in order. They may be old: a node that was away learns of what it missed. A
// subscriber that takes long delays the others; when too many wait, events are not told and counted as lagged.
func (e *Events) Subscribe(prefix string, f func(Event)) (cancel func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.nextSub++
	id := e.nextSub
	e.subs = append(e.subs, subscriber{id, CleanChannel(prefix), f})
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.subs = slices.DeleteFunc(slices.Clone(e.subs), func(s subscriber) bool { return s.id == id })
	}
}

// tell queues events for subscribers; called under mu.
func (e *Events) tell(ready []*wirev1.Event) {
	if len(ready) == 0 || len(e.subs) == 0 {
		return
	}
	if room := toldWaiting - len(e.told); len(ready) > room {
		e.stats.lagged.Add(uint64(len(ready) - room))
		ready = ready[:room]
	}
	e.told = append(e.told, ready...)
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

func (e *Events) tellLoop(ctx context.Context) {
	for {
		e.mu.Lock()
		told, subs := e.told, e.subs
		e.told = nil
		e.mu.Unlock()
		for _, w := range told {
			for _, s := range subs {
				if under(w.GetChannel(), s.above) {
					s.f(fromWire(w))
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-e.wake:
		}
	}
}

// Status returns what Events did and holds.
func (e *Events) Status() Status {
	s := &e.stats
	st := Status{
		Published: s.published.Load(), Overflow: s.overflow.Load(), StoreFailed: s.storeFailed.Load(),
		Received: s.received.Load(), Duplicates: s.duplicates.Load(), Invalid: s.invalid.Load(),
		GivenUp: s.givenUp.Load(), Lagged: s.lagged.Load(), PushFailed: s.pushFailed.Load(), PushDropped: s.pushDropped.Load(),
		Synced: s.synced.Load(), SyncFailed: s.syncFailed.Load(),
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	st.Kept, st.Origins, st.Channels = len(e.ring.order), len(e.ring.origins), len(e.ring.last)
	return st
}
