package membrane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Route is where a target is served.
type Route struct {
	Instance string // app/name-0
	Node     string // node id
	Token    Token
	// Methods is what is known of the instance's calls, from its artifact's description. Without it calls to another node are passed on as
	// streams: no retry after they have left, no keys.
	Methods *Methods
}

// Directory knows where instances are served. It answers from local knowledge: no call waits for it.
type Directory interface {
	// Resolve returns the route of app/name or app/name-0. Errors wrap ErrUnknownTarget or ErrNeedsShard, which fail the call, or anything
	// else (ErrNoOwner), on which the call is held until Changed or its deadline.
	Resolve(target, shardKey string) (Route, error)
	// Changed returns a channel that is closed at the next change of the target's route after the call.
	Changed(target string) <-chan struct{}
}

// Peers are the connections to other nodes.
type Peers interface {
	// Conn returns the connection to a node's inbound gate (Router.PeerHandler). It does not wait for a dead node longer than ctx.
	Conn(ctx context.Context, node string) (grpc.ClientConnInterface, error)
	// HTTP returns the same for HTTP interfaces (Router.PeerHTTP).
	HTTP(ctx context.Context, node string) (http.RoundTripper, error)
}

// RouterConfig of a Router.
type RouterConfig struct {
	Self string // this node's id
	// Caller begins the idempotency keys that this router makes up. It must never be used twice: node id and boot, for example.
	Caller    string
	Directory Directory
	Peers     Peers         // nil: this node only
	Deadline  time.Duration // of calls that have none; default 10 s
	Log       *slog.Logger
}

// Router is the caller's side of the gates of one node: it finds where a target is served, and keeps a call alive over the death,
// replacement or move of its instance when that is safe.
type Router struct {
	cfg   RouterConfig
	keys  sequences
	stats RouterStats

	buffers bufferPool // of http bodies

	mu    sync.Mutex // serialises changes of local
	local atomic.Pointer[locals]
}

// locals are the membranes of this node, and the news of their change.
type locals struct {
	byInstance map[string]*Membrane
	changed    chan struct{}
}

// RouterStats counts what the router did, since it was made.
type RouterStats struct {
	Calls, Retried, Redirected, Waited, Failed atomic.Uint64
}

const defaultDeadline = 10 * time.Second

// NewRouter returns a router without local instances.
func NewRouter(cfg RouterConfig) *Router {
	if cfg.Deadline <= 0 {
		cfg.Deadline = defaultDeadline
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Router{cfg: cfg, keys: sequences{base: cfg.Caller, byTarget: map[string]*sequence{}}}
	r.local.Store(&locals{map[string]*Membrane{}, make(chan struct{})})
	return r
}

// Stats returns the counters, which go on counting.
func (r *Router) Stats() *RouterStats { return &r.stats }

// Add makes a membrane reachable by its instance's name.
func (r *Router) Add(m *Membrane) {
	r.edit(func(local map[string]*Membrane) { local[m.Instance()] = m })
}

// Remove takes it out again; another one that was added under its name stays. Its gate should be closed first, so that calls in it know.
func (r *Router) Remove(m *Membrane) {
	r.edit(func(local map[string]*Membrane) {
		if local[m.Instance()] == m {
			delete(local, m.Instance())
		}
	})
}

func (r *Router) edit(f func(map[string]*Membrane)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	old := r.local.Load()
	next := &locals{maps.Clone(old.byInstance), make(chan struct{})}
	f(next.byInstance)
	r.local.Store(next)
	close(old.changed)
}

// Local returns the membrane of an instance on this node; nil when there is none.
func (r *Router) Local(instance string) *Membrane { return r.local.Load().byInstance[instance] }

// place is where one attempt goes.
type place struct {
	route Route
	local *Membrane // nil: to route.Node
}

func (p place) methods() *Methods {
	if p.local != nil {
		if m := p.local.Methods(); m != nil {
			return m
		}
	}
	return p.route.Methods
}

// find resolves a target, or takes the hint of a redirect that is newer than what the directory knows.
func (r *Router) find(target, shard string, hint *Route) (place, error) {
	route, err := r.cfg.Directory.Resolve(target, shard)
	if hint != nil && (err != nil || hint.Token.Compare(route.Token) > 0) {
		methods := route.Methods
		route, err = *hint, nil
		if route.Methods == nil {
			route.Methods = methods
		}
	}
	if err != nil {
		return place{}, resolveError(target, err)
	}
	if route.Node != r.cfg.Self {
		if r.cfg.Peers == nil {
			return place{}, refuse(untouched, codes.Unavailable, "%s is served by another node and there is no connection to it", target)
		}
		return place{route: route}, nil
	}
	m := r.Local(route.Instance)
	if m == nil {
		return place{}, refuse(untouched, codes.Unavailable, "%s is starting on this node", route.Instance)
	}
	return place{route: route, local: m}, nil
}

func resolveError(target string, err error) error {
	switch {
	case errors.Is(err, ErrUnknownTarget):
		return refuse(final, codes.NotFound, "%s: %s", target, err)
	case errors.Is(err, ErrNeedsShard):
		return refuse(final, codes.InvalidArgument, "%s: %s", target, err)
	}
	return refuse(untouched, codes.Unavailable, "%s: %s", target, err)
}

// backoff between attempts when nothing tells that the world has changed.
const (
	firstPause = 2 * time.Millisecond
	maxPause   = 100 * time.Millisecond
)

// attempts runs try until it succeeds, fails for good, or ctx ends. may says whether a call in doubt may be asked again; it is asked after
// the first try, when the methods are known.
func (r *Router) attempts(ctx context.Context, target, shard string, may func() bool, try func(ctx context.Context, p place) error) error {
	r.stats.Calls.Add(1)
	var hint *Route
	var last error
	pause := firstPause
	for n := 0; ; n++ {
		if n == 1 {
			r.stats.Retried.Add(1)
		}
		changed, added := r.cfg.Directory.Changed(target), r.local.Load().changed // before the look, so that no change is missed
		p, err := r.find(target, shard, hint)
		if err == nil {
			err = try(ctx, p)
			if err == nil {
				return nil
			}
		}
		o, moved := outcomeOf(err)
		if o == final || (o == doubt && !may()) {
			r.stats.Failed.Add(1)
			return err
		}
		last = err
		if next := redirect(p, hint, moved); next != nil {
			hint = next
			r.stats.Redirected.Add(1)
			continue
		}
		if err := r.pause(ctx, changed, added, pause); err != nil {
			r.stats.Failed.Add(1)
			return refuse(o, statusOf(err).Code(), "%s; last: %s", giveUp(err), statusOf(last).Message())
		}
		pause = min(2*pause, maxPause)
	}
}

func giveUp(err error) string {
	if errors.Is(err, context.Canceled) {
		return "given up by the caller"
	}
	return "the deadline passed while the call waited for a component that serves it"
}

// redirect turns a moved answer into the next attempt's hint, when it is news.
func redirect(p place, hint *Route, moved *Redirect) *Route {
	if moved == nil || moved.Token.Compare(p.route.Token) < 0 {
		return nil
	}
	if moved.Node == p.route.Node {
		return nil
	}
	if hint != nil && moved.Token.Compare(hint.Token) <= 0 {
		return nil
	}
	return &Route{Instance: p.route.Instance, Node: moved.Node, Token: moved.Token, Methods: p.route.Methods}
}

func (r *Router) pause(ctx context.Context, changed, added <-chan struct{}, d time.Duration) error {
	r.stats.Waited.Add(1)
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-changed:
		return nil
	case <-added:
		return nil
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// errRouteChanged ends an attempt whose instance is served elsewhere meanwhile.
var errRouteChanged = errors.New("it is served elsewhere meanwhile")

// watchRoute returns a context that ends when the target's route is no longer p's: an attempt at a node that has fallen silent would
// otherwise last until the caller's deadline. settle ends the watching and leaves the context alone; stop ends both.
func (r *Router) watchRoute(ctx context.Context, target, shard string, p place) (_ context.Context, settle, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	settled := make(chan struct{})
	settle = sync.OnceFunc(func() { close(settled) })
	go func() {
		for {
			changed := r.cfg.Directory.Changed(target)
			route, err := r.cfg.Directory.Resolve(target, shard)
			if err == nil && route.Token.Compare(p.route.Token) >= 0 && (route.Node != p.route.Node || route.Instance != p.route.Instance) {
				cancel(errRouteChanged)
				return
			}
			select {
			case <-changed:
			case <-settled:
				return
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, settle, func() { settle(); cancel(nil) }
}

// routeChanged turns the failure of an attempt that watchRoute ended into one that may be tried elsewhere.
func routeChanged(ctx context.Context, err error) error {
	if !errors.Is(context.Cause(ctx), errRouteChanged) {
		return err
	}
	if o, _ := outcomeOf(err); o == untouched {
		return err
	}
	return refuse(doubt, codes.Unavailable, "%s (%s)", errRouteChanged, status.Convert(err).Message())
}

func (r *Router) peer(ctx context.Context, p place) (grpc.ClientConnInterface, error) {
	conn, err := r.cfg.Peers.Conn(ctx, p.route.Node)
	if err != nil {
		return nil, refuse(untouched, codes.Unavailable, "connect to node %s: %s", p.route.Node, err)
	}
	return conn, nil
}

// withDeadline gives a call the default deadline when it has none.
func (r *Router) withDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, r.cfg.Deadline)
}

// Conn returns a connection to a target, for generated stubs in this process. shardKey may be empty; the metadata x-shard-key of a call
// overrides it. Codecs and call options other than Header and Trailer are not honoured.
func (r *Router) Conn(target, shardKey string) grpc.ClientConnInterface {
	return &routedConn{r: r, target: target, shard: shardKey}
}

type routedConn struct {
	r             *Router
	target, shard string
}

// Invoke implements grpc.ClientConnInterface.
func (c *routedConn) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	call := newRoutedCall(ctx, c.target, c.shard, method)
	u := &unaryCall{method: method, req: args, reply: reply}
	err := c.r.unary(ctx, call, u)
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.HeaderCallOption:
			*o.HeaderAddr = u.header
		case grpc.TrailerCallOption:
			*o.TrailerAddr = u.trailer
		}
	}
	if err != nil {
		return statusOf(err).Err()
	}
	return nil
}

// NewStream implements grpc.ClientConnInterface.
func (c *routedConn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	if !desc.ClientStreams && !desc.ServerStreams {
		return nil, status.Error(codes.Unimplemented, fmt.Sprintf("%s: use Invoke for unary calls", method))
	}
	s, err := c.r.openStream(ctx, newRoutedCall(ctx, c.target, c.shard, method), desc)
	if err != nil {
		return nil, statusOf(err).Err()
	}
	return s, nil
}
