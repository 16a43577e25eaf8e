package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
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
	key         string // register
	instance    string
	digest      string
	version     string
	schema      uint32
	epoch       uint64
	nonce       uint64
	mode        componentsv1.Durability
	interval    time.Duration
	incremental bool
	deltas      bool
	component   componentv1.ComponentClient
	store       *blobs.Store
	ledger      ledger
	// holders names who should keep the checkpoint, best first and this node included, and how many must acknowledge it.
	holders func() (to []peer.ID, w int)
	// alive says whether a holder still counts.
	alive func(peer.ID) bool
	// committed is told every mark whose effects cannot be lost any more.
	committed func(mark uint64)
	log       *slog.Logger
}

// errFenced ends a saver whose epoch is over: another owner, or this one in a newer epoch, has claimed the instance.
var errFenced = errors.New("fenced: the instance has a newer epoch")

// saver makes the state of one running process durable, by its durability: every call, every few seconds, or when asked.
// One goroutine (run) commits, one at a time; while a commit is under way newer effects gather for the next (group commit).
type saver struct {
	cfg saverConfig

	mu      sync.Mutex // guards the fields below
	saved   Saved
	head    *chainHead
	pending []entry // journal entries not yet committed, in order
	kept    []entry // committed entries that a base under construction does not hold yet
	basing  bool
	newBase *chainHead
	acked   map[peer.ID]bool // who has acknowledged the current root
	lastErr error

	wake    chan struct{}
	flushes chan flushRequest
}

type entry struct {
	mark   uint64
	frames []byte
}

type flushRequest struct {
	full bool
	done chan error
}

// newSaver continues from what is committed: head and saved are nil and zero for an instance without a checkpoint.
func newSaver(cfg saverConfig, head *chainHead, saved Saved) *saver {
	return &saver{
		cfg: cfg, head: head, saved: saved, acked: map[peer.ID]bool{},
		wake: make(chan struct{}, 1), flushes: make(chan flushRequest),
	}
}

// Saved returns the last acknowledged checkpoint.
func (s *saver) Saved() (Saved, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.saved, s.lastErr
}

// Flush returns when everything the component has done so far is committed. full writes a new base.
func (s *saver) Flush(ctx context.Context, full bool) error {
	req := flushRequest{full: full, done: make(chan error, 1)}
	select {
	case s.flushes <- req:
	case <-ctx.Done():
		return fmt.Errorf("checkpoint %s: waiting for an earlier checkpoint: %w", s.cfg.instance, ctx.Err())
	}
	select {
	case err := <-req.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("checkpoint %s: %w", s.cfg.instance, ctx.Err())
	}
}

// run saves until ctx ends or the epoch is fenced (errFenced).
func (s *saver) run(ctx context.Context) error {
	if s.cfg.mode == componentsv1.Durability_DURABILITY_NONE {
		return s.serveFlushes(ctx)
	}
	if s.cfg.mode == componentsv1.Durability_DURABILITY_EACH_CALL {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() { s.follow(ctx) })
		defer cancel()
		return s.loop(ctx)
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
	repair := time.NewTicker(time.Second)
	defer repair.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			return ctx.Err()
		case req := <-s.flushes:
			err = s.flush(ctx, req.full)
			req.done <- err
		case <-s.wake:
			err = s.commitPending(ctx)
		case <-tick.C:
			if s.cfg.mode == componentsv1.Durability_DURABILITY_INTERVAL {
				err = s.capture(ctx, false)
			}
		case <-repair.C:
			err = s.repair(ctx)
		}
		s.mu.Lock()
		s.lastErr = err
		s.mu.Unlock()
		if errors.Is(err, errFenced) {
			return err
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.log.Warn("checkpoint failed; it is tried again", "instance", s.cfg.instance, "epoch", s.cfg.epoch, "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
				s.poke()
			}
		}
	}
}

func (s *saver) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// follow reads the component's journal as it is written.
func (s *saver) follow(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.followOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		s.cfg.log.Debug("journal stream ended; it is opened again", "instance", s.cfg.instance, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *saver) followOnce(ctx context.Context) error {
	s.mu.Lock()
	since := s.saved.Mark
	if n := len(s.pending); n > 0 {
		since = s.pending[n-1].mark
	}
	s.mu.Unlock()
	stream, err := s.cfg.component.Deltas(ctx, &componentv1.CheckpointFrom{SinceMark: since, Schema: s.cfg.schema})
	if err != nil {
		return fmt.Errorf("follow the journal: %w", err)
	}
	var buf frameBuffer
	for {
		f, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("follow the journal: %w", err)
		}
		if err := buf.add(f); err != nil {
			return err
		}
		if !f.GetLast() {
			continue
		}
		s.append(entry{mark: buf.mark, frames: buf.buf.Bytes()})
		buf = frameBuffer{}
	}
}

func (s *saver) append(e entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.saved.Mark
	if n := len(s.pending); n > 0 {
		last = s.pending[n-1].mark
	}
	if e.mark <= last {
		return
	}
	s.pending = append(s.pending, e)
	s.poke()
}

// commitPending commits every entry that is there.
func (s *saver) commitPending(ctx context.Context) error {
	s.mu.Lock()
	head, base := s.head, s.newBase
	pending := s.pending
	var entries []entry
	if base != nil {
		for _, e := range s.kept {
			if e.mark > base.meta.GetMark() {
				entries = append(entries, e)
			}
		}
		head = base
	}
	for _, e := range pending {
		if base == nil || e.mark > base.meta.GetMark() {
			entries = append(entries, e)
		}
	}
	saved := s.saved
	s.mu.Unlock()
	if len(pending) == 0 && base == nil {
		return nil
	}
	if head == nil {
		return s.capture(ctx, true)
	}
	next := head
	if len(entries) > 0 {
		var buf bytes.Buffer
		mark := saved.Mark
		for _, e := range entries {
			buf.Write(e.frames)
			mark = e.mark
		}
		var err error
		if next, err = writeDelta(ctx, s.cfg.store, head, s.meta(mark), buf.Bytes()); err != nil {
			return err
		}
	}
	if next.meta.GetMark() < saved.Mark {
		return fmt.Errorf("checkpoint of %s would go back from mark %d to %d", s.cfg.instance, saved.Mark, next.meta.GetMark())
	}
	if err := s.commit(ctx, next); err != nil {
		return err
	}
	s.mu.Lock()
	s.pending = s.pending[len(pending):]
	switch {
	case base != nil:
		s.kept, s.newBase, s.basing = nil, nil, false
	case s.basing:
		s.kept = append(s.kept, pending...)
	}
	compact := !s.basing && s.head.needsBase()
	if compact {
		s.basing = true
	}
	s.mu.Unlock()
	if compact {
		go s.compact(ctx)
	}
	return nil
}

func (s *saver) meta(mark uint64) *componentsv1.CheckpointMeta {
	return &componentsv1.CheckpointMeta{Instance: s.cfg.instance, Digest: s.cfg.digest, Version: s.cfg.version, Schema: s.cfg.schema, Mark: mark}
}

// compact writes a new base while calls go on, has it copied to the holders, and hands it to the committing goroutine.
func (s *saver) compact(ctx context.Context) {
	head, err := s.base(ctx)
	if err == nil {
		to, w := s.cfg.holders()
		_, err = s.cfg.store.Push(ctx, head.link.Hash, to, w)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.basing, s.kept = false, nil
		if ctx.Err() == nil {
			s.cfg.log.Warn("compaction failed; it is tried again after the next checkpoint", "instance", s.cfg.instance, "error", err)
		}
		return
	}
	s.newBase = head
	s.poke()
}

// base takes a full snapshot into a new base.
func (s *saver) base(ctx context.Context) (*chainHead, error) {
	r, mark, stop := s.snapshot(ctx, 0)
	defer stop()
	meta := s.meta(0)
	br := newByteReader(r)
	if _, err := br.Peek(1); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	meta.Mark = mark()
	return writeBase(ctx, s.cfg.store, meta, br)
}

// snapshot streams the component's checkpoint in stored form. mark is known once the first byte was read.
func (s *saver) snapshot(ctx context.Context, since uint64) (io.Reader, func() uint64, func()) {
	ctx, cancel := context.WithCancel(ctx)
	pr, pw := io.Pipe()
	var mu sync.Mutex
	var mark uint64
	go func() {
		err := s.pump(ctx, since, pw, func(m uint64) {
			mu.Lock()
			mark = max(mark, m)
			mu.Unlock()
		})
		pw.CloseWithError(err)
	}()
	return pr, func() uint64 { mu.Lock(); defer mu.Unlock(); return mark }, func() { cancel(); pr.Close() }
}

func (s *saver) pump(ctx context.Context, since uint64, w io.Writer, sawMark func(uint64)) error {
	stream, err := s.cfg.component.Checkpoint(ctx, &componentv1.CheckpointFrom{SinceMark: since, ChunkBytes: 256 << 10, Schema: s.cfg.schema})
	if err != nil {
		return fmt.Errorf("snapshot of %s: %w", s.cfg.instance, err)
	}
	for {
		f, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("snapshot of %s: %w", s.cfg.instance, err)
		}
		sawMark(f.GetMark())
		var buf frameBuffer
		if err := buf.add(f); err != nil {
			return err
		}
		if _, err := w.Write(buf.buf.Bytes()); err != nil {
			return fmt.Errorf("snapshot of %s: %w", s.cfg.instance, err)
		}
	}
}

// capture saves what changed since the last commit by asking the component, not its journal.
func (s *saver) capture(ctx context.Context, full bool) error {
	s.mu.Lock()
	head, saved := s.head, s.saved
	s.mu.Unlock()
	if full || !s.cfg.incremental || head.needsBase() {
		next, err := s.base(ctx)
		if err != nil {
			return err
		}
		if head != nil && !full && next.meta.GetMark() == saved.Mark && next.meta.GetMark() != 0 {
			return nil
		}
		if err := s.commit(ctx, next); err != nil {
			return err
		}
		return s.forget(next.meta.GetMark())
	}
	r, mark, stop := s.snapshot(ctx, saved.Mark)
	defer stop()
	frames, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if mark() <= saved.Mark {
		return nil
	}
	next, err := writeDelta(ctx, s.cfg.store, head, s.meta(mark()), frames)
	if err != nil {
		return err
	}
	if err := s.commit(ctx, next); err != nil {
		return err
	}
	return s.forget(mark())
}

// forget drops journal entries that a capture has overtaken.
func (s *saver) forget(mark uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.pending) > 0 && s.pending[0].mark <= mark {
		s.pending = s.pending[1:]
	}
	return nil
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
