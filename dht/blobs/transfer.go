package blobs

import (
	"context"
	"fmt"
	"time"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	transferRounds = 3
	firstWindow    = 64
	lastWindow     = 4096
	// gentleShare: after each frame of what has no hurry nothing is sent for so many times as long as the frame took. So it takes at most a quarter of a
	// link, whatever that bears: a frame takes as long as it waits for room in the link's buffers.
	gentleShare = 3
)

// transfer sends what the peer lacks of a root until it acknowledges. missing is what the peer named.
func (s *Store) transfer(ctx context.Context, x *session, root Hash, missing []Hash) error {
	for range transferRounds {
		if len(missing) >= reportMissing {
			missing = []Hash{root} // the list was cut off
		}
		t := &transfer{s: s, x: x, todo: missing, window: firstWindow, asked: map[Hash]struct{}{}}
		if err := t.run(ctx); err != nil {
			return err
		}
		var err error
		if missing, err = s.askRoot(ctx, x, root, nil, nil); err != nil {
			return err
		}
		if missing == nil {
			return nil
		}
	}
	return fmt.Errorf("%s still lacks %d nodes after %d rounds, first %s", x.peer, len(missing), transferRounds, missing[0].Short())
}

// transfer walks down what the peer lacks. It asks about a window of nodes at a time, the ones to do and what is below them, breadth
// first; windows grow, so that a small difference in a large tree costs few questions and a chain or a new tree few round trips.
type transfer struct {
	s      *Store
	x      *session
	todo   []Hash // last first
	window int
	asked  map[Hash]struct{} // nodes with links that were asked about
	frame  [][]byte
	size   int
}

func (t *transfer) run(ctx context.Context) error {
	for len(t.todo) > 0 {
		hashes, links, err := t.gather()
		if err != nil {
			return err
		}
		if len(hashes) == 0 {
			continue
		}
		a, err := t.x.ask(ctx, &wirev1.BlobAsk{Body: &wirev1.BlobAsk_Have{
			Have: &wirev1.BlobHave{Hashes: packHashes(hashes)},
		}}, nil)
		if err != nil {
			return err
		}
		if err := t.send(ctx, hashes, links, a.GetHave()); err != nil {
			return err
		}
		t.window = min(4*t.window, lastWindow)
	}
	return t.flush(ctx)
}

// gather takes up to a window of what is to do, and fills it up with what is below.
func (t *transfer) gather() (hashes []Hash, links map[Hash][]Link, err error) {
	inWindow := map[Hash]struct{}{}
	links = map[Hash][]Link{}
	take := func(h Hash) error {
		if _, ok := inWindow[h]; ok {
			return nil
		}
		if _, ok := t.asked[h]; ok {
			return nil
		}
		hd, ok, err := t.s.headOf(h)
		if err != nil {
			return err
		}
		if !ok {
			return &MissingError{Hash: h}
		}
		inWindow[h] = struct{}{}
		hashes = append(hashes, h)
		if len(hd.links) > 0 {
			t.asked[h] = struct{}{}
			links[h] = hd.links
		}
		return nil
	}
	n := max(0, len(t.todo)-t.window)
	for i := len(t.todo) - 1; i >= n; i-- {
		if err := take(t.todo[i]); err != nil {
			return nil, nil, err
		}
	}
	t.todo = t.todo[:n]
	for i := 0; i < len(hashes) && len(hashes) < t.window; i++ {
		for _, l := range links[hashes[i]] {
			if len(hashes) >= t.window {
				break
			}
			if err := take(l.Hash); err != nil {
				return nil, nil, err
			}
		}
	}
	return hashes, links, nil
}

// send sends the nodes that are absent, parents first, and notes what is below incomplete nodes as to do.
func (t *transfer) send(ctx context.Context, hashes []Hash, links map[Hash][]Link, a *wirev1.BlobHaveAnswer) error {
	inWindow := make(map[Hash]struct{}, len(hashes))
	for _, h := range hashes {
		inWindow[h] = struct{}{}
	}
	for i, h := range hashes {
		if bit(a.GetComplete(), i) {
			continue
		}
		if !bit(a.GetPresent(), i) {
			if err := t.node(ctx, h); err != nil {
				return err
			}
		}
		for _, l := range links[h] {
			if _, ok := inWindow[l.Hash]; !ok {
				t.todo = append(t.todo, l.Hash)
			}
		}
	}
	return nil
}

func bit(b []byte, i int) bool { return i/8 < len(b) && b[i/8]&(1<<(i%8)) != 0 }

// node adds one node to the frame.
func (t *transfer) node(ctx context.Context, h Hash) error {
	_, enc, err := t.s.get(h)
	if err != nil {
		return err
	}
	return t.put(ctx, enc)
}

// put adds an encoding to the frame, and sends the frame when it is full.
func (t *transfer) put(ctx context.Context, enc []byte) error {
	if t.size+len(enc) > framePages {
		if err := t.flush(ctx); err != nil {
			return err
		}
	}
	t.frame = append(t.frame, enc)
	t.size += len(enc)
	return nil
}

func (t *transfer) flush(ctx context.Context) error {
	if len(t.frame) == 0 {
		return nil
	}
	begin := time.Now()
	err := t.x.write(ctx, &wirev1.BlobAsk{Body: &wirev1.BlobAsk_Pages{Pages: &wirev1.BlobPages{Nodes: t.frame}}}, nil)
	t.s.stats.sent.Add(uint64(len(t.frame)))
	t.frame, t.size = nil, 0
	if err != nil || ctx.Value(gently{}) == nil {
		return err
	}
	t.s.stats.gentle.Add(1)
	select {
	case <-time.After(gentleShare * time.Since(begin)):
		return nil
	case <-t.x.dead:
		return t.x.reason()
	case <-ctx.Done():
		return ctx.Err()
	}
}
