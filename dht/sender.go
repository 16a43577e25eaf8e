package dht

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protodelim"
)

// Limits of the message sender.
const (
	idleStreams = 4                // kept per peer
	idleFor     = 30 * time.Second // the other side drops an idle stream after a minute
	maxKadReply = network.MessageSizeMax
)

// errReadRepair refuses kad-dht's own write-back after a lookup. Replicas are kept by package records, which counts acknowledgements
// and collects tombstones; copies strewn beside its replica set would outlive a deletion.
var errReadRepair = errors.New("kad-dht does not write records back: replicas are repaired by their own protocol")

// sender is kad-dht's message sender with a deadline of its own for each request. The library's waits 10 s, twice, one request at a
// time per peer, so that four silent peers of twenty stall a lookup for 39 s.
type sender struct {
	peers    *peers.Libp2p
	protos   []protocol.ID
	deadline time.Duration

	mu   sync.Mutex // guards idle
	idle map[peer.ID][]*kadStream
}

type kadStream struct {
	network.Stream
	r    *bufio.Reader
	used time.Time
}

var _ kadpb.MessageSenderWithDisconnect = (*sender)(nil)

func newSender(p *peers.Libp2p, protos []protocol.ID, deadline time.Duration) *sender {
	return &sender{peers: p, protos: protos, deadline: deadline, idle: map[peer.ID][]*kadStream{}}
}

// SendRequest implements pb.MessageSender. A request on a reused stream that turns out stale is sent once more on a new one; requests
// of kad-dht are idempotent.
func (s *sender) SendRequest(ctx context.Context, to peer.ID, m *kadpb.Message) (*kadpb.Message, error) {
	if m.GetType() == kadpb.Message_PUT_VALUE {
		return nil, errReadRepair
	}
	if err := s.peers.Connect(ctx, to); err != nil { // a dial has its own, longer deadline
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.deadline)
	defer cancel()
	resp := new(kadpb.Message)
	if st := s.take(to); st != nil {
		err := s.roundTrip(ctx, st, m, resp)
		if err == nil {
			s.put(to, st)
			trailOf(ctx).answered(to, resp)
			return resp, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("ask %s: %w", to, err)
		}
		resp.Reset()
	}
	st, err := s.open(ctx, to)
	if err != nil {
		return nil, err
	}
	if err := s.roundTrip(ctx, st, m, resp); err != nil {
		return nil, fmt.Errorf("ask %s: %w", to, err)
	}
	s.put(to, st)
	trailOf(ctx).answered(to, resp)
	return resp, nil
}

// SendMessage implements pb.MessageSender: one message, no answer.
func (s *sender) SendMessage(ctx context.Context, to peer.ID, m *kadpb.Message) error {
	if err := s.peers.Connect(ctx, to); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.deadline)
	defer cancel()
	st, err := s.open(ctx, to)
	if err != nil {
		return err
	}
	if err := s.write(ctx, st, m); err != nil {
		abandon(st)
		return fmt.Errorf("tell %s: %w", to, err)
	}
	return st.Close()
}

// OnDisconnect implements pb.MessageSenderWithDisconnect: the peer's streams are gone.
func (s *sender) OnDisconnect(_ context.Context, p peer.ID) {
	s.mu.Lock()
	gone := s.idle[p]
	delete(s.idle, p)
	s.mu.Unlock()
	for _, st := range gone {
		abandon(st)
	}
}

func (s *sender) open(ctx context.Context, to peer.ID) (*kadStream, error) {
	st, err := s.peers.OpenAny(ctx, to, s.protos...)
	if err != nil {
		return nil, err
	}
	return &kadStream{Stream: st, r: bufio.NewReader(st)}, nil
}

// roundTrip leaves the stream reset when it fails.
func (s *sender) roundTrip(ctx context.Context, st *kadStream, m, resp *kadpb.Message) error {
	stop := context.AfterFunc(ctx, func() { abandon(st) })
	err := s.write(ctx, st, m)
	if err == nil {
		err = protodelim.UnmarshalOptions{MaxSize: maxKadReply}.UnmarshalFrom(st.r, resp)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		abandon(st)
		if ctx.Err() != nil {
			return fmt.Errorf("%w (%w)", ctx.Err(), err)
		}
	}
	return err
}

func (s *sender) write(ctx context.Context, st *kadStream, m *kadpb.Message) error {
	if dl, ok := ctx.Deadline(); ok {
		if err := st.SetWriteDeadline(dl); err != nil {
			return err
		}
	}
	var b bytes.Buffer
	if _, err := protodelim.MarshalTo(&b, m); err != nil {
		return err
	}
	_, err := st.Write(b.Bytes())
	return err
}

// take returns an idle stream to a peer, or nil.
func (s *sender) take(to peer.ID) *kadStream {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		list := s.idle[to]
		if len(list) == 0 {
			return nil
		}
		st := list[len(list)-1]
		s.idle[to] = list[:len(list)-1]
		if time.Since(st.used) < idleFor {
			return st
		}
		abandon(st)
	}
}

func (s *sender) put(to peer.ID, st *kadStream) {
	st.used = time.Now()
	s.mu.Lock()
	keep := len(s.idle[to]) < idleStreams && !st.Conn().IsClosed()
	if keep {
		s.idle[to] = append(s.idle[to], st)
	}
	s.mu.Unlock()
	if !keep {
		abandon(st)
	}
}

// trail follows one lookup: how many requests one after the other led to each peer, and who returned which value.
type trail struct {
	mu     sync.Mutex // guards what follows
	depth  map[peer.ID]int
	values map[peer.ID][]byte
}

type trailKey struct{}

// withTrail starts a trail at the peers that the lookup starts from.
func withTrail(ctx context.Context, seeds []peer.ID) (context.Context, *trail) {
	t := &trail{depth: map[peer.ID]int{}, values: map[peer.ID][]byte{}}
	for _, id := range seeds {
		t.depth[id] = 1
	}
	return context.WithValue(ctx, trailKey{}, t), t
}

// trailOf returns the lookup's trail; nil, whose methods do nothing, for requests outside of one.
func trailOf(ctx context.Context) *trail {
	t, _ := ctx.Value(trailKey{}).(*trail)
	return t
}

func (t *trail) answered(by peer.ID, m *kadpb.Message) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	d, ok := t.depth[by]
	if !ok { // came into our own table meanwhile
		d = 1
		t.depth[by] = d
	}
	for _, c := range m.GetCloserPeers() {
		id := peer.ID(c.GetId())
		if _, ok := t.depth[id]; !ok {
			t.depth[id] = d + 1
		}
	}
	if rec := m.GetRecord(); rec != nil && bytes.Equal(rec.GetKey(), m.GetKey()) {
		t.values[by] = rec.GetValue()
	}
}

// hops returns the number of requests in a row that reached a peer.
func (t *trail) hops(id peer.ID) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d, ok := t.depth[id]; ok {
		return d
	}
	return 1
}

// copies counts the peers that returned this value and the fewest hops to one of them (0 when none).
func (t *trail) copies(value []byte) (n, hops int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, v := range t.values {
		if bytes.Equal(v, value) {
			n++
			if d := t.depth[id]; hops == 0 || d < hops {
				hops = d
			}
		}
	}
	return n, hops
}
