package blobs

import (
	"bufio"
	"errors"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// answersWaiting bounds the answers that one stream owes; its reader waits beyond it.
const answersWaiting = 256

// reportMissing is how many missing nodes an answer to a root names at most.
const reportMissing = 1024

// serve answers one peer's stream: questions are read and nodes kept in their order; answers, which may wait for the disk, follow on a
// goroutine of their own, so that the fsyncs of many roots in flight are one.
func (s *Store) serve(from peer.ID, st peers.Stream) {
	if !s.work.enter() {
		// The store is closed; nothing to say.
		_ = st.Reset()
		return
	}
	defer s.work.leave()
	if !s.work.track(st) {
		_ = st.Reset()
		return
	}
	defer s.work.untrack(st)
	c := &conn{s: s, stream: st, answers: make(chan func() *wirev1.BlobAnswer, answersWaiting), gone: make(chan struct{})}
	go c.answer()
	err := c.read()
	close(c.answers)
	<-c.gone
	if errors.Is(err, io.EOF) {
		if err := st.Close(); err != nil {
			s.cfg.Log.Debug("blob stream ended", "from", from, "err", err)
		}
		return
	}
	// The stream is over for both; its reset cannot fail in a way that matters.
	_ = st.Reset()
	if errors.Is(err, errGarbage) || errors.Is(err, errFrame) || errors.Is(err, ErrInvalid) {
		s.stats.garbage.Add(1)
		if s.known.blame(from) {
			s.cfg.Log.Warn("a peer sent garbage on its blob stream; further times are only counted", "from", from, "err", err)
		}
		return
	}
	s.cfg.Log.Debug("blob stream ended", "from", from, "err", err)
}

// conn is the answering side of one stream.
type conn struct {
	s       *Store
	stream  peers.Stream
	answers chan func() *wirev1.BlobAnswer
	gone    chan struct{}
}

func (c *conn) read() error {
	r := bufio.NewReaderSize(c.stream, 64<<10)
	var buf []byte
	for {
		raw, err := readRaw(r, buf)
		if err != nil {
			return err
		}
		if cap(raw) <= keptFrame {
			buf = raw
		}
		if nodes, ok := pagesIn(raw); ok {
			err = c.pages(nodes)
		} else {
			ask := &wirev1.BlobAsk{}
			if err = decodeFrame(raw, ask); err == nil {
				err = c.handle(ask)
			}
		}
		if err != nil {
			return err
		}
	}
}

// pages keeps nodes, which the caller uses again.
func (c *conn) pages(nodes [][]byte) error {
	_, err := c.keep(nodes, false)
	if errors.Is(err, ErrFull) {
		return nil // the root that follows is refused
	}
	return err
}

// answer writes what is due, in order, until answers is closed. After a failed write it goes on taking them, as some hold batches.
func (c *conn) answer() {
	defer close(c.gone)
	broken := false
	for f := range c.answers {
		a := f()
		if broken {
			continue
		}
		frame, err := appendFrame(nil, a)
		if err == nil {
			err = c.stream.SetWriteDeadline(time.Now().Add(10 * time.Second))
		}
		if err == nil {
			_, err = c.stream.Write(frame)
		}
		if err != nil {
			broken = true
			// Ends the reader too.
			_ = c.stream.Reset()
		}
	}
}

// handle serves one question; an error ends the stream.
func (c *conn) handle(ask *wirev1.BlobAsk) error {
	id := ask.GetId()
	switch body := ask.GetBody().(type) {
	case *wirev1.BlobAsk_Pages:
		return c.pages(body.Pages.GetNodes())
	case *wirev1.BlobAsk_Have:
		hs, err := unpackHashes(body.Have.GetHashes(), maxHave)
		if err != nil {
			return errGarbage
		}
		c.answers <- func() *wirev1.BlobAnswer { return c.s.answerHave(id, hs) }
	case *wirev1.BlobAsk_Get:
		hs, err := unpackHashes(body.Get.GetHashes(), maxGet)
		if err != nil {
			return errGarbage
		}
		c.answers <- func() *wirev1.BlobAnswer { return c.s.answerGet(id, hs) }
	case *wirev1.BlobAsk_Root:
		root, err := ParseHash(body.Root.GetRoot())
		if err != nil {
			return errGarbage
		}
		return c.root(id, root, body.Root.GetNodes())
	default:
		// A question of a later version: say so, and go on.
		c.answers <- func() *wirev1.BlobAnswer {
			return failed(id, wirev1.Failure_FORMAT, "this version does not know the question")
		}
	}
	return nil
}

// keep stores nodes in their order; with sync, the function returned waits for the disk.
func (c *conn) keep(encs [][]byte, sync bool) (synced func() error, err error) {
	if c.s.cfg.Low() {
		c.s.stats.refused.Add(1)
		return nil, ErrFull
	}
	c.s.sweeping.RLock()
	defer c.s.sweeping.RUnlock()
	size := 0
	for _, enc := range encs {
		size += len(enc)
	}
	st := c.s.newStagerOf(true, size)
	for _, enc := range encs {
		if _, _, err := st.add(enc); err != nil {
			st.drop()
			return nil, err
		}
	}
	if sync {
		synced, err = st.apply()
	} else {
		err = st.applyLazily()
	}
	if err != nil {
		st.drop()
		return nil, err
	}
	c.s.stats.received.Add(uint64(len(encs)))
	return synced, nil
}

// root keeps what comes with a root and owes the acknowledgement.
func (c *conn) root(id uint64, root Hash, encs [][]byte) error {
	synced, err := c.keep(encs, true)
	if errors.Is(err, ErrFull) {
		c.answers <- func() *wirev1.BlobAnswer { return failed(id, wirev1.Failure_FULL, ErrFull.Error()) }
		return nil
	}
	if err != nil {
		return err
	}
	complete, err := c.s.rely(root, true)
	var missing []Hash
	if err == nil && !complete {
		if complete, missing, err = c.s.settle(root, reportMissing); err == nil && complete {
			complete, err = c.s.rely(root, true)
		}
	}
	complete = complete || planted.Bug("ack-incomplete")
	settled, upTo := err, c.s.wal.now()
	c.answers <- func() *wirev1.BlobAnswer {
		// synced covers the nodes that came with the root; what was there before, and the marks just made, may be on their way.
		err := synced()
		if err == nil && complete {
			err = c.s.durable(upTo)
		}
		if err = errors.Join(settled, err); err != nil {
			c.s.cfg.Log.Error("blobs: cannot acknowledge a root", "root", root.String(), "err", err)
			return failed(id, wirev1.Failure_INTERNAL, "the holder's disk failed: "+err.Error())
		}
		return &wirev1.BlobAnswer{Id: id, Body: &wirev1.BlobAnswer_Root{
			Root: &wirev1.BlobRootAnswer{Acked: complete, Missing: packHashes(missing)},
		}}
	}
	return nil
}

func failed(id uint64, code wirev1.Failure_Code, message string) *wirev1.BlobAnswer {
	return &wirev1.BlobAnswer{Id: id, Failure: &wirev1.Failure{Code: code, Message: message}}
}

// answerHave says what is here. What is complete is pinned.
func (s *Store) answerHave(id uint64, hs []Hash) *wirev1.BlobAnswer {
	if s.cfg.Low() {
		s.stats.refused.Add(1)
		return failed(id, wirev1.Failure_FULL, ErrFull.Error())
	}
	complete, present := make([]byte, (len(hs)+7)/8), make([]byte, (len(hs)+7)/8)
	for i, h := range hs {
		here, whole, err := s.relyOn(h)
		if err != nil {
			return failed(id, wirev1.Failure_INTERNAL, err.Error())
		}
		if here {
			present[i/8] |= 1 << (i % 8)
		}
		if whole {
			complete[i/8] |= 1 << (i % 8)
		}
	}
	return &wirev1.BlobAnswer{Id: id, Body: &wirev1.BlobAnswer_Have{
		Have: &wirev1.BlobHaveAnswer{Complete: complete, Present: present},
	}}
}

// answerGet returns verified nodes, as many as fit.
func (s *Store) answerGet(id uint64, hs []Hash) *wirev1.BlobAnswer {
	a := &wirev1.BlobGetAnswer{}
	size := 0
	for _, h := range hs {
		_, enc, err := s.get(h)
		var missing *MissingError
		var corrupt *CorruptError
		if err != nil && !errors.As(err, &missing) && !errors.As(err, &corrupt) {
			return failed(id, wirev1.Failure_INTERNAL, err.Error())
		}
		if len(a.Nodes) > 0 && size+len(enc) > getAnswer {
			break
		}
		size += len(enc)
		a.Nodes = append(a.Nodes, enc)
	}
	s.stats.sent.Add(uint64(len(a.Nodes)))
	return &wirev1.BlobAnswer{Id: id, Body: &wirev1.BlobAnswer_Get{Get: a}}
}
