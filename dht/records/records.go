package records

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	ds "github.com/ipfs/go-datastore"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// Protocol is the protocol of this package.
const Protocol protocol.ID = "/coppice/record/1"

// Config is what Records needs. Self, Key, Store, Peers, Caller and View are required.
type Config struct {
	Self peer.ID
	Key  crypto.PrivKey
	// Store is kad-dht's datastore, best one whose writes are not synced: Sync is called where something is promised. Nobody else may
	// write to it; give kad-dht what Datastore returns.
	Store  ds.Batching
	Peers  peers.Peers
	Caller *peers.Caller
	View   View
	// Route finds the n members closest to a key that may hold, closest first, this node included, by asking others; hops is how many
	// requests one after the other led to the first. It is needed where the view is capped and is asked only about keys of which
	// that is not sure; it may block until ctx ends.
	Route func(ctx context.Context, key string, n int) (ids []peer.ID, hops int, err error)
	// Everyone returns all members that a scan is to ask, where the view knows fewer. nil: those in the view.
	Everyone func() []peer.ID
	// Member reports whether a peer may write records. nil: all may.
	Member func(peer.ID) bool
	// Incarnation is the arbiter's, for the versions of this node's own keys. nil: 0.
	Incarnation func() uint64
	// Low: the disk is low; keys that are not here yet are refused.
	Low  func() bool
	Rand *rand.Rand
	Log  *slog.Logger

	// AttemptTimeout bounds one question to one member; 300 ms where 0.
	AttemptTimeout time.Duration
	// SyncEvery is the time between two rounds of anti-entropy; 30 s where 0.
	SyncEvery time.Duration
	// TombstoneFor is how long a deletion made here is remembered; the constant of that name where 0.
	TombstoneFor time.Duration
	// MaxKeys bounds the keys held here; 200,000 where 0.
	MaxKeys int
}

func (c *Config) fill() error {
	if c.Key == nil || c.Store == nil || c.Peers == nil || c.Caller == nil || c.View == nil {
		return errors.New("records: a key, a datastore, peers, a caller and a view are needed")
	}
	id, err := peer.IDFromPrivateKey(c.Key)
	if err != nil {
		return fmt.Errorf("records: %w", err)
	}
	if id != c.Self {
		return fmt.Errorf("records: the key is that of %s, not of this node %s", id, c.Self)
	}
	if c.Incarnation == nil {
		c.Incarnation = func() uint64 { return 0 }
	}
	if c.Everyone == nil {
		c.Everyone = c.View.Alive
	}
	if c.Low == nil {
		c.Low = func() bool { return false }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Rand == nil {
		c.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	if c.AttemptTimeout == 0 {
		c.AttemptTimeout = 300 * time.Millisecond
	}
	if c.SyncEvery == 0 {
		c.SyncEvery = 30 * time.Second
	}
	if c.TombstoneFor == 0 {
		c.TombstoneFor = TombstoneFor
	}
	if c.MaxKeys == 0 {
		c.MaxKeys = 200_000
	}
	return nil
}

// Records is this node's part of the replicated records. Its methods may be called from any goroutine.
type Records struct {
	cfg        Config
	validator  *Validator
	local      *local
	subs       *subscribers
	changed    chan struct{} // the view
	generation atomic.Uint64
	changedAt  atomic.Int64 // when the view changed last; Unix nanoseconds
	cancel     func()
	stats      stats

	background sync.WaitGroup
	closing    sync.Mutex // guards closed and adding to background after it
	closed     bool

	randMu sync.Mutex // guards cfg.Rand
}

// Open reads the index of what is stored and registers the protocol. Run must be running for expiry, repair and subscribers.
func Open(cfg Config) (*Records, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	r := &Records{cfg: cfg, validator: NewValidator(cfg.Member), subs: newSubscribers(), changed: make(chan struct{}, 1)}
	r.changedAt.Store(time.Now().UnixNano())
	l, err := openLocal(cfg.Store)
	if err != nil {
		return nil, err
	}
	l.corrupt = func(key string, err error) {
		r.stats.missed.Add(1)
		cfg.Log.Error("records: a record on the disk is broken; another holder's copy replaces it", "key", key, "err", err)
	}
	r.local = l
	r.cancel = cfg.View.OnChange(func() {
		r.generation.Add(1)
		r.changedAt.Store(time.Now().UnixNano())
		select {
		case r.changed <- struct{}{}:
		default:
		}
	})
	peers.ServeCalls(cfg.Peers, Protocol, func() *wirev1.RecordAsk { return &wirev1.RecordAsk{} }, r.serve)
	return r, nil
}

// Validator returns the validator that this node uses, for its kad-dht.
func (r *Records) Validator() *Validator { return r.validator }

// Run does the background work until ctx ends, and returns its error.
func (r *Records) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { r.subs.run(ctx) })
	wg.Go(func() { r.keeper(ctx) })
	wg.Wait()
	return ctx.Err()
}

// Close waits for what calls have left in the background, at most a few attempts' time. The datastore must stay open until then.
func (r *Records) Close() error {
	r.cancel()
	r.closing.Lock()
	r.closed = true
	r.closing.Unlock()
	r.background.Wait()
	return nil
}

// start runs f in the background, unless Records is closed.
func (r *Records) start(f func()) bool {
	r.closing.Lock()
	defer r.closing.Unlock()
	if r.closed {
		return false
	}
	r.background.Go(f)
	return true
}

// ask asks one member, within AttemptTimeout.
func (r *Records) ask(ctx context.Context, to peer.ID, ask *wirev1.RecordAsk) (*wirev1.RecordAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.AttemptTimeout)
	defer cancel()
	r.stats.asked.Add(1)
	if to == r.cfg.Self {
		return r.serve(ctx, to, ask)
	}
	a := &wirev1.RecordAnswer{}
	if err := r.cfg.Caller.Call(ctx, to, Protocol, ask, a); err != nil {
		r.stats.failed.Add(1)
		return nil, err
	}
	return a, nil
}

// Replicas returns how many members hold each record now.
func (r *Records) Replicas() int {
	replicas, _ := r.replication()
	return min(replicas, len(r.cfg.View.Alive()))
}

// replication returns how many members hold a record and how many acknowledgements a write wants, now. A view that is capped knows more
// members than that, so it need not know how many there are.
func (r *Records) replication() (replicas, want int) {
	alive := len(r.cfg.View.Alive())
	replicas = 5
	if alive < 5 {
		replicas = 3
	}
	return replicas, min(replicas, max(alive, 1))/2 + 1
}

func (r *Records) shuffle(ids []peer.ID) {
	r.randMu.Lock()
	defer r.randMu.Unlock()
	r.cfg.Rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
}

type stats struct {
	asked, failed, invalid, older, full, repaired, synced, dropped, expired, missed, lookups, lost, hops atomic.Uint64
}

// Status is what Records holds and did since the start.
type Status struct {
	Keys, Tombstones int
	// Asked questions of members, those that Failed (no answer in time).
	Asked, Failed uint64
	// Refused records: Invalid, Older than what is here, and for lack of room (Full).
	Invalid, Older, Full uint64
	// Repaired: records sent to members that lacked them. Synced: rounds of anti-entropy. Dropped: records handed over to closer members.
	Repaired, Synced, Dropped, Expired uint64
	// ReadFailures: records on this node's disk that could not be read. Other holders' copies replace them.
	ReadFailures uint64
	// Lookups of members closest to a key, which a whole view never needs; those that were Lost (failed), and the Hops of the others, summed.
	Lookups, Lost, Hops uint64
}

// Status returns what Records holds and did.
func (r *Records) Status() Status {
	keys, dead := r.local.count()
	s := &r.stats
	return Status{
		Keys: keys, Tombstones: dead, Asked: s.asked.Load(), Failed: s.failed.Load(), Invalid: s.invalid.Load(), Older: s.older.Load(),
		Full: s.full.Load(), Repaired: s.repaired.Load(), Synced: s.synced.Load(), Dropped: s.dropped.Load(), Expired: s.expired.Load(),
		ReadFailures: s.missed.Load(), Lookups: s.lookups.Load(), Lost: s.lost.Load(), Hops: s.hops.Load(),
	}
}
