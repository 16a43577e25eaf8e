package membrane

import (
	"context"
	"errors"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/coppice-project/coppice/internal/planted"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// unaryCall is one request with one answer, on its way through a gate or to another node. Request metadata is the context's outgoing
// metadata.
type unaryCall struct {
	method     string
	req, reply any    // *Frame or a protobuf message
	token      *Token // what the caller believes the instance's epoch to be; nil: nothing

	header, trailer metadata.MD // of the answer
}

var unaryDesc = &grpc.StreamDesc{}

// exchange sends the request on conn and receives the answer. Its errors say whether the request has left.
func (c *unaryCall) exchange(ctx context.Context, conn grpc.ClientConnInterface) error {
	s, err := conn.NewStream(ctx, unaryDesc, c.method, callOptions...)
	if err != nil {
		return unsent(ctx, err)
	}
	if err := s.SendMsg(c.req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	err = s.RecvMsg(c.reply)
	if h, herr := s.Header(); herr == nil {
		c.header = h
	}
	c.trailer = s.Trailer()
	if err != nil {
		return lost(ctx, err, c.header, c.trailer)
	}
	return nil
}

// unary passes one call through the gate.
func (g *gate) unary(ctx context.Context, c *unaryCall) (err error) {
	began := time.Now()
	p, err := g.enter(ctx)
	if err != nil {
		return err
	}
	defer g.exit(p)
	if err := g.checkToken(p, c.token); err != nil {
		return err
	}
	count := g.stats.begin(c.method)
	defer func() { g.stats.end(count, began, true, err != nil) }()
	err = c.exchange(ctx, p.backend.proc.Conn())
	if werr := g.settle(ctx, p, c.method, c.trailer); werr != nil {
		return werr
	}
	return err
}

// settle holds an answer back until the mark it depends on is committed, and says whether it may still be given.
func (g *gate) settle(ctx context.Context, p *phase, method string, trailer metadata.MD) error {
	var text string
	if v := trailer.Get(componentv1.MetaMark); len(v) > 0 {
		text = v[0]
		delete(trailer, componentv1.MetaMark)
	}
	return g.settleMark(ctx, p, method, text)
}

// settleMark is settle for a mark as its text came; "" there is none.
func (g *gate) settleMark(ctx context.Context, p *phase, method, text string) error {
	var mark uint64
	if text != "" {
		var err error
		if mark, err = strconv.ParseUint(text, 10, 64); err != nil {
			return refuse(final, codes.Internal, "the component sent the mark %q, not a number", text)
		}
		if err := g.awaitMark(ctx, p, mark); err != nil {
			return err
		}
	}
	if err := g.mayAnswer(p); err != nil {
		return err
	}
	p.backend.answered(method, mark)
	return nil
}

func (g *gate) awaitMark(ctx context.Context, p *phase, mark uint64) error {
	if !g.durable.Load() || planted.Bug("reply-before-commit") {
		return nil
	}
	return markError(p.backend.marks.wait(ctx, mark))
}

// stream opens a streaming call through the gate. It counts as inside only while it is opened; a stream of an unknown method, which may be a
// unary call, until its second message in either direction shows that it is none.
func (g *gate) stream(ctx context.Context, desc *grpc.StreamDesc, method string, kind Kind, token *Token) (grpc.ClientStream, error) {
	p, err := g.enter(ctx)
	if err != nil {
		return nil, err
	}
	if err := g.checkToken(p, token); err != nil {
		g.exit(p)
		return nil, err
	}
	cs, err := p.backend.proc.Conn().NewStream(ctx, desc, method, callOptions...)
	if err != nil {
		g.exit(p)
		return nil, unsent(ctx, err)
	}
	s := &gateStream{ClientStream: cs, gate: g, phase: p, ctx: ctx, method: method}
	count, began := g.stats.begin(method), time.Now()
	p.backend.streams.Add(1)
	s.over = func(failed bool) {
		p.backend.streams.Add(-1)
		g.stats.end(count, began, false, failed)
	}
	if kind != KindUnknown {
		s.uncount()
	}
	context.AfterFunc(cs.Context(), func() { s.finish(false) })
	return s, nil
}

// gateStream is an open stream behind the gate.
type gateStream struct {
	grpc.ClientStream
	gate   *gate
	phase  *phase
	method string
	over   func(failed bool)
	ctx    context.Context //nolint:containedctx // the caller's, as in every gRPC stream; the stream's own ends with its last message

	sent, received atomic.Int32
	uncounted      sync.Once
	finished       sync.Once
}

func (s *gateStream) uncount() { s.uncounted.Do(func() { s.gate.exit(s.phase) }) }

func (s *gateStream) finish(failed bool) {
	s.finished.Do(func() { s.over(failed) })
	s.uncount()
}

// SendMsg implements grpc.ClientStream.
func (s *gateStream) SendMsg(m any) error {
	if s.sent.Add(1) == 2 {
		s.uncount()
	}
	return s.ClientStream.SendMsg(m)
}

// RecvMsg implements grpc.ClientStream. Each message waits until what it may depend on is committed, and is asked on the way out whether the instance is still ours.
func (s *gateStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil {
		if s.received.Add(1) == 2 {
			s.uncount()
		}
		if err := s.gate.settleNow(s.ctx, s.phase); err != nil {
			s.finish(true)
			return err
		}
		return nil
	}
	// The status is the last thing that is told: like a unary answer it waits for its mark.
	trailer := s.ClientStream.Trailer()
	if werr := s.gate.settle(s.ctx, s.phase, s.method, trailer); werr != nil {
		s.finish(true)
		return werr
	}
	s.finish(!errors.Is(err, io.EOF))
	if errors.Is(err, io.EOF) {
		return err
	}
	header, herr := s.ClientStream.Header()
	if herr != nil {
		header = nil
	}
	if s.received.Load() > 0 {
		return err // what was delivered cannot be asked again
	}
	return lost(s.ctx, err, header, trailer)
}

// Trailer implements grpc.ClientStream: the mark is the gate's own.
func (s *gateStream) Trailer() metadata.MD {
	t := s.ClientStream.Trailer().Copy()
	delete(t, componentv1.MetaMark)
	return t
}
