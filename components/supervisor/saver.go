package supervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	// retryLeast and retryMost bound the pause before a save that failed is tried again.
	retryLeast = 50 * time.Millisecond
	retryMost  = 2 * time.Second
	// copiesEvery is how often the copies of the committed checkpoint are counted. A checkpoint younger than that is left to its commit.
	copiesEvery = time.Second
	// turnWithin is how long a follower may go by the last checkpoint before a base: its pages are about to be collected, after blobs.Config.PinFor.
	turnWithin = time.Minute
)

// Saved is the last acknowledged checkpoint of an instance.
type Saved struct {
	Seq     uint64
	Root    blobs.Hash
	Mark    uint64
	Bytes   uint64 // of the state and the deltas that a restore reads
	Holders []peer.ID
	At      time.Time
}

// ledger is what a saver needs of the arbiter.
type ledger interface {
	Commit(ctx context.Context, r arbiter.CommitRequest) (arbiter.Register, error)
	SetHolders(ctx context.Context, key string, seq uint64, holders []peer.ID) (arbiter.Register, error)
	Read(ctx context.Context, key string) (arbiter.Register, bool, error)
}

// saverConfig is fixed for one generation of one epoch: one process, one owner.
type saverConfig struct {
	self        peer.ID
	key         string // register
	instance    string
	digest      string
	version     string
	schema      uint32
	incarnation uint64
	epoch       uint64
	nonce       uint64
	mode        componentsv1.Durability
	interval    time.Duration
	incremental bool
	component   componentv1.ComponentClient
	store       *blobs.Store
	ledger      ledger
	// holders names who should keep the checkpoint, best first and this node included, and how many must acknowledge it.
	holders func() (to []peer.ID, w int)
	// wanted is how many the manifest says should keep it, whether there are so many nodes or not; 0, or nil: it does not say.
	wanted func() int
	// alive says whether a holder still counts.
	alive func(peer.ID) bool
	// named says who is named as a holder of a checkpoint, as far as this node knows; nil: nobody knows more than the saver.
	named func(seq uint64) (holders []peer.ID, known bool)
	// apart says whether nodes are in more than one zone, as far as that matters; nil: it does not.
	apart func([]peer.ID) bool
	// committed is told every mark whose effects cannot be lost any more.
	committed func(mark uint64)
	// answered counts what was answered without a mark; counted is told what that was when a checkpoint was begun that is acknowledged now. nil: nobody counts.
	answered func() uint64
	counted  func(n uint64)
	// cut says that the arbiter is out of reach and that checkpoints go on without it; nil: they wait for it. branched makes such a one durable.
	cut      func() bool
	branched func(head *chainHead, before Saved) error
	local    bool // it goes on from a branch
	// faulty is told when the component begins to give what is no state, or nothing at all; nil: nobody is.
	faulty func(why error)
	// history looks after the earlier checkpoints until its context ends; nil: nobody does.
	history func(ctx context.Context, s *saver)
	log     *slog.Logger
}

var (
	// errFenced ends a saver whose epoch is over: another owner, or this one in a newer epoch, has claimed the instance.
	errFenced = errors.New("fenced: the instance has a newer epoch")
	// errForeign ends a saver that finds a checkpoint of its own epoch that it has not written: its process has another state than the log.
	errForeign = errors.New("the register has a checkpoint that this process did not write")
	// errSaverEnded is what those get who ask an ended saver.
	errSaverEnded = errors.New("its process is not saved any more")
)

// saver makes the state of one running process durable, by its durability: every call, every few seconds, or when asked.
// One goroutine (run) commits, one at a time; while a commit is under way newer effects gather for the next (group commit). Beside it
// work: the reader of the journal (each-call), a compaction now and then, and the keeper of the copies.
type saver struct {
	cfg saverConfig

	mu      sync.Mutex // guards the fields below
	saved   Saved
	head    *chainHead
	pending []entry // journal entries not yet committed, in order
	// gap: the journal does not reach back to what is committed, so the state itself has to be asked.
	gap bool
	// compaction is the one under way; nil none. Whoever commits past it otherwise than by its entries abandons it.
	compaction *compaction
	compactAt  time.Time // not before, after one that failed
	compactOff time.Duration
	// doubt is the commit under way: until it is certain how it ended, no other root may be proposed under its number.
	doubt *proposal
	// local: the arbiter was out of reach once, so everything since is a branch. It stays one until this saver is replaced.
	local bool
	// acked are those who keep the committed root, ackedNext those who keep the one that is being committed.
	acked, ackedNext map[peer.ID]bool
	saveErr, copyErr error
	// stateFault and journalFault are what the component did wrong last with its state and its journal: garbage, or standing still. nil: it has done it right
	// since.
	stateFault, journalFault error

	// turn is the last checkpoint before the present base: who follows goes by it, for from there on it needs nothing of the base.
	turn Saved
	// news is closed, and made anew, when another checkpoint has been acknowledged.
	news chan struct{}

	wake    chan struct{}
	flushes chan flushRequest
	done    chan struct{}  // closed when run has ended and nothing of it goes on
	end     error          // how it ended; valid once done is closed
	beside  sync.WaitGroup // what works beside run
}

// entry is a piece of journal: all that happened up to a mark.
type entry struct {
	mark   uint64
	frames []byte
}

type flushRequest struct {
	full bool
	done chan error
}

// newSaver continues from what is committed: head and saved are nil and zero for an instance without a checkpoint. have are those who
// are known to keep saved.Root.
func newSaver(cfg saverConfig, head *chainHead, saved Saved, have []peer.ID) *saver {
	s := &saver{
		cfg: cfg, head: head, saved: saved, local: cfg.local, acked: map[peer.ID]bool{}, ackedNext: map[peer.ID]bool{},
		news: make(chan struct{}), wake: make(chan struct{}, 1), flushes: make(chan flushRequest), done: make(chan struct{}),
	}
	for _, id := range have {
		s.acked[id] = true
	}
	return s
}

// Saved returns the last acknowledged checkpoint, and what is wrong with saving now.
func (s *saver) Saved() (Saved, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.saved, cmp.Or(s.saveErr, s.stateFault, s.journalFault)
}

// copies says how many of the living nodes keep the last checkpoint, and how many should; ok false: that is not settled yet, or there is none.
func (s *saver) copies() (have, want int, ok bool) {
	s.mu.Lock()
	young, none := time.Since(s.saved.At) < copiesEvery, s.saved.Seq == 0 || s.local
	s.mu.Unlock()
	if none || young || s.cfg.mode == componentsv1.Durability_DURABILITY_NONE {
		return 0, 0, false
	}
	to, _ := s.cfg.holders()
	for _, id := range s.keepers() {
		if s.cfg.alive(id) {
			have++
		}
	}
	want = len(to)
	if s.cfg.wanted != nil {
		want = max(want, s.cfg.wanted())
	}
	return have, want, true
}

// thin says that the last checkpoint is on fewer living nodes than it should be, and why; "" it is not.
func (s *saver) thin() string {
	have, want, ok := s.copies()
	if !ok || have >= want {
		return ""
	}
	why := fmt.Sprintf("its last checkpoint is on %d living nodes, %d should keep it", have, want)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.copyErr != nil {
		why += ": " + s.copyErr.Error()
	}
	return why
}

// acknowledged returns the last checkpoint that the arbiter has acknowledged, and what is closed when there is another; ok false: it goes on alone, and what it
// saves is nobody else's.
func (s *saver) acknowledged() (saved Saved, news <-chan struct{}, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.saved, s.news, !s.local
}

// turnFor is the checkpoint that a follower who has one of a number should be given before the newest; ok false: none.
func (s *saver) turnFor(seq uint64) (Saved, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.turn, seq < s.turn.Seq && time.Since(s.turn.At) < turnWithin
}

// keepers are those who are known to keep the committed root.
func (s *saver) keepers() []peer.ID {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]peer.ID, 0, len(s.acked))
	for id := range s.acked {
		out = append(out, id)
	}
	return out
}

// Flush returns when everything the component has done so far is committed. full writes a new base.
func (s *saver) Flush(ctx context.Context, full bool) error {
	req := flushRequest{full: full, done: make(chan error, 1)}
	select {
	case s.flushes <- req:
	case <-s.done:
		return fmt.Errorf("checkpoint %s: %w", s.cfg.instance, errSaverEnded)
	case <-ctx.Done():
		return fmt.Errorf("checkpoint %s: waiting for an earlier checkpoint: %w", s.cfg.instance, ctx.Err())
	}
	select {
	case err := <-req.done:
		return err
	case <-s.done:
		return fmt.Errorf("checkpoint %s: %w", s.cfg.instance, errSaverEnded)
	case <-ctx.Done():
		return fmt.Errorf("checkpoint %s: %w", s.cfg.instance, ctx.Err())
	}
}

// over says whether run has ended, and how.
func (s *saver) over() (why error, ended bool) {
	select {
	case <-s.done:
		return s.end, true
	default:
		return nil, false
	}
}

// run saves until ctx ends, the epoch is fenced (errFenced), or the log has another checkpoint than this process (errForeign).
func (s *saver) run(ctx context.Context) { s.finish(s.work(ctx)) }

func (s *saver) finish(why error) {
	s.end = why
	close(s.done)
}

func (s *saver) work(ctx context.Context) error {
	if s.cfg.mode == componentsv1.Durability_DURABILITY_NONE {
		return s.serveFlushes(ctx)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer s.beside.Wait()
	defer cancel()
	if s.cfg.mode == componentsv1.Durability_DURABILITY_EACH_CALL {
		s.beside.Go(func() { s.follow(ctx) })
	}
	s.beside.Go(func() { s.keepCopies(ctx) })
	if s.cfg.history != nil {
		s.beside.Go(func() { s.cfg.history(ctx, s) })
	}
	return s.loop(ctx)
}

// serveFlushes answers checkpoint requests of a component that is not to be saved.
func (s *saver) serveFlushes(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case req := <-s.flushes:
			req.done <- nil
		}
	}
}

func (s *saver) loop(ctx context.Context) error {
	tick := time.NewTicker(s.cfg.interval)
	defer tick.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	wait := retryLeast
	// A component that gave garbage, or nothing at all, is asked by itself only when this is over.
	var askAgain time.Time
	// owed is what failed last, tried again by itself. A state without any checkpoint owes its first.
	owed := s.first
	for {
		var err error
		op := owed
		select {
		case <-ctx.Done():
			return ctx.Err()
		case req := <-s.flushes:
			op = func(ctx context.Context) error { return s.flush(ctx, req.full) }
			err = op(ctx)
			req.done <- err
		case <-s.wake:
			if s.wantsState() && time.Now().Before(askAgain) {
				continue
			}
			op = s.commitPending
			err = op(ctx)
		case <-tick.C:
			if s.cfg.mode != componentsv1.Durability_DURABILITY_INTERVAL || time.Now().Before(askAgain) {
				continue
			}
			op = s.captureChanges
			err = op(ctx)
		case <-retry.C:
			if owed == nil {
				continue
			}
			err = op(ctx)
		}
		switch {
		case errors.Is(err, errFenced), errors.Is(err, errForeign):
			return err
		case err == nil:
			s.note(nil)
			owed, wait = nil, retryLeast
		case ctx.Err() == nil:
			s.note(err)
			s.cfg.log.Warn("checkpoint failed; it is tried again", "instance", s.cfg.instance, "epoch", s.cfg.epoch, "error", err)
			owed = op
			most := retryMost
			if atFault(err) {
				most, askAgain = maxBackoff, time.Now().Add(wait)
			}
			retry.Reset(wait)
			wait = min(2*wait, most)
		}
	}
}

func (s *saver) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.saveErr = err
}

// wantsState says whether the next commit takes a snapshot of the state: the journal alone does not do.
func (s *saver) wantsState() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gap || s.head == nil
}

// first writes the first checkpoint of a state that has none, or none in the present schema.
func (s *saver) first(ctx context.Context) error {
	s.mu.Lock()
	head := s.head
	s.mu.Unlock()
	if head != nil {
		return nil
	}
	return s.capture(ctx, true)
}

func (s *saver) captureChanges(ctx context.Context) error { return s.capture(ctx, false) }

func (s *saver) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *saver) flush(ctx context.Context, full bool) error {
	if full {
		return s.capture(ctx, true)
	}
	if err := s.commitPending(ctx); err != nil {
		return err
	}
	return s.capture(ctx, false)
}

func (s *saver) meta(mark uint64) *componentsv1.CheckpointMeta {
	return &componentsv1.CheckpointMeta{Instance: s.cfg.instance, Digest: s.cfg.digest, Version: s.cfg.version, Schema: s.cfg.schema, Mark: mark, Epoch: s.cfg.epoch, Checked: true}
}
