package membrane

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// maxReplay is the largest request body that is kept to ask again, in bytes.
const maxReplay = 1 << 20

// HTTP returns a handler that passes requests on to a target, wherever it is served. X-Shard-Key chooses among several instances.
// Requests that may be repeated without harm (safe methods; others by their Idempotency-Key, which is made up when there is none and the
// component keeps answers by key) survive the death, replacement and move of the instance within their deadline.
func (r *Router) HTTP(target string) http.Handler {
	return r.HTTPAs(target, "")
}

// HTTPAs is HTTP for requests of another instance, named to the callee in X-Coppice-Caller.
func (r *Router) HTTPAs(target, caller string) http.Handler {
	return newProxy(&routeTransport{r, target, caller}, &r.buffers, func(w http.ResponseWriter, _ *http.Request, err error) { httpError(w, err) })
}

// Transport is what HTTP passes requests on with: for requests of the node's own, such as an upgrade to another protocol.
func (r *Router) Transport(target string) http.RoundTripper { return &routeTransport{r, target, ""} }

type routeTransport struct {
	r      *Router
	target string
	caller string
}

// RoundTrip implements http.RoundTripper.
func (t *routeTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, stopClock, cancel := openDeadline(req.Context(), t.r.cfg.Deadline)
	c, err := t.prepare(req.Clone(ctx))
	if err != nil {
		cancel()
		return nil, err
	}
	var resp *http.Response
	err = t.r.attempts(ctx, t.target, c.shard, c.mayRepeat, func(ctx context.Context, p place) error {
		var err error
		resp, err = c.attempt(ctx, p)
		return err
	})
	stopClock() // a body may take as long as it likes
	if err != nil {
		c.finish()
		cancel()
		return nil, err
	}
	resp.Body = keepWriter(resp.Body, sync.OnceFunc(func() { c.finish(); cancel() }))
	return resp, nil
}

// openDeadline bounds the time until the response begins, when the request has no deadline of its own.
func openDeadline(parent context.Context, d time.Duration) (ctx context.Context, stop, cancel func()) {
	ctx, end := context.WithCancelCause(parent)
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}, func() { end(nil) }
	}
	t := time.AfterFunc(d, func() { end(context.DeadlineExceeded) })
	stop = func() { t.Stop() }
	return ctx, stop, func() { stop(); end(nil) }
}

// httpCall is one request over all its attempts.
type httpCall struct {
	t       *routeTransport
	req     *http.Request
	body    []byte // kept to ask again
	replay  bool   // body is all of it
	sent    bool   // a body that is not kept was handed to an attempt
	safe    bool   // GET and its like
	shard   string
	keyed   bool
	seq     *sequence
	done    func()
	methods *Methods
}

func (t *routeTransport) prepare(req *http.Request) (*httpCall, error) {
	c := &httpCall{t: t, req: req, shard: req.Header.Get("X-Shard-Key")}
	stripInternal(req.Header)
	req.Header.Del(componentv1.HeaderLow) // only who numbers its keys for good may tell others to forget
	req.Header.Del(componentv1.HeaderCaller)
	if t.caller != "" {
		req.Header.Set(componentv1.HeaderCaller, t.caller)
	}
	switch req.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		c.safe = true
	}
	c.keyed = req.Header.Get(componentv1.HeaderKey) != ""
	if req.Body == nil || req.Body == http.NoBody {
		c.replay = true
		return c, nil
	}
	if strings.EqualFold(req.Header.Get("Connection"), "upgrade") || req.ContentLength > maxReplay {
		return c, nil
	}
	b, err := io.ReadAll(io.LimitReader(req.Body, maxReplay+1))
	if err != nil {
		return nil, refuse(final, codes.InvalidArgument, "read the request: %s", err)
	}
	c.body = b
	if len(b) <= maxReplay {
		c.replay = true
		return c, nil
	}
	req.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(b), req.Body), req.Body}
	return c, nil
}

func (c *httpCall) finish() {
	if c.done != nil {
		c.done()
		c.done = nil
	}
}

func (c *httpCall) mayRepeat() bool {
	return c.replay && (c.safe || (c.keyed && c.methods != nil && c.methods.TxnCalls))
}

// attempt asks once. A response that says the component has not seen the request, or may have, is an error.
func (c *httpCall) attempt(ctx context.Context, p place) (*http.Response, error) {
	if m := p.methods(); m != nil {
		c.methods = m
		if !c.safe && !c.keyed && m.TxnCalls {
			c.seq = c.t.r.keys.of(c.t.target)
			var key string
			key, c.done = c.seq.take()
			c.keyed = true
			c.req.Header.Set(componentv1.HeaderKey, key)
		}
	}
	if c.seq != nil {
		c.req.Header.Set(componentv1.HeaderLow, c.seq.lowWater())
	}
	if !c.replay {
		if c.sent {
			return nil, refuse(final, codes.Unavailable, "the instance was not reached at the first try, and the request is too large to be kept for a second")
		}
		c.sent = true
	}
	if p.local != nil {
		return (&gateTransport{p.local}).RoundTrip(c.request(ctx))
	}
	if !c.mayRepeat() {
		return c.remote(ctx, p)
	}
	ctx, settle, stop := c.t.r.watchRoute(ctx, c.t.target, c.shard, p)
	resp, err := c.remote(ctx, p)
	if err != nil {
		err = routeChanged(ctx, err)
		stop()
		return nil, err
	}
	settle() // the answer has begun: it is read to its end, wherever the instance goes
	resp.Body = keepWriter(resp.Body, stop)
	return resp, nil
}

func (c *httpCall) request(ctx context.Context) *http.Request {
	req := c.req.Clone(ctx)
	if c.replay && c.body != nil {
		req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(c.body)), int64(len(c.body))
	}
	return req
}

func (c *httpCall) remote(ctx context.Context, p place) (*http.Response, error) {
	rt, err := c.t.r.cfg.Peers.HTTP(ctx, p.route.Node)
	if err != nil {
		return nil, refuse(untouched, codes.Unavailable, "connect to node %s: %s", p.route.Node, err)
	}
	req := c.request(ctx)
	req.Header.Set(HeaderTarget, p.route.Instance)
	req.Header.Set(componentv1.HeaderToken, p.route.Token.String())
	resp, err := rt.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, refuse(doubt, codes.Unavailable, "node %s: %s", p.route.Node, err)
	}
	retry := resp.Header.Get(HeaderRetry)
	if retry == "" {
		return resp, nil
	}
	ce := refuse(doubt, codes.Unavailable, "node %s: %s", p.route.Node, firstBytes(resp.Body))
	if retry == retryUntouched {
		ce.outcome = untouched
	}
	if r, perr := ParseRedirect(resp.Header.Get(HeaderMoved)); perr == nil {
		ce.moved = &r
	}
	return nil, errors.Join(ce, resp.Body.Close())
}

// firstBytes reads the start of an error response.
func firstBytes(r io.Reader) string {
	b, err := io.ReadAll(io.LimitReader(r, 256))
	if err != nil && len(b) == 0 {
		return "no reason given"
	}
	return strings.TrimSpace(string(b))
}
