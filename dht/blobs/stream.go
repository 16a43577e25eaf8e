package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/libp2p/go-libp2p/core/peer"
)

// Kinds of the nodes of a stream.
const (
	KindPage = "page" // a piece of the bytes
	KindTree = "tree" // links to pages or trees, in order
)

const (
	pageSize = 16 << 10
	// A stream that is longer than bigStream has pages of bigPage from there on: states edited in place keep their small pages,
	// and an image of gigabytes does not become a million nodes.
	bigStream = 256 << 20
	bigPage   = 256 << 10
	fanOut    = 256
	// writeChunk bytes of pages go to the database in one batch.
	writeChunk = 1 << 20
)

// WriteStream keeps the bytes of r as pages under a Merkle tree and returns the link to its root after the fsync. Equal bytes give equal
// roots, and a change in place gives new nodes only for the pages touched and the trees above them.
func (s *Store) WriteStream(ctx context.Context, r io.Reader) (Link, error) {
	return s.WriteStreamTo(ctx, r, nil, 0)
}

// WriteStreamTo is WriteStream, and brings what is written to peers at the same time, so that a Push of a root above it finds most of it there. w says how
// many of them, this node included, set the pace: r is not read faster than these take it, and no more than some MiB are held for all. It promises nothing
// about what the peers have.
func (s *Store) WriteStreamTo(ctx context.Context, r io.Reader, to []peer.ID, w int) (Link, error) {
	if !s.work.enter() {
		return Link{}, ErrClosed
	}
	defer s.work.leave()
	ctx, cancel := s.work.join(ctx)
	defer cancel()
	sw := &streamWriter{s: s, feed: s.newFeed(ctx, to, w)}
	l, err := sw.copy(ctx, r)
	sw.flush(ctx, &err)
	if err != nil {
		sw.feed.end()
		return Link{}, fmt.Errorf("keep stream: %w", err)
	}
	synced := make(chan error, 1)
	go func() { synced <- s.durable(s.wal.now()) }()
	sw.feed.close(ctx)
	if err := <-synced; err != nil {
		return Link{}, fmt.Errorf("keep stream: %w", err)
	}
	return l, nil
}

// streamWriter builds the tree from its leaves; levels[i] are links to nodes of height i that have no parent yet.
type streamWriter struct {
	s      *Store
	feed   *feed
	levels [][]Link
	queue  []Node // nodes waiting to be kept, with their encodings
	encs   []encoded
	queued int
}

func (w *streamWriter) copy(ctx context.Context, r io.Reader) (Link, error) {
	var offset int64
	buf := make([]byte, pageSize)
	for {
		if offset == bigStream {
			buf = make([]byte, bigPage)
		}
		n, err := io.ReadFull(r, buf)
		end := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !end {
			return Link{}, err
		}
		if n > 0 || offset == 0 {
			if err := w.add(ctx, 0, Node{Kind: KindPage, Data: buf[:n]}); err != nil {
				return Link{}, err
			}
		}
		offset += int64(n)
		if end {
			return w.finish(ctx)
		}
		if err := ctx.Err(); err != nil {
			return Link{}, err
		}
	}
}

// add queues a node of a height and, where that fills a tree, the tree.
func (w *streamWriter) add(ctx context.Context, height int, n Node) error {
	enc := n.encode()
	n.Data = enc[len(enc)-len(n.Data):] // what it was read into is used again
	h := hashOf(enc)
	if height == len(w.levels) {
		w.levels = append(w.levels, nil)
	}
	w.levels[height] = append(w.levels[height], n.link(h, len(enc)))
	w.queue, w.encs = append(w.queue, n), append(w.encs, encoded{h, enc})
	if w.queued += len(enc); w.queued >= writeChunk {
		var err error
		if w.flush(ctx, &err); err != nil {
			return err
		}
	}
	// One link more than fits is awaited before a tree is closed, so that a stream of exactly one tree has no parent above it.
	if len(w.levels[height]) > fanOut {
		return w.close(ctx, height, fanOut)
	}
	return nil
}

// close makes a tree of the first n open links of a height.
func (w *streamWriter) close(ctx context.Context, height, n int) error {
	links := append([]Link(nil), w.levels[height][:n]...)
	w.levels[height] = append(w.levels[height][:0], w.levels[height][n:]...)
	return w.add(ctx, height+1, Node{Kind: KindTree, Links: links})
}

// finish closes what is open, from the lowest height up, until one link is left.
func (w *streamWriter) finish(ctx context.Context) (Link, error) {
	for height := 0; ; height++ {
		open := w.levels[height]
		if height == len(w.levels)-1 && len(open) == 1 {
			return open[0], nil
		}
		if len(open) > 0 {
			if err := w.close(ctx, height, len(open)); err != nil {
				return Link{}, err
			}
		}
	}
}

// flush keeps what is queued and hands it to the peers; an error goes into err where there is none yet.
func (w *streamWriter) flush(ctx context.Context, err *error) {
	if *err != nil || len(w.queue) == 0 {
		return
	}
	if *err = w.keep(); *err != nil {
		return
	}
	w.feed.give(ctx, w.encs)
	w.queue, w.encs, w.queued = w.queue[:0], nil, 0 // the peers have the encodings
}

func (w *streamWriter) keep() error {
	w.s.sweeping.RLock()
	defer w.s.sweeping.RUnlock()
	st := w.s.newStagerOf(true, w.queued)
	for i := range w.queue {
		if _, err := st.addHashed(&w.queue[i], w.encs[i].hash, len(w.encs[i].enc)); err != nil {
			st.drop()
			return err
		}
	}
	if err := st.applyLazily(); err != nil {
		st.drop()
		return err
	}
	return nil
}

// OpenStream returns a reader of the bytes under root. Each page is verified when it is read; the reader then returns *CorruptError or
// *MissingError, after which reading on tries the same page again: a caller may have fetched it meanwhile.
func (s *Store) OpenStream(root Hash) (io.ReadCloser, error) {
	ok, err := s.Has(root)
	if err != nil {
		return nil, fmt.Errorf("open stream %s: %w", root.Short(), err)
	}
	if !ok {
		return nil, fmt.Errorf("open stream: %w", &MissingError{Hash: root})
	}
	return &streamReader{s: s, todo: []Hash{root}}, nil
}

type streamReader struct {
	s    *Store
	todo []Hash // last first
	page []byte
}

func (r *streamReader) Read(p []byte) (int, error) {
	for len(r.page) == 0 {
		if len(r.todo) == 0 {
			return 0, io.EOF
		}
		if len(p) == 0 {
			return 0, nil
		}
		if err := r.step(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.page)
	r.page = r.page[n:]
	return n, nil
}

func (r *streamReader) step() error {
	h := r.todo[len(r.todo)-1]
	n, err := r.s.Get(h)
	if err != nil {
		return fmt.Errorf("read stream: %w", err)
	}
	switch n.Kind {
	case KindPage:
		r.page = n.Data
		r.todo = r.todo[:len(r.todo)-1]
	case KindTree:
		r.todo = r.todo[:len(r.todo)-1]
		for i := len(n.Links) - 1; i >= 0; i-- {
			r.todo = append(r.todo, n.Links[i].Hash)
		}
	default:
		return fmt.Errorf("read stream: %w: node %s is of kind %q, no part of a stream", ErrInvalid, h.Short(), n.Kind)
	}
	return nil
}

func (r *streamReader) Close() error {
	r.todo, r.page = nil, nil
	return nil
}
