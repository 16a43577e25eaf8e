package members

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/unison"
)

// The protocols of this package.
const (
	WatchProtocol protocol.ID = "/coppice/watch/1"
	ViewProtocol  protocol.ID = "/coppice/view/1"
)

// Config is what a node gives to its view. Self.ID, Self.Boot, Peers and Links are required.
type Config struct {
	Self    Info    // Boot random per process start; StartedUnixMs is now if 0
	Profile Profile // LAN if zero
	Peers   peers.Peers
	Links   peers.Links
	// BootTime is CLOCK_BOOTTIME: it goes on while the machine is suspended. Nil: the process's monotonic clock, which does not.
	BootTime func() time.Duration
	Rand     *rand.Rand   // nil: seeded by the runtime
	Log      *slog.Logger // nil: slog.Default()
	Book     Book         // keeps the known members over a restart; nil: nothing is kept
	// Learned is told the addresses of a node whenever they come or change, for the host's address book. It must not block or call back.
	Learned func(id peer.ID, addrs []string)
	// Suspended is told that this process stood still for d (SIGSTOP, suspend, starvation): longer than others wait before they
	// call it dead. It runs before any watching goes on; it must not block.
	Suspended func(d time.Duration)
	// Connection says how a peer is connected (direct, relayed; "" not at all). Nil: "direct" while Links told of a connection.
	Connection func(id peer.ID) string
	// FlapDeaths is how many deaths within two minutes a node may die before it is quarantined; 0: 3; negative: any number.
	FlapDeaths int
}

// Members is a node's view. All methods are safe for concurrent use; none but Run and Goodbye waits for the network.
type Members struct {
	cfg      Config
	id       peer.ID
	log      *slog.Logger
	boot     func() time.Duration
	caller   *peers.Caller
	ctx      context.Context // ends with Run
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	slots    chan struct{} // one per running inquiry
	late     lateness
	changes  changes
	snap     atomic.Pointer[snapshot] // nil: to be built anew
	admitted sync.Map                 // of those whom IsMember knows: read by every handler of the node

	sent, failedSends, deaths, rejected, saveErrors, badMessages, rivals atomic.Uint64

	mu        sync.Mutex // guards the rest
	rng       *rand.Rand
	self      *entry
	entries   map[peer.ID]*entry // of everybody heard of, self included
	order     []*entry           // the same, as they came
	unknown   int                // entries without an admission
	partners  []*entry           // whom news goes to, where there are too many for all
	dirty     map[peer.ID]bool   // to be passed on
	urgent    bool               // some of dirty is
	flushed   time.Time          // when news was passed on last
	outbox    map[peer.ID]*box
	watched   map[peer.ID]*watched // whom this node watches
	watchers  map[peer.ID]*watcher // who watches this node: streams
	contacts  int                  // redials under way
	suspends  int                  // times this process stood still
	refresh   bool                 // watchers and watched are to be chosen anew
	look      []*entry             // whether to watch these is to be found out
	lookAll   time.Time            // the same of all, not later than then; zero: no need
	uneven    bool                 // watchers are not the closest, for the sake of zones
	unsaved   bool
	saving    bool
	leaving   bool
	stopped   bool
	lastHeal  time.Time
	outranked time.Time // last refutation of another life of this node
	ends      []int64   // of this node's own lives within flapWindow, as its book has them
	flapping  time.Time // the others hold this node quarantined until then, as far as it can tell
	nextMeet  time.Time // exchange
	nextSave  time.Time
	nextLook  time.Time // at redials and the like
	nextDue   time.Time // no redial is due before
	nextFree  time.Time // no quarantine ends before; zero: there is none
	lastSaved []byte    // of the one save that runs
}

// New returns the view of a node that knows itself and whom its book names. It registers its protocols; Run makes it work.
func New(cfg Config) (*Members, error) {
	if cfg.Profile.Name == "" {
		cfg.Profile = LAN
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.BootTime == nil {
		start := time.Now()
		cfg.BootTime = func() time.Duration { return time.Since(start) }
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	if cfg.FlapDeaths == 0 {
		cfg.FlapDeaths = flapDeaths
	}
	m := &Members{
		cfg: cfg, id: cfg.Self.ID, log: cfg.Log, boot: cfg.BootTime, rng: cfg.Rand, caller: peers.NewCaller(cfg.Peers),
		slots: make(chan struct{}, maxInquiries), entries: map[peer.ID]*entry{}, dirty: map[peer.ID]bool{},
		outbox: map[peer.ID]*box{}, watched: map[peer.ID]*watched{}, watchers: map[peer.ID]*watcher{},
	}
	m.changes.init()
	m.ctx, m.cancel = context.WithCancel(context.Background())
	info := sane(cfg.Self.clone())
	info.Counter = max(1, info.Counter)
	if info.StartedUnixMs == 0 {
		info.StartedUnixMs = time.Now().UnixMilli()
	}
	m.self = &entry{id: m.id, point: keys.OfPeer(m.id), info: &info, admitted: true, since: time.Now(), evidence: "this node"}
	m.entries[m.id] = m.self
	m.order = append(m.order, m.self)
	m.load()
	m.admitted.Store(m.id, true)
	m.touch(m.self, "admitted")
	peers.ServeCalls(cfg.Peers, ViewProtocol, func() *wirev1.ViewRequest { return &wirev1.ViewRequest{} }, m.answer)
	cfg.Peers.Handle(WatchProtocol, m.watch)
	cfg.Links.Notify(m.linkChanged)
	return m, nil
}

func (c Config) check() error {
	var errs []error
	if c.Self.ID == "" || len(c.Self.ID) > maxID {
		errs = append(errs, errors.New("members: Self.ID is missing or too long"))
	}
	if c.Self.Boot == 0 {
		errs = append(errs, errors.New("members: Self.Boot is 0: give each process start a random number"))
	}
	if c.Peers == nil || c.Links == nil {
		errs = append(errs, errors.New("members: Peers and Links are required"))
	}
	p := c.Profile
	if p.Heartbeat <= 0 || p.Silence <= p.Heartbeat || p.Watchers <= 0 || p.Probe <= 0 || p.Ask <= p.Probe || p.Exchange <= 0 {
		errs = append(errs, fmt.Errorf("members: profile %+v: needs 0 < Heartbeat < Silence, Watchers > 0, 0 < Probe < Ask, Exchange > 0", p))
	}
	return errors.Join(errs...)
}

// Run keeps the view until ctx ends. It returns nil then, after all its goroutines have ended and the book is saved.
func (m *Members) Run(ctx context.Context) error {
	defer m.stop()
	m.changes.start()
	m.mu.Lock()
	m.refresh = true
	m.announce(m.id)
	for _, e := range m.entries {
		if e != m.self && e.admitted && !e.expelled {
			m.dialAt(e, time.Time{}) // now
		}
	}
	m.mu.Unlock()
	ticker := unison.New(tickEvery, string(m.id))
	defer ticker.Stop()
	last := m.boot()
	for {
		m.tick(m.boot() - last - tickEvery)
		last = m.boot()
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			ticker.Next()
		}
	}
}

// tick is one round of the loop; late is by how much it came too late.
func (m *Members) tick(late time.Duration) {
	now := time.Now()
	m.late.note(now, late)
	if late >= m.cfg.Profile.Silence {
		m.stoodStill(late)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refresh {
		m.refresh = false
		m.chooseWatchers()
	}
	m.chooseWatched(now)
	m.checkSilence()
	m.passOn(now)
	if !now.Before(m.nextMeet) {
		if !m.nextMeet.IsZero() {
			m.meetSomebody()
		}
		m.nextMeet = now.Add(m.cfg.Profile.Exchange*3/4 + m.jitter(m.cfg.Profile.Exchange/2))
	}
	if !now.Before(m.nextLook) {
		m.nextLook = now.Add(4 * tickEvery)
		m.redial(now)
		m.snap.Store(nil) // round trips have changed
		m.endQuarantines(now)
	}
	if m.unsaved && m.cfg.Book != nil && !m.saving && !now.Before(m.nextSave) {
		m.nextSave = now.Add(saveEvery)
		m.saving = m.spawn(m.save)
	}
}

// stop ends what New and Run started.
func (m *Members) stop() {
	m.mu.Lock()
	m.stopped = true
	m.cancel()
	m.mu.Unlock()
	m.wg.Wait()
	m.caller.Close()
	m.changes.stop()
	m.mu.Lock()
	for _, w := range m.watched {
		if w.stream != nil {
			_ = w.stream.Reset() // its handler goroutine ends
		}
	}
	m.mu.Unlock()
	m.save()
}

// spawn runs f until Run ends. Locked.
func (m *Members) spawn(f func()) bool {
	if m.stopped {
		return false
	}
	m.wg.Go(f)
	return true
}

// jitter returns a random duration below d. Locked.
func (m *Members) jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return time.Duration(m.rng.Int64N(int64(d)))
}

// Stats counts what the view met since the node started.
type Stats struct {
	Pushes, FailedPushes uint64 // messages of news
	Deaths               uint64 // confirmed by this node itself
	Rejected             uint64 // reports of deaths that it did not take over as they were
	BadMessages          uint64 // dropped: not understood, too large, from no member
	BookErrors           uint64 // failures to load or save the book
	Rivals               uint64 // times that a newer life of this very node was heard of; more than a few: a copied identity
}

// Stats returns the counters.
func (m *Members) Stats() Stats {
	return Stats{
		Pushes: m.sent.Load(), FailedPushes: m.failedSends.Load(), Deaths: m.deaths.Load(), Rejected: m.rejected.Load(),
		BadMessages: m.badMessages.Load(), BookErrors: m.saveErrors.Load(), Rivals: m.rivals.Load(),
	}
}
