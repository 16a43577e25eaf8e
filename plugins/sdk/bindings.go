package sdk

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/state"
)

// Binding is a required interface: the connection that generated client stubs are made with. Where it leads is the manifest's and the operator's
// business and may change at any time; a call always goes where it leads then.
//
// Calls made with the context of a call, request or Update carry an idempotency key, so that a call that is done again after a crash does not act
// twice: see the package documentation, "Calling others".
type Binding struct {
	name     string
	service  string
	optional bool
	in       atomic.Pointer[Instance]
	direct   atomic.Pointer[grpc.ClientConnInterface]

	mu    sync.Mutex // guards state
	state *componentv1.BindingState
}

// Require declares a required interface that must be bound: name is the component's own word for it, service the full name of the gRPC service.
func Require(name, service string) *Binding { return &Binding{name: name, service: service} }

// Wants declares a required interface that may be left unbound; see Bound.
func Wants(name, service string) *Binding {
	return &Binding{name: name, service: service, optional: true}
}

// Use connects the binding without a node, for tests.
func (b *Binding) Use(conn grpc.ClientConnInterface) { b.direct.Store(&conn) }

// Bound reports whether the binding leads anywhere, as far as the node has told.
func (b *Binding) Bound() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.direct.Load() != nil || b.state.GetBound()
}

func (in *Instance) bindingChanged(state *componentv1.BindingState) error {
	for _, b := range in.comp.Requires {
		if b.name == state.GetName() {
			b.mu.Lock()
			b.state = state
			b.mu.Unlock()
			return nil
		}
	}
	return status.Errorf(codes.InvalidArgument, "no required interface %q", state.GetName())
}

// conn returns the connection and its instance, which is nil for a test's.
func (b *Binding) conn() (grpc.ClientConnInterface, *Instance, error) {
	if c := b.direct.Load(); c != nil {
		return *c, b.in.Load(), nil
	}
	in := b.in.Load()
	if in == nil {
		return nil, nil, status.Errorf(codes.FailedPrecondition, "binding %q: not part of a component: list it in Component.Requires", b.name)
	}
	if in.node == nil {
		return nil, nil, status.Errorf(codes.Unavailable, "binding %q: not started by a node (no $%s), so nobody can route calls", b.name, componentv1.EnvNodeSocket)
	}
	return in.node.conn, in, nil
}

const (
	callAttempts = 6                     // of one call that may be repeated
	firstBackoff = 20 * time.Millisecond // doubles with each attempt
	maxReused    = 1000                  // keys of an abandoned past that one call skips over
)

// Invoke implements grpc.ClientConnInterface.
func (b *Binding) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	conn, in, err := b.conn()
	if err != nil {
		return err
	}
	md := b.metadata(ctx)
	level := idempotency(method)
	for range maxReused {
		numbered := false
		if level != descriptorpb.MethodOptions_NO_SIDE_EFFECTS && len(md.Get(componentv1.MetaKey)) == 0 {
			if numbered, err = stampKey(ctx, in, b.name, method, md); err != nil {
				return err
			}
		}
		repeatable := level != descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN || len(md.Get(componentv1.MetaKey)) > 0
		var trailer metadata.MD
		err := invoke(metadata.NewOutgoingContext(ctx, md), conn, repeatable, method, args, reply, append(opts, grpc.Trailer(&trailer)))
		if !numbered || status.Code(err) != codes.Aborted || len(trailer.Get(componentv1.MetaKeyReused)) == 0 {
			return err
		}
		// The number belongs to a call of a past that was never committed. That call will not be made again: go on with the next number.
		md.Delete(componentv1.MetaKey)
		md.Delete(componentv1.MetaLow)
	}
	return status.Errorf(codes.Aborted, "binding %q: %d keys in a row were used for other requests", b.name, maxReused)
}

// invoke makes the call, and makes it again while nobody is there to take it and repeating is safe.
func invoke(ctx context.Context, conn grpc.ClientConnInterface, repeatable bool, method string, args, reply any, opts []grpc.CallOption) error {
	wait := firstBackoff
	for attempt := 1; ; attempt++ {
		err := conn.Invoke(ctx, method, args, reply, opts...)
		if status.Code(err) != codes.Unavailable || !repeatable || attempt == callAttempts {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return err
		}
		wait *= 2
	}
}

// NewStream implements grpc.ClientConnInterface. Streams carry no key and are not repeated.
func (b *Binding) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	conn, _, err := b.conn()
	if err != nil {
		return nil, err
	}
	return conn.NewStream(metadata.NewOutgoingContext(ctx, b.metadata(ctx)), desc, method, opts...)
}

// metadata is what goes with every call through the binding: the author's own, the binding's name, the trace.
func (b *Binding) metadata(ctx context.Context) metadata.MD {
	md, ok := metadata.FromOutgoingContext(ctx)
	if !ok {
		md = metadata.MD{}
	}
	incoming, _ := metadata.FromIncomingContext(ctx)
	for _, key := range []string{"traceparent", "tracestate"} {
		if v := incoming.Get(key); len(v) > 0 && len(md.Get(key)) == 0 {
			md.Set(key, v...)
		}
	}
	md.Set(componentv1.MetaBinding, b.name)
	return md
}

// WithKey gives the calls made with the returned context an idempotency key of the author's choice: one context for one call.
func WithKey(ctx context.Context, key string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, componentv1.MetaKey, key)
}

// stampKey adds the key of a call that may act.
//
// On behalf of a call that has a key itself, the new key is derived from that one: the same call done again, by this or another instance of the
// component and in whatever order, makes the same calls with the same keys. The caller's low-water mark carries over, for who will not repeat a call will
// not cause its consequences to be repeated. On the component's own account (Update, or a call without a key) the key is "<instance>/<n>" with n from
// the state. Elsewhere there is no key, and the gate adds one for its own repeats.
func stampKey(ctx context.Context, in *Instance, binding, method string, md metadata.MD) (numbered bool, err error) {
	c := callOf(ctx)
	if c == nil || in == nil {
		return false, nil
	}
	if c.key != "" {
		key, low := c.derive(in.ComponentName(), binding, method)
		md.Set(componentv1.MetaKey, key)
		if low > 0 {
			md.Set(componentv1.MetaLow, strconv.FormatUint(low, 10))
		}
		return false, nil
	}
	if c.tx == nil || c.tx.ReadOnly() {
		return false, nil
	}
	if err := in.store.Begin(ctx, c.tx); err != nil {
		return false, stateError(err)
	}
	n, err := c.tx.NextCall()
	if err != nil {
		return false, stateError(err)
	}
	md.Set(componentv1.MetaKey, in.Name()+"/"+strconv.FormatUint(n, 10))
	md.Set(componentv1.MetaLow, strconv.FormatUint(in.store.CallLow(), 10))
	return true, nil
}

// derive makes the key of the next call to a method on behalf of this one. Calls to the same method are told apart by their order, so they must not be
// made side by side; those that must use WithKey.
func (c *call) derive(component, binding, method string) (key string, low uint64) {
	short := method[strings.LastIndexByte(method, '/')+1:]
	what := binding + "." + short
	c.mu.Lock()
	i := c.asked[what]
	if c.asked == nil {
		c.asked = map[string]int{}
	}
	c.asked[what] = i + 1
	c.mu.Unlock()
	if i > 0 {
		what = fmt.Sprintf("%s.%d", what, i)
	}
	if caller, n, ok := state.Numbered(c.key); ok {
		return fmt.Sprintf("%s:%s:%s/%d", caller, component, what, n), c.low
	}
	return fmt.Sprintf("%s:%s:%s", c.key, component, what), 0
}

// idempotency looks up what the called method promises.
func idempotency(method string) descriptorpb.MethodOptions_IdempotencyLevel {
	name := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(method, "/"), "/", "."))
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
	if err != nil {
		return descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN
	}
	options, ok := d.Options().(*descriptorpb.MethodOptions)
	if !ok {
		return descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN
	}
	return options.GetIdempotencyLevel()
}
