package blobs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	pushAttempts = 3
	pushBackoff  = 50 * time.Millisecond
	// inlineBytes and inlineNodes bound what goes along with a root before the peer is asked what it has.
	inlineBytes = 64 << 10
	inlineNodes = 256
)

var errBusy = errors.New("too many pushes to the peer are under way")

// PushError says which peers did not acknowledge a root. Those that are neither acked nor failed were still being tried.
type PushError struct {
	Root   Hash
	Want   int
	Acked  []peer.ID
	Failed map[peer.ID]error
	// Cause is why the push ended before its peers did: the context's error; nil where too many peers failed.
	Cause error
}

func (e *PushError) Error() string {
	msg := fmt.Sprintf("push %s: %d of %d acknowledgements", e.Root.Short(), len(e.Acked), e.Want)
	ids := make([]peer.ID, 0, len(e.Failed))
	for id := range e.Failed {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		msg += fmt.Sprintf("; %s: %v", id, e.Failed[id])
	}
	if e.Cause != nil {
		msg += "; " + e.Cause.Error()
	}
	return msg
}

func (e *PushError) Unwrap() error { return e.Cause }

// Push brings root, complete here, to peers and returns as soon as w of them have acknowledged it, with those that have; this node
// counts where it is among them. What is not done then goes on in the background, and each further acknowledgement goes to the
// function of SetOnAcked. An error is a *PushError, returned when ctx ends (then the background ends as well) or as soon as too many
// peers have failed for w to be reached: unreachable, reset or silent for the stall time in each of three attempts, or with a disk that
// is low. The peers that did acknowledge are returned with the error too.
func (s *Store) Push(ctx context.Context, root Hash, to []peer.ID, w int) (acked []peer.ID, err error) {
	return s.pushKept(ctx, root, to, w)
}

// PushGently is Push for copies that nobody waits for: what is missing goes with a share of what the link to each peer bears.
func (s *Store) PushGently(ctx context.Context, root Hash, to []peer.ID, w int) (acked []peer.ID, err error) {
	return s.pushKept(context.WithValue(ctx, gently{}, true), root, to, w)
}

// gently is the key under which a context says that there is no hurry.
type gently struct{}

// pushKept pushes what is here.
func (s *Store) pushKept(ctx context.Context, root Hash, to []peer.ID, w int) (acked []peer.ID, err error) {
	if !s.work.enter() {
		return nil, ErrClosed
	}
	defer s.work.leave()
	ok, err := s.complete(root)
	if err != nil {
		return nil, fmt.Errorf("push %s: %w", root.Short(), err)
	}
	if !ok {
		return nil, fmt.Errorf("push %s: it is not complete here: %w", root.Short(), &MissingError{Hash: root})
	}
	return s.push(ctx, root, to, w, func() error { return nil })
}

// PutPush is Put and Push in one: the node travels while it is synced here. This node counts, after its fsync, where it is among the
// peers. The node's links must be complete here. The link is valid with an error too, once the node was kept.
func (s *Store) PutPush(ctx context.Context, n Node, to []peer.ID, w int) (l Link, acked []peer.ID, err error) {
	if !s.work.enter() {
		return Link{}, nil, ErrClosed
	}
	defer s.work.leave()
	l, synced, err := s.put(&n)
	if err != nil {
		return Link{}, nil, err
	}
	here := make(chan error, 1)
	if !s.work.enter() {
		return Link{}, nil, errors.Join(ErrClosed, synced())
	}
	go func() {
		defer s.work.leave()
		here <- synced()
	}()
	ok, err := s.rely(l.Hash, false)
	if err == nil && !ok {
		ok, _, err = s.settle(l.Hash, 1)
	}
	if err == nil && !ok {
		err = fmt.Errorf("something below it is not here: %w", &MissingError{Hash: l.Hash})
	}
	if err != nil {
		return l, nil, fmt.Errorf("push %s: %w", l.Hash.Short(), err)
	}
	acked, err = s.push(ctx, l.Hash, to, w, func() error { return <-here })
	return l, acked, err
}

func (s *Store) push(ctx context.Context, root Hash, to []peer.ID, w int, here func() error) ([]peer.ID, error) {
	if w > len(to) {
		return nil, &PushError{Root: root, Want: w, Cause: fmt.Errorf("only %d peers were given", len(to))}
	}
	bg, cancel := s.work.join(context.WithoutCancel(ctx))
	if ctx.Value(gently{}) != nil {
		bg = context.WithValue(bg, gently{}, true) // join takes the end of ctx only
	}
	t := &tally{s: s, root: root, open: len(to), want: w, failed: map[peer.ID]error{}, change: make(chan struct{}, 1)}
	for _, id := range to {
		// The caller holds the store open, so this cannot be refused; it outlives the caller.
		s.work.wg.Add(1)
		go func() {
			defer s.work.leave()
			var err error
			if id == s.cfg.Self {
				err = here()
			} else {
				err = s.pushTo(bg, root, id)
			}
			if t.report(id, err) {
				cancel()
			}
		}()
	}
	if len(to) == 0 {
		cancel()
	}
	for {
		if done, acked, err := t.outcome(nil); done {
			return acked, err
		}
		select {
		case <-t.change:
		case <-ctx.Done():
			_, acked, err := t.outcome(ctx.Err())
			if err != nil {
				cancel()
			}
			return acked, err
		}
	}
}

// tally counts what the peers of one push came to.
type tally struct {
	s      *Store
	root   Hash
	want   int
	change chan struct{}

	mu     sync.Mutex // guards all below
	open   int
	over   bool // the push has returned
	acked  []peer.ID
	failed map[peer.ID]error
}

// report takes a peer's result; true: it was the last.
func (t *tally) report(id peer.ID, err error) (last bool) {
	t.mu.Lock()
	t.open--
	last = t.open == 0
	over := t.over
	if err != nil {
		t.failed[id] = err
	} else if !over {
		t.acked = append(t.acked, id)
	}
	t.mu.Unlock()
	if err != nil && id != t.s.cfg.Self {
		t.s.stats.failed.Add(1)
		t.s.cfg.Log.Debug("push failed", "root", t.root.Short(), "to", id, "err", err)
	}
	if over {
		t.s.stats.background.Add(-1)
		if f := t.s.onAcked.Load(); err == nil && f != nil {
			t.s.stats.late.Add(1)
			(*f)(t.root, id)
		}
	}
	select {
	case t.change <- struct{}{}:
	default:
	}
	return last
}

// outcome reports whether the push is over, and how. With a cause it is over in any case.
func (t *tally) outcome(cause error) (done bool, acked []peer.ID, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	enough := len(t.acked) >= t.want
	if !enough && len(t.acked)+t.open >= t.want && cause == nil {
		return false, nil, nil
	}
	t.over = true
	t.s.stats.background.Add(int64(t.open))
	acked = slices.Clone(t.acked)
	if enough {
		return true, acked, nil
	}
	failed := make(map[peer.ID]error, len(t.failed))
	for id, err := range t.failed {
		failed[id] = err
	}
	return true, acked, &PushError{Root: t.root, Want: t.want, Acked: acked, Failed: failed, Cause: cause}
}

// pushTo brings a root to one peer and returns when it has acknowledged it.
func (s *Store) pushTo(ctx context.Context, root Hash, to peer.ID) error {
	if !s.known.begin(to, s.cfg.MaxInflight) {
		s.stats.busy.Add(1)
		return errBusy
	}
	defer s.known.end(to)
	for attempt := 1; ; attempt++ {
		fresh, err := s.pushOnce(ctx, root, to)
		if err == nil {
			return nil
		}
		var remote *RemoteError
		var lost *MissingError
		if ctx.Err() != nil || errors.As(err, &remote) || errors.As(err, &lost) {
			return err
		}
		if attempt >= pushAttempts || !s.cfg.Alive(to) {
			return err
		}
		if !fresh {
			continue // the stream was an old one that had ended: say it on a new one, at once
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pushBackoff << attempt):
		}
	}
}

// pushOnce sends the root with what is small and not known to be there; where that is not enough, everything that is missing. fresh
// says that the attempt had a stream of its own, so that its failure tells about the peer.
func (s *Store) pushOnce(ctx context.Context, root Hash, to peer.ID) (fresh bool, err error) {
	encs, hashes, fits, err := s.inline(root, to)
	if err != nil {
		return true, err
	}
	c := hot
	if !fits {
		c = bulk
	}
	x, reused, err := s.pool.get(ctx, to, c)
	if err != nil {
		return true, err
	}
	missing, err := s.askRoot(ctx, x, root, encs, hashes)
	if err != nil {
		s.known.forget(to, hashes...)
		return !reused, err
	}
	if missing == nil {
		return true, nil
	}
	s.known.forgetAll(to)
	if c != bulk {
		if x, reused, err = s.pool.get(ctx, to, bulk); err != nil {
			return true, err
		}
	}
	return !reused, s.transfer(ctx, x, root, missing)
}

// askRoot sends a root and nodes and returns what the peer lacks for it, nil when it has acknowledged.
func (s *Store) askRoot(ctx context.Context, x *session, root Hash, encs [][]byte, hashes []Hash) ([]Hash, error) {
	a, err := x.ask(ctx, &wirev1.BlobAsk{Body: &wirev1.BlobAsk_Root{
		Root: &wirev1.BlobRoot{Root: root[:], Nodes: encs},
	}}, func() {
		s.stats.sent.Add(uint64(len(encs)))
		for _, h := range hashes {
			s.known.learn(x.peer, h)
		}
	})
	if err != nil {
		return nil, err
	}
	if a.GetRoot().GetAcked() {
		s.known.learn(x.peer, root)
		return nil, nil
	}
	missing, err := unpackHashes(a.GetRoot().GetMissing(), maxHave)
	if err == nil && len(missing) == 0 {
		err = errors.New("the peer neither acknowledged nor said what is missing")
	}
	if err != nil {
		x.fail(err)
		return nil, err
	}
	return missing, nil
}

// inline collects the nodes below root that the peer is not known to have, the lowest first. fits is false where that is too much:
// then it is the root alone, or nothing where even that is large.
func (s *Store) inline(root Hash, to peer.ID) (encs [][]byte, hashes []Hash, fits bool, err error) {
	in := &inliner{s: s, to: to, left: inlineBytes, seen: map[Hash]struct{}{}}
	fits, err = in.visit(root, 0)
	if err != nil {
		return nil, nil, false, err
	}
	if fits {
		return in.encs, in.hashes, true, nil
	}
	_, enc, err := s.get(root)
	if err != nil {
		return nil, nil, false, err
	}
	if len(enc) > inlineBytes {
		return nil, nil, false, nil
	}
	return [][]byte{enc}, nil, false, nil
}

type inliner struct {
	s      *Store
	to     peer.ID
	left   int
	seen   map[Hash]struct{}
	encs   [][]byte
	hashes []Hash
}

// visit adds what is below h and h itself; false: it does not fit.
func (in *inliner) visit(h Hash, depth int) (bool, error) {
	if _, ok := in.seen[h]; ok || in.s.known.has(in.to, h) {
		return true, nil
	}
	in.seen[h] = struct{}{}
	if len(in.seen) > inlineNodes || depth > inlineNodes {
		return false, nil
	}
	n, enc, err := in.s.get(h)
	if err != nil {
		return false, err
	}
	if in.left -= len(enc); in.left < 0 {
		return false, nil
	}
	for _, l := range n.Links {
		if ok, err := in.visit(l.Hash, depth+1); err != nil || !ok {
			return false, err
		}
	}
	in.encs, in.hashes = append(in.encs, enc), append(in.hashes, h)
	return true, nil
}
