package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
)

// Config is what a store needs. DB and Peers are required.
type Config struct {
	Self  peer.ID
	DB    *pebble.DB
	Peers peers.Peers
	// Prefix leads all keys of the store in DB; "blob/" where empty.
	Prefix string
	// Low reports that the disk is low: the store then refuses to keep nodes for others. nil: never.
	Low func() bool
	// Alive reports whether a push to the peer is worth another attempt. nil: always.
	Alive func(peer.ID) bool
	// Holders are members that may be asked for a node found corrupt here. nil: none.
	Holders func() []peer.ID
	// Failed is told once when an fsync of what was applied has failed: the kernel may have dropped the pages, and a later fsync that succeeds
	// says nothing of them. From then on nothing is acknowledged here; the node should end. It must not block. nil: nobody is told.
	Failed func(error)
	// Corrupt is told each node that is found to be wrong here, or lost: it is removed, and being fetched again. It must not block. nil: nobody is told.
	Corrupt func(*CorruptError)
	// Rand says where scrubbing begins. nil: at the beginning.
	Rand func() uint64
	Log  *slog.Logger

	// Stall is how long a peer may be silent while an answer is due before its stream is given up: for small pushes as it is, for
	// bulk and fetches five times that. 1.5 s where 0.
	Stall time.Duration
	// DialTimeout bounds the opening of a stream. 1 s where 0.
	DialTimeout time.Duration
	// PinFor is how long have-answers, puts and acknowledgements pin, how young a node is never collected, and how long after a
	// start nothing is. 10 min where 0.
	PinFor time.Duration
	// SweepEvery is the time between two collections at least; a long one waits fifty times its duration. 2 min where 0.
	SweepEvery time.Duration
	// ScrubEvery is the time in which everything that is kept is read once and checked; more where that would take more than a hundredth of a core. A day where 0,
	// never where negative.
	ScrubEvery time.Duration
	// MaxInflight bounds the pushes under way to one peer, those in the background included. 4096 where 0.
	MaxInflight int
}

func (c *Config) fill() error {
	if c.DB == nil || c.Peers == nil {
		return errors.New("blobs: a store needs a database and peers")
	}
	if c.Prefix == "" {
		c.Prefix = "blob/"
	}
	if c.Low == nil {
		c.Low = func() bool { return false }
	}
	if c.Alive == nil {
		c.Alive = func(peer.ID) bool { return true }
	}
	if c.Holders == nil {
		c.Holders = func() []peer.ID { return nil }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Corrupt == nil {
		c.Corrupt = func(*CorruptError) {}
	}
	if c.Rand == nil {
		c.Rand = func() uint64 { return 0 }
	}
	setDefault(&c.ScrubEvery, 24*time.Hour)
	setDefault(&c.Stall, 1500*time.Millisecond)
	setDefault(&c.DialTimeout, time.Second)
	setDefault(&c.PinFor, 10*time.Minute)
	setDefault(&c.SweepEvery, 2*time.Minute)
	setDefault(&c.MaxInflight, 4096)
	return nil
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Store is the node's blob store. Its methods may be called from any goroutine.
type Store struct {
	cfg     Config
	db      *pebble.DB
	opened  time.Time
	known   *knowledge
	pool    *pool
	pins    *pins
	stats   stats
	wal     wal
	repairs chan Hash

	// sweeping: readers check that nodes are there and rely on it (and say so with pins.touch) in one piece; the collector holds
	// it to remove nodes, after it has looked at what was touched.
	sweeping sync.RWMutex

	live    atomic.Pointer[func() []Hash]
	onAcked atomic.Pointer[func(Hash, peer.ID)]
	work    *work
}

// Open makes a store over the database and registers its protocol with the peers. Run must be running for collection and repair.
func Open(cfg Config) (*Store, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	s := &Store{
		cfg: cfg, db: cfg.DB, opened: time.Now(),
		known: newKnowledge(), pins: newPins(cfg.PinFor), repairs: make(chan Hash, 1024), work: newWork(),
	}
	s.pool = newPool(s)
	cfg.Peers.Handle(Protocol, s.serve)
	return s, nil
}

// Close ends all streams and background pushes and waits for them. It does not close the database, which must outlive it.
func (s *Store) Close() error {
	s.work.stop()
	s.pool.closeAll()
	s.work.wait()
	return nil
}

// SetLive sets where the collector learns the roots to keep, with everything below them. Without it, and whenever f returns nil (the
// roots are not known yet), nothing is collected; an empty list that is not nil says that nothing is live.
func (s *Store) SetLive(f func() []Hash) { s.live.Store(&f) }

// SetOnAcked sets who hears of acknowledgements that came after their Push had returned. f must not block.
func (s *Store) SetOnAcked(f func(root Hash, from peer.ID)) { s.onAcked.Store(&f) }

// Put keeps a node and returns after the fsync, which concurrent calls share. The node is pinned for PinFor; a pin of a node it links
// to is no longer needed and goes. Links may lead to nodes that are not here.
func (s *Store) Put(n Node) (Link, error) {
	if !s.work.enter() {
		return Link{}, ErrClosed
	}
	defer s.work.leave()
	l, synced, err := s.put(&n)
	if err != nil {
		return Link{}, err
	}
	if err := synced(); err != nil {
		return Link{}, fmt.Errorf("keep node %s: %w", l.Hash.Short(), err)
	}
	return l, nil
}

// put stages and applies one node; the second result waits for the fsync.
func (s *Store) put(n *Node) (Link, func() error, error) {
	if err := n.check(); err != nil {
		return Link{}, nil, err
	}
	enc := n.encode()
	s.sweeping.RLock()
	st := s.newStager(true)
	h, _, err := st.addNode(n, enc)
	var synced func() error
	if err == nil {
		synced, err = st.apply()
	}
	s.sweeping.RUnlock()
	if err != nil {
		st.drop()
		return Link{}, nil, fmt.Errorf("keep node: %w", err)
	}
	return n.link(h, len(enc)), synced, nil
}

// Has reports whether the node itself is here.
func (s *Store) Has(h Hash) (bool, error) {
	if !s.work.enter() {
		return false, ErrClosed
	}
	defer s.work.leave()
	return s.has(h)
}

// Get returns a node after verifying it. It returns *MissingError, or *CorruptError after it has removed the node and asked for its
// repair.
func (s *Store) Get(h Hash) (Node, error) {
	if !s.work.enter() {
		return Node{}, ErrClosed
	}
	defer s.work.leave()
	n, _, err := s.get(h)
	return n, err
}

// get returns a node and its encoding.
func (s *Store) get(h Hash) (Node, []byte, error) {
	enc, err := s.read(h)
	if err == nil {
		if hashOf(enc) == h {
			var n Node
			if n, err = decodeNode(enc); err == nil {
				return n, enc, nil
			}
		} else {
			err = errors.New("the bytes have another hash")
		}
	} else if errors.Is(err, pebble.ErrNotFound) {
		return Node{}, nil, &MissingError{Hash: h}
	} else if !errors.Is(err, errUnreadable) && !pebble.IsCorruptionError(err) {
		return Node{}, nil, fmt.Errorf("read node %s: %w", h.Short(), err)
	}
	corrupt := &CorruptError{Hash: h, Why: err.Error()}
	if err := s.found(corrupt); err != nil {
		return Node{}, nil, err
	}
	return Node{}, nil, corrupt
}

// found deals with a node that is not what it should be: it goes, and is fetched again.
func (s *Store) found(corrupt *CorruptError) error {
	if err := s.discard(corrupt.Hash); err != nil {
		return fmt.Errorf("%w; removing it failed: %w", corrupt, err)
	}
	s.stats.corrupt.Add(1)
	s.cfg.Log.Warn("corrupt node", "node", corrupt.Hash.String(), "why", corrupt.Why)
	s.cfg.Corrupt(corrupt)
	select {
	case s.repairs <- corrupt.Hash:
	default:
		s.stats.repairsDropped.Add(1)
	}
	return nil
}

// Run collects, repairs and scrubs until ctx ends. It always returns ctx's error.
func (s *Store) Run(ctx context.Context) error {
	if !s.work.enter() {
		return ErrClosed
	}
	defer s.work.leave()
	ctx, cancel := s.work.join(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { s.sweepLoop(ctx) })
	wg.Go(func() { s.repairLoop(ctx) })
	wg.Go(func() { s.scrubLoop(ctx) })
	wg.Wait()
	return ctx.Err()
}

// work counts what uses the database, so that Close can end and await it.
type work struct {
	mu      sync.Mutex // guards closed and the adding to wg after it
	closed  bool
	wg      sync.WaitGroup
	derive  func() (context.Context, context.CancelFunc)
	end     context.CancelFunc
	streams map[io.Closer]func() error
}

func newWork() *work {
	base, end := context.WithCancel(context.Background())
	return &work{
		end: end, streams: map[io.Closer]func() error{},
		derive: func() (context.Context, context.CancelFunc) { return context.WithCancel(base) },
	}
}

// enter counts one more user; false after stop.
func (w *work) enter() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.wg.Add(1)
	return true
}

func (w *work) leave() { w.wg.Done() }

// track resets the stream when the store closes; false: it is closed already.
func (w *work) track(s peers.Stream) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.streams[s] = s.Reset
	return true
}

func (w *work) untrack(s peers.Stream) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.streams, s)
}

// stop refuses new users, ends their contexts and resets the streams that peers opened.
func (w *work) stop() {
	w.mu.Lock()
	w.closed = true
	resets := make([]func() error, 0, len(w.streams))
	for _, reset := range w.streams {
		resets = append(resets, reset)
	}
	w.mu.Unlock()
	w.end()
	for _, reset := range resets {
		// A reset that fails leaves a stream that is dead already.
		_ = reset()
	}
}

func (w *work) wait() { w.wg.Wait() }

// join returns a context that ends with ctx or with the store.
func (w *work) join(ctx context.Context) (context.Context, context.CancelFunc) {
	joined, cancel := w.derive()
	stop := context.AfterFunc(ctx, cancel)
	return joined, func() { stop(); cancel() }
}
