package blobs

import (
	"context"
	"errors"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// feedQueue batches of writeChunk bytes wait for a peer at most.
	feedQueue = 4
	// feedAhead batches of a peer may have been asked about and not been sent yet.
	feedAhead = 2
)

// encoded is a node as it travels.
type encoded struct {
	hash Hash
	enc  []byte
}

// feed brings the nodes of a stream to peers while it is being written. It only saves time: what a peer did not get, for it was slow or could not be
// reached, the Push of the root brings; and whether it has everything only its answer to that says.
type feed struct {
	s     *Store
	need  int // so many peers set the pace
	peers []*feeder
	end   context.CancelFunc
}

// feeder is one peer of a feed.
type feeder struct {
	s     *Store
	to    peer.ID
	queue chan []encoded
	asked chan asked
	done  chan struct{} // closed when nothing more goes to it
}

// asked is a batch with what the peer has of it.
type asked struct {
	batch []encoded
	have  *wirev1.BlobHaveAnswer
}

// newFeed begins one to those of to that are not this node; nil where there is none. The stream is not written faster than w peers, this node included where
// it is among them, take it.
func (s *Store) newFeed(ctx context.Context, to []peer.ID, w int) *feed {
	f := &feed{s: s, need: w}
	ctx, f.end = context.WithCancel(ctx)
	for _, id := range to {
		if id == s.cfg.Self {
			f.need--
			continue
		}
		p := &feeder{s: s, to: id, queue: make(chan []encoded, feedQueue), asked: make(chan asked, feedAhead), done: make(chan struct{})}
		f.peers = append(f.peers, p)
		// The caller holds the store open, so this cannot be refused. It ends with the caller's call at the latest once what it writes has timed out.
		s.work.wg.Add(1)
		go func() {
			defer s.work.leave()
			p.run(ctx)
		}()
	}
	f.need = min(max(f.need, 1), len(f.peers))
	return f
}

// give hands a batch to every peer that has room, and waits until need have taken it or cannot any more.
func (f *feed) give(ctx context.Context, batch []encoded) {
	taken := 0
	var full []*feeder
	for _, p := range f.peers {
		select {
		case p.queue <- batch:
			taken++
		default:
			full = append(full, p)
		}
	}
	for _, p := range full {
		if taken >= f.need {
			return
		}
		select {
		case p.queue <- batch:
			taken++
		case <-p.done:
		case <-ctx.Done():
			return
		}
	}
}

// close waits until need peers were sent all that they took, and gives the others up.
func (f *feed) close(ctx context.Context) {
	defer f.end()
	var wg sync.WaitGroup
	sent := make(chan struct{}, len(f.peers))
	for _, p := range f.peers {
		close(p.queue)
		wg.Go(func() {
			select {
			case <-p.done:
				sent <- struct{}{}
			case <-ctx.Done():
			}
		})
	}
	for range f.need {
		select {
		case <-sent:
		case <-ctx.Done():
		}
	}
}

// run sends what is queued until the queue is closed, or nothing can be sent any more.
func (p *feeder) run(ctx context.Context) {
	defer close(p.done)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	x, _, err := p.s.pool.get(ctx, p.to, bulk)
	if err == nil {
		var wg sync.WaitGroup
		var aerr error
		wg.Go(func() { aerr = p.ask(ctx, x) })
		if err = p.send(ctx, x); err != nil {
			cancel()
		}
		wg.Wait()
		err = errors.Join(err, aerr)
	}
	if err != nil && ctx.Err() == nil {
		p.s.cfg.Log.Debug("a peer gets a stream when it is written, not while", "to", p.to, "err", err)
	}
}

// ask asks what the peer has of each batch, ahead of what is being sent.
func (p *feeder) ask(ctx context.Context, x *session) error {
	defer close(p.asked)
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case batch, ok := <-p.queue:
			if !ok {
				return nil
			}
			hashes := make([]Hash, len(batch))
			for i := range batch {
				hashes[i] = batch[i].hash
			}
			a, err := x.ask(ctx, &wirev1.BlobAsk{Body: &wirev1.BlobAsk_Have{Have: &wirev1.BlobHave{Hashes: packHashes(hashes)}}}, nil)
			if err != nil {
				return err
			}
			select {
			case p.asked <- asked{batch, a.GetHave()}:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// send sends what the peer lacks of each batch.
func (p *feeder) send(ctx context.Context, x *session) error {
	t := &transfer{s: p.s, x: x}
	for a := range p.asked {
		for i, n := range a.batch {
			if bit(a.have.GetPresent(), i) {
				continue
			}
			if err := t.put(ctx, n.enc); err != nil {
				return err
			}
		}
		if err := t.flush(ctx); err != nil {
			return err
		}
	}
	return nil
}
