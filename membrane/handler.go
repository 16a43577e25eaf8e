package membrane

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// ClientHandler serves clients on this node (the control API's calls, local programs): metadata x-coppice-target says whom they call. It
// is for NewServer.
func (r *Router) ClientHandler() grpc.StreamHandler {
	return func(_ any, ss grpc.ServerStream) error {
		method, md := incoming(ss)
		target := one(md, componentv1.MetaTarget)
		if target == "" {
			return status.Errorf(codes.InvalidArgument, "call %s: metadata %s is missing: want app/name or app/name-0", method, componentv1.MetaTarget)
		}
		c := routedFrom(md, target, "", method)
		delete(c.md, componentv1.MetaLow) // only who numbers its keys for good may tell others to forget
		delete(c.md, componentv1.MetaCaller)
		return r.serve(ss, c)
	}
}

// bindingHandler serves the component behind m: metadata x-binding names a required interface of it.
func (r *Router) bindingHandler(m *Membrane) grpc.StreamHandler {
	return func(_ any, ss grpc.ServerStream) error {
		method, md := incoming(ss)
		name := one(md, componentv1.MetaBinding)
		if name == "" {
			return status.Errorf(codes.Unimplemented, "call %s: this node has no such method, and metadata %s, which would name a binding, is missing", method, componentv1.MetaBinding)
		}
		b, ok := m.Lookup(name)
		if !ok || len(b.Targets) == 0 {
			return status.Errorf(codes.FailedPrecondition, "call %s: interface %q of %s is not bound; try: coppice bind %s %s TARGET", method, name, m.Instance(), m.Instance(), name)
		}
		target := b.Targets[0]
		if n := len(b.Targets); n > 1 {
			target = b.Targets[m.turn.Add(1)%uint64(n)]
		}
		c := routedFrom(md, target, "", method)
		c.md[componentv1.MetaCaller] = []string{m.Instance()}
		return r.serve(ss, c)
	}
}

// PeerHandler serves the routers of other nodes: x-coppice-target must be an instance of this node; there is no second hop. The transport
// has authenticated the caller as a member.
func (r *Router) PeerHandler() grpc.StreamHandler {
	return func(_ any, ss grpc.ServerStream) error {
		method, md := incoming(ss)
		err := r.servePeer(ss, method, md)
		var ce *callError
		if errors.As(err, &ce) {
			ss.SetTrailer(ce.encode(nil))
		}
		if err != nil {
			return statusOf(err).Err()
		}
		return nil
	}
}

func (r *Router) servePeer(ss grpc.ServerStream, method string, md metadata.MD) error {
	target, token, err := one(md, componentv1.MetaTarget), (*Token)(nil), error(nil)
	if v := one(md, componentv1.MetaToken); v != "" {
		t, perr := ParseToken(v)
		if perr != nil {
			return refuse(final, codes.InvalidArgument, "call %s: %s", method, perr)
		}
		token = &t
	}
	m, err := r.here(ss.Context(), target, one(md, componentv1.MetaShard))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(metadata.NewOutgoingContext(ss.Context(), passOn(md)))
	defer cancel()
	kind := m.Methods().Get(method).Kind
	if kind != KindUnary {
		return r.elsewhere(target, m, r.passStream(ctx, ss, m, method, kind, token))
	}
	u := &unaryCall{method: method, token: token}
	return r.elsewhere(target, m, passUnary(ss, u, func() error { return m.gate.unary(ctx, u) }))
}

func (r *Router) passStream(ctx context.Context, ss grpc.ServerStream, m *Membrane, method string, kind Kind, token *Token) error {
	cs, err := m.gate.stream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method, kind, token)
	if err != nil {
		return err
	}
	return pump(ss, cs)
}

// arrivalWait is how long a call from another node waits for the membrane of an instance that this node owns already: the claim is
// known a moment before the instance is there. Afterwards the caller asks again.
const arrivalWait = time.Second

// here finds the membrane of an instance on this node, or says where it is.
func (r *Router) here(ctx context.Context, target, shard string) (*Membrane, error) {
	if target == "" {
		return nil, refuse(final, codes.InvalidArgument, "metadata %s is missing", componentv1.MetaTarget)
	}
	var limit *time.Timer
	for {
		added := r.local.Load().changed // before the look, so that no change is missed
		if m := r.Local(target); m != nil {
			return m, nil
		}
		route, err := r.cfg.Directory.Resolve(target, shard)
		if err != nil {
			return nil, resolveError(target, err)
		}
		if route.Node != r.cfg.Self {
			ce := refuse(untouched, codes.Unavailable, "%s is not on this node", target)
			ce.moved = &Redirect{Token: route.Token, Node: route.Node}
			return nil, ce
		}
		if m := r.Local(route.Instance); m != nil {
			return m, nil
		}
		if limit == nil {
			limit = time.NewTimer(arrivalWait)
			defer limit.Stop()
		}
		select {
		case <-added:
			continue
		case <-limit.C:
		case <-ctx.Done():
		}
		return nil, refuse(untouched, codes.Unavailable, "%s is starting on this node", route.Instance)
	}
}

// elsewhere adds to a refusal where the instance is now, when this node knows better.
func (r *Router) elsewhere(target string, m *Membrane, err error) error {
	var ce *callError
	if !errors.As(err, &ce) || ce.outcome == final || ce.moved != nil {
		return err
	}
	route, rerr := r.cfg.Directory.Resolve(target, "")
	if rerr != nil || route.Node == r.cfg.Self || route.Token.Compare(m.Token()) <= 0 {
		return err
	}
	return &callError{st: ce.st, outcome: ce.outcome, moved: &Redirect{Token: route.Token, Node: route.Node}}
}

func incoming(ss grpc.ServerStream) (method string, md metadata.MD) {
	method, _ = grpc.MethodFromServerStream(ss) // always there in a handler
	md, _ = metadata.FromIncomingContext(ss.Context())
	return method, md
}

func one(md metadata.MD, key string) string {
	if v := md[key]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// serve runs a call of a client or a component.
func (r *Router) serve(ss grpc.ServerStream, c *routedCall) error {
	err := r.serveRouted(ss, c)
	if err != nil {
		return statusOf(err).Err()
	}
	return nil
}

func (r *Router) serveRouted(ss grpc.ServerStream, c *routedCall) error {
	methods, err := r.await(ss.Context(), c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	switch methods.Get(c.method).Kind {
	case KindUnary:
		u := &unaryCall{method: c.method}
		return passUnary(ss, u, func() error { return r.unary(ctx, c, u) })
	case KindServerStream:
		return r.serverStream(ctx, ss, c)
	}
	cs, err := r.openStream(ctx, c, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true})
	if err != nil {
		return err
	}
	return pump(ss, cs)
}

// await returns what is known of the target's methods as soon as somebody serves it.
func (r *Router) await(ctx context.Context, c *routedCall) (*Methods, error) {
	if p, err := r.find(c.target, c.shard, nil); err == nil {
		return p.methods(), nil
	}
	ctx, cancel := r.withDeadline(ctx)
	defer cancel()
	var m *Methods
	err := r.attempts(ctx, c.target, c.shard, func() bool { return true }, func(_ context.Context, p place) error {
		m = p.methods()
		return nil
	})
	return m, err
}

// passUnary receives one request, has it answered and sends the answer.
func passUnary(ss grpc.ServerStream, u *unaryCall, do func() error) error {
	req, reply := &Frame{}, &Frame{}
	defer req.Free()
	defer reply.Free()
	if err := ss.RecvMsg(req); err != nil {
		if errors.Is(err, io.EOF) {
			return refuse(final, codes.Internal, "call %s: no request came", u.method)
		}
		return err
	}
	u.req, u.reply = req, reply
	err := do()
	if len(u.header) > 0 {
		if herr := ss.SetHeader(u.header); herr != nil && err == nil {
			return herr
		}
	}
	if len(u.trailer) > 0 {
		ss.SetTrailer(u.trailer)
	}
	if err != nil {
		return err
	}
	return ss.SendMsg(reply)
}

// serverStream asks once and passes the answers on. Until the first answer it may be asked again elsewhere.
func (r *Router) serverStream(ctx context.Context, ss grpc.ServerStream, c *routedCall) error {
	req, first := &Frame{}, &Frame{}
	defer req.Free()
	defer first.Free()
	if err := ss.RecvMsg(req); err != nil {
		return err
	}
	var cs grpc.ClientStream
	var end error
	open, cancel := r.withDeadline(ctx)
	defer cancel()
	var known *Methods
	may := func() bool { return c.mayRepeat(known) }
	err := r.attempts(open, c.target, c.shard, may, func(_ context.Context, p place) error {
		known = p.methods()
		var err error
		if cs, err = r.openServerStream(ctx, open, c, p, req); err != nil {
			return err
		}
		end = cs.RecvMsg(first)
		if o, _ := outcomeOf(end); o != final {
			return end
		}
		return nil
	})
	if err != nil {
		return err
	}
	return drainDown(ss, cs, first, end)
}

func (r *Router) openServerStream(ctx, open context.Context, c *routedCall, p place, req *Frame) (grpc.ClientStream, error) {
	octx := c.outgoing(ctx, p)
	desc := &grpc.StreamDesc{ServerStreams: true}
	var cs grpc.ClientStream
	if p.local != nil {
		var err error
		if cs, err = p.local.gate.stream(octx, desc, c.method, KindServerStream, nil); err != nil {
			return nil, err
		}
	} else {
		conn, err := r.peer(open, p)
		if err != nil {
			return nil, err
		}
		s, err := conn.NewStream(octx, desc, c.method, callOptions...)
		if err != nil {
			return nil, unsent(octx, err)
		}
		cs = &peerStream{ClientStream: s}
	}
	if err := cs.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return cs, cs.CloseSend()
}

// drainDown passes the answers of an open stream on: first, which has been received with the error end, and what follows.
func drainDown(ss grpc.ServerStream, cs grpc.ClientStream, f *Frame, end error) error {
	if h, err := cs.Header(); err == nil && len(h) > 0 {
		if err := ss.SendHeader(h); err != nil {
			return err
		}
	}
	for end == nil {
		if err := ss.SendMsg(f); err != nil {
			return err
		}
		f.Free()
		end = cs.RecvMsg(f)
	}
	ss.SetTrailer(cs.Trailer())
	if errors.Is(end, io.EOF) {
		return nil
	}
	return end
}

// pump passes a stream on in both directions until the component ends it, or the caller goes away: the context of cs ends with ss's.
func pump(ss grpc.ServerStream, cs grpc.ClientStream) error {
	go pumpUp(ss, cs)
	if h, err := cs.Header(); err == nil && len(h) > 0 {
		if err := ss.SendHeader(h); err != nil {
			return err
		}
	}
	f := &Frame{}
	defer f.Free()
	return drainDown(ss, &headerSent{cs}, f, cs.RecvMsg(f))
}

// headerSent hides a header that was passed on already.
type headerSent struct{ grpc.ClientStream }

// Header implements grpc.ClientStream.
func (*headerSent) Header() (metadata.MD, error) { return nil, nil }

// pumpUp passes the caller's messages on. It ends when the handler of ss has returned at the latest.
func pumpUp(ss grpc.ServerStream, cs grpc.ClientStream) {
	f := &Frame{}
	defer f.Free()
	for {
		err := ss.RecvMsg(f)
		if errors.Is(err, io.EOF) {
			_ = cs.CloseSend() // never fails in grpc-go; the component's status tells anyway
			return
		}
		if err != nil {
			return // the caller is gone: its context ends, and with it the stream behind
		}
		err = cs.SendMsg(f)
		f.Free()
		if err != nil {
			return // the component has ended the stream: its status is on the way down
		}
	}
}
