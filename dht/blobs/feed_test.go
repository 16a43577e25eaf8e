package blobs

import (
	"bytes"
	"context"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// What is written goes to the others at the same time: the push of the root finds it there.
func TestAStreamTravelsWhileItIsWritten(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		ctx := context.Background()
		data := content(1, 5<<20)
		l, err := g.nodes[0].WriteStreamTo(ctx, bytes.NewReader(data), g.ids(0, 1, 2), 3)
		if err != nil {
			t.Fatal(err)
		}
		before := g.nodes[0].stats.sent.Load()
		acked, err := g.nodes[0].Push(ctx, l.Hash, g.ids(0, 1, 2), 3)
		if err != nil || len(acked) != 3 {
			t.Fatalf("%v %v", acked, err)
		}
		if sent := g.nodes[0].stats.sent.Load() - before; sent > 4 {
			t.Errorf("the push sent %d nodes once more", sent)
		}
		for _, nd := range g.nodes {
			nd.mustRead(l.Hash, data)
		}
		// A change in place costs few pages on this way, too.
		copy(data[1<<20:], "changed")
		before = g.nodes[0].stats.sent.Load()
		if _, err = g.nodes[0].WriteStreamTo(ctx, bytes.NewReader(data), g.ids(0, 1, 2), 3); err != nil {
			t.Fatal(err)
		}
		if sent := g.nodes[0].stats.sent.Load() - before; sent > 2*4 {
			t.Errorf("%d nodes were sent for a change of one page", sent)
		}
	})
}

// A holder that is gone or stands still holds nothing up while enough others take the stream, and what crashes in between is made good by the push.
func TestAStreamDoesNotWaitForThoseWhoDoNotTakeIt(t *testing.T) {
	inGrove(t, 4, func(t *testing.T, g *grove) {
		ctx := context.Background()
		g.net.Freeze(simID(2))
		g.net.Kill(simID(3))
		data := content(2, 24<<20)
		began := time.Now()
		l, err := g.nodes[0].WriteStreamTo(ctx, bytes.NewReader(data), g.ids(0, 1, 2, 3), 2)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("writing took %v", took)
		}
		g.nodes[1].crash(g)
		acked, err := g.nodes[0].Push(ctx, l.Hash, g.ids(0, 1, 2, 3), 2)
		if err != nil || !slices.Contains(acked, simID(1)) {
			t.Fatalf("%v %v", acked, err)
		}
		g.nodes[1].mustRead(l.Hash, data)
	})
}

// counting counts what is read of it.
type counting struct {
	io.Reader
	n atomic.Int64
}

func (c *counting) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// A state of any size is not held in memory for a holder that is slow and needed: the writer waits for it.
func TestAWriterHoldsLittleForASlowHolder(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		data := content(3, 64<<20)
		r := &counting{Reader: bytes.NewReader(data)}
		if _, err := g.nodes[0].WriteStreamTo(context.Background(), bytes.NewReader(data[:100<<10]), g.ids(0, 1), 2); err != nil {
			t.Fatal(err)
		}
		g.net.Freeze(simID(1)) // with its streams open: it may come back, and is waited for
		done := make(chan error, 1)
		go func() {
			_, err := g.nodes[0].WriteStreamTo(context.Background(), r, g.ids(0, 1), 2)
			done <- err
		}()
		time.Sleep(2 * time.Second) // of virtual time: all that can go on has
		if most := int64(feedQueue+feedAhead+4) * writeChunk; r.n.Load() > most {
			t.Errorf("%d bytes were read for a holder that takes nothing, at most %d may wait", r.n.Load(), most)
		}
		g.net.Thaw(simID(1))
		if err := <-done; err != nil || r.n.Load() != int64(len(data)) {
			t.Errorf("%d bytes, %v", r.n.Load(), err)
		}
	})
}

// slowStream is a link on which a frame takes 10 ms.
type slowStream struct {
	peers.Stream
	frames int
}

func (s *slowStream) Write(b []byte) (int, error) {
	s.frames++
	time.Sleep(10 * time.Millisecond)
	return len(b), nil
}

func (s *slowStream) SetWriteDeadline(time.Time) error { return nil }

// What has no hurry takes a quarter of a link, what has takes all of it.
func TestCopiesThatNobodyWaitsForTakeAShareOfTheLink(t *testing.T) {
	inGrove(t, 1, func(t *testing.T, g *grove) {
		page := Node{Kind: KindPage, Data: content(4, pageSize)}
		for _, c := range []struct {
			ctx  context.Context
			each time.Duration
		}{
			{context.Background(), 10 * time.Millisecond},
			{context.WithValue(context.Background(), gently{}, true), (1 + gentleShare) * 10 * time.Millisecond},
		} {
			link := &slowStream{}
			send := &transfer{s: g.nodes[0].Store, x: newSession(simID(1), link, time.Second)}
			began := time.Now()
			for range 100 {
				if err := send.put(c.ctx, page.encode()); err != nil {
					t.Fatal(err)
				}
			}
			if err := send.flush(c.ctx); err != nil {
				t.Fatal(err)
			}
			if took, want := time.Since(began), time.Duration(link.frames)*c.each; link.frames < 10 || took != want {
				t.Errorf("%d frames took %v, want %v", link.frames, took, want)
			}
		}
	})
}

// A gentle push ends like any other.
func TestAGentlePushArrives(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		data := content(5, 3<<20)
		l := g.nodes[0].write(data)
		acked, err := g.nodes[0].PushGently(context.Background(), l.Hash, g.ids(1), 1)
		if err != nil || len(acked) != 1 {
			t.Fatalf("%v %v", acked, err)
		}
		g.nodes[1].mustRead(l.Hash, data)
		frames := g.nodes[0].stats.gentle.Load()
		if frames < 3<<20/framePages {
			t.Errorf("%d frames went gently", frames)
		}
		l = g.nodes[0].write(content(6, 3<<20))
		if _, err := g.nodes[0].Push(context.Background(), l.Hash, g.ids(1), 1); err != nil || g.nodes[0].stats.gentle.Load() != frames {
			t.Errorf("a push that is waited for went gently: %v", err)
		}
	})
}

// Pages that are taken out of a message without copying are those that the message holds.
func FuzzPagesIn(f *testing.F) {
	pages := func(nodes ...[]byte) []byte {
		b, err := proto.Marshal(&wirev1.BlobAsk{Body: &wirev1.BlobAsk_Pages{Pages: &wirev1.BlobPages{Nodes: nodes}}})
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(pages([]byte("a"), nil, []byte("bc")))
	f.Add(pages())
	f.Add([]byte{8, 1, 26, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		nodes, ok := pagesIn(b)
		ask := &wirev1.BlobAsk{}
		err := proto.Unmarshal(b, ask)
		if ok && (err != nil || ask.GetId() != 0 || ask.GetPages() == nil || !slices.EqualFunc(nodes, ask.GetPages().GetNodes(), bytes.Equal)) {
			t.Errorf("%x: %x, and decoded %v %v", b, nodes, ask, err)
		}
	})
}
