package membrane

import (
	"context"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// routedCall is one call of a caller, over all its attempts.
type routedCall struct {
	target, shard, method string
	md                    metadata.MD // request metadata for the callee: the caller's own, without what belongs to one hop
	keyed                 bool        // it carries a key
	low                   func() string
}

// internal is the metadata that means one hop only and is never passed on by itself.
var internal = map[string]bool{
	componentv1.MetaCredential: true, componentv1.MetaBinding: true, componentv1.MetaTarget: true, componentv1.MetaToken: true,
	componentv1.MetaMark: true, componentv1.MetaMoved: true, MetaRetry: true,
}

// passOn copies the metadata that travels with a call. Transport headers are gRPC's own business at each hop.
func passOn(md metadata.MD) metadata.MD {
	out := make(metadata.MD, len(md)+3)
	for k, v := range md {
		if internal[k] || k == "content-type" || k == "user-agent" || k == "te" || strings.HasPrefix(k, ":") || strings.HasPrefix(k, "grpc-") {
			continue
		}
		out[k] = v
	}
	return out
}

// newRoutedCall takes the metadata from the outgoing context.
func newRoutedCall(ctx context.Context, target, shard, method string) *routedCall {
	md, _ := metadata.FromOutgoingContext(ctx)
	return routedFrom(md, target, shard, method)
}

func routedFrom(md metadata.MD, target, shard, method string) *routedCall {
	c := &routedCall{target: target, shard: shard, method: method, md: passOn(md)}
	if v := md.Get(componentv1.MetaShard); len(v) > 0 {
		c.shard = v[0]
	}
	c.keyed = len(c.md[componentv1.MetaKey]) > 0
	return c
}

// prepare makes a key up for a call that needs one, when the callee keeps answers by key.
func (r *Router) prepare(c *routedCall, m *Methods) (done func()) {
	if c.keyed || m == nil || !m.TxnCalls || m.Get(c.method).NoSideEffects {
		return nil
	}
	seq := r.keys.of(c.target)
	key, done := seq.take()
	c.keyed, c.low = true, seq.lowWater
	c.md[componentv1.MetaKey] = []string{key}
	return done
}

// mayRepeat: asking twice has the effect of asking once.
func (c *routedCall) mayRepeat(m *Methods) bool {
	if m == nil {
		return false
	}
	return m.Get(c.method).Idempotent || (c.keyed && m.TxnCalls)
}

// outgoing is the context of one attempt.
func (c *routedCall) outgoing(ctx context.Context, p place) context.Context {
	md := c.md
	if c.low != nil {
		c.md[componentv1.MetaLow] = []string{c.low()}
	}
	if p.local == nil {
		md = md.Copy()
		md[componentv1.MetaTarget] = []string{p.route.Instance}
		md[componentv1.MetaToken] = []string{p.route.Token.String()}
	}
	return metadata.NewOutgoingContext(ctx, md)
}

// unary makes a unary call, over as many attempts as its deadline and its safety allow.
func (r *Router) unary(ctx context.Context, c *routedCall, u *unaryCall) error {
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	var known *Methods
	var done func()
	defer func() {
		if done != nil {
			done()
		}
	}()
	may := func() bool { return c.mayRepeat(known) }
	return r.attempts(ctx, c.target, c.shard, may, func(ctx context.Context, p place) error {
		if m := p.methods(); m != nil {
			known = m
			if d := r.prepare(c, m); d != nil {
				done = d
			}
		}
		return r.attempt(ctx, c, u, p, may())
	})
}

func (r *Router) attempt(ctx context.Context, c *routedCall, u *unaryCall, p place, repeatable bool) error {
	u.header, u.trailer = nil, nil
	octx := c.outgoing(ctx, p)
	if p.local != nil {
		return p.local.gate.unary(octx, u)
	}
	if repeatable {
		var stop func()
		octx, _, stop = r.watchRoute(octx, c.target, c.shard, p)
		defer stop()
	}
	conn, err := r.peer(octx, p)
	if err != nil {
		return err
	}
	if err = u.exchange(octx, conn); err != nil {
		err = routeChanged(octx, decodeOutcome(err, u.trailer))
	}
	delete(u.trailer, MetaRetry)
	delete(u.trailer, componentv1.MetaMoved)
	return err
}

// openStream opens a streaming call as soon as there is a route. Nothing is repeated after the stream is open; the errors of its messages
// still say whether the component has seen it.
func (r *Router) openStream(ctx context.Context, c *routedCall, desc *grpc.StreamDesc) (grpc.ClientStream, error) {
	var s grpc.ClientStream
	open, cancel := r.withDeadline(ctx)
	defer cancel()
	err := r.attempts(open, c.target, c.shard, func() bool { return false }, func(_ context.Context, p place) error {
		octx := c.outgoing(ctx, p) // the stream lives as long as its caller wants, not as long as opening may take
		if p.local != nil {
			var err error
			s, err = p.local.gate.stream(octx, desc, c.method, p.methods().Get(c.method).Kind, nil)
			return err
		}
		conn, err := r.peer(open, p)
		if err != nil {
			return err
		}
		cs, err := conn.NewStream(octx, desc, c.method, callOptions...)
		if err != nil {
			return unsent(octx, err)
		}
		s = &peerStream{ClientStream: cs}
		return nil
	})
	return s, err
}

// peerStream is a stream through the gate of another node.
type peerStream struct {
	grpc.ClientStream
}

// RecvMsg implements grpc.ClientStream; the status of a refused call says so.
func (s *peerStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil {
		return nil
	}
	return decodeOutcome(err, s.ClientStream.Trailer())
}

// Trailer implements grpc.ClientStream.
func (s *peerStream) Trailer() metadata.MD {
	t := s.ClientStream.Trailer().Copy()
	delete(t, MetaRetry)
	delete(t, componentv1.MetaMoved)
	return t
}
