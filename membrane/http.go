package membrane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// bufferPool of the reverse proxies: 32 KiB, what io.Copy takes.
type bufferPool struct{ pool sync.Pool }

func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, 32<<10)
}

func (p *bufferPool) Put(b []byte) { p.pool.Put(&b) }

// newProxy returns a reverse proxy whose requests go through rt.
func newProxy(rt http.RoundTripper, pool *bufferPool, fail func(http.ResponseWriter, *http.Request, error)) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Scheme, pr.Out.URL.Host = "http", "component"
			pr.Out.Host = pr.In.Host
			pr.SetXForwarded()
		},
		Transport: rt, FlushInterval: -1, BufferPool: pool, ErrorHandler: fail,
		ErrorLog: log.New(io.Discard, "", 0), // failures are counted at the gate and answered; clients that go away are no news
	}
}

// HTTP returns the component's http interface behind the gate: held, counted, and answered only when its effects are safe, as every call. It
// serves this node's own routers and other nodes' (PeerHTTP); it repeats nothing.
func (m *Membrane) HTTP() http.Handler { return m.http }

func (m *Membrane) newHTTP() http.Handler {
	return newProxy(&gateTransport{m}, &bufferPool{}, func(w http.ResponseWriter, _ *http.Request, err error) {
		var ce *callError
		if errors.As(err, &ce) && ce.outcome != final {
			h := w.Header()
			h.Set(HeaderRetry, map[outcome]string{untouched: retryUntouched, doubt: retryDoubt}[ce.outcome])
			if ce.moved != nil {
				h.Set(HeaderMoved, ce.moved.String())
			}
		}
		httpError(w, err)
	})
}

// httpError answers with the status that fits an error of a gate.
func httpError(w http.ResponseWriter, err error) {
	code := http.StatusBadGateway
	switch statusOf(err).Code() {
	case codes.Unavailable:
		code = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	case codes.ResourceExhausted:
		code = http.StatusTooManyRequests
		w.Header().Set("Retry-After", "1")
	case codes.DeadlineExceeded, codes.Canceled:
		code = http.StatusGatewayTimeout
	case codes.NotFound:
		code = http.StatusNotFound
	case codes.InvalidArgument:
		code = http.StatusBadRequest
	case codes.Unimplemented:
		code = http.StatusNotImplemented
	}
	http.Error(w, statusOf(err).Message(), code)
}

// gateTransport passes one request through the gate to the component's socket.
type gateTransport struct{ m *Membrane }

// httpMethod names HTTP requests in the statistics; paths are the callers' to choose and would grow without end.
func httpMethod(req *http.Request) string { return "HTTP " + req.Method }

// RoundTrip implements http.RoundTripper. The call is inside until its body has been read, unless it is a stream without an end: an
// upgraded connection or server-sent events pass the gate only when they open.
func (t *gateTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	g := t.m.gate
	token, err := httpToken(req)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	p, err := g.enter(req.Context())
	if err != nil {
		return nil, err
	}
	if err := g.checkToken(p, token); err != nil {
		g.exit(p)
		return nil, err
	}
	count := g.stats.begin(httpMethod(req))
	resp, err := t.exchange(req, p)
	failed := err != nil || resp.StatusCode >= 500
	if err != nil {
		g.stats.end(count, began, true, true)
		g.exit(p)
		return nil, err
	}
	if endless(resp) {
		g.exit(p)
		p.backend.streams.Add(1)
		end := sync.OnceFunc(func() {
			p.backend.streams.Add(-1)
			g.stats.end(count, began, false, failed)
		})
		resp.Body = keepWriter(&settledBody{resp.Body, req.Context(), g, p}, end)
		return resp, nil
	}
	end := sync.OnceFunc(func() {
		g.stats.end(count, began, true, failed)
		g.exit(p)
	})
	resp.Body = keepWriter(resp.Body, end)
	return resp, nil
}

func (t *gateTransport) exchange(req *http.Request, p *phase) (*http.Response, error) {
	out := req.Clone(req.Context())
	stripInternal(out.Header)
	out.Header.Set(componentv1.HeaderCredential, p.backend.proc.Ident().Credential)
	out.Header.Set(componentv1.HeaderToken, p.token.String())
	resp, err := p.backend.transport.RoundTrip(out)
	if err != nil {
		return nil, httpLost(req.Context(), err)
	}
	mark := resp.Header.Get(componentv1.HeaderMark)
	resp.Header.Del(componentv1.HeaderMark)
	resp.Header.Del(HeaderRetry)
	resp.Header.Del(HeaderMoved)
	if err := t.m.gate.settleMark(req.Context(), p, httpMethod(req), mark); err != nil {
		return nil, errors.Join(err, resp.Body.Close())
	}
	return resp, nil
}

// httpLost classifies a failed exchange with the component: nothing has left when its socket could not be reached.
func httpLost(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, errNoHTTP):
		return refuse(final, codes.Unimplemented, "%s", errNoHTTP)
	case ctx.Err() != nil:
		return err
	case strings.Contains(err.Error(), "dial unix"):
		return refuse(untouched, codes.Unavailable, "not connected: %s", err)
	}
	return refuse(doubt, codes.Unavailable, "the connection broke during the call: %s", err)
}

func httpToken(req *http.Request) (*Token, error) {
	v := req.Header.Get(componentv1.HeaderToken)
	if v == "" {
		return nil, nil
	}
	t, err := ParseToken(v)
	if err != nil {
		return nil, refuse(final, codes.InvalidArgument, "header %s: %s", componentv1.HeaderToken, err)
	}
	return &t, nil
}

// stripInternal removes what only gates may say.
func stripInternal(h http.Header) {
	for _, k := range []string{componentv1.HeaderCredential, componentv1.HeaderToken, componentv1.HeaderMark, HeaderTarget, HeaderRetry, HeaderMoved} {
		h.Del(k)
	}
}

func endless(resp *http.Response) bool {
	return resp.StatusCode == http.StatusSwitchingProtocols || strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream")
}

// settledBody holds back what a response without an end gives until what it may depend on is committed: as the messages of a stream.
type settledBody struct {
	io.ReadCloser
	ctx   context.Context //nolint:containedctx // the request's
	gate  *gate
	phase *phase
}

func (b *settledBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n == 0 {
		return n, err
	}
	if serr := b.gate.settleNow(b.ctx, b.phase); serr != nil {
		return 0, serr
	}
	return n, err
}

// Write implements io.Writer where the body does: an upgraded connection.
func (b *settledBody) Write(p []byte) (int, error) {
	w, ok := b.ReadCloser.(io.Writer)
	if !ok {
		return 0, errors.ErrUnsupported
	}
	return w.Write(p)
}

// endBody runs end when the body was read to its end or closed.
type endBody struct {
	io.ReadCloser
	end func()
}

func (b *endBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.end()
	}
	return n, err
}

func (b *endBody) Close() error {
	b.end()
	return b.ReadCloser.Close()
}

// endUpgraded is endBody for an upgraded connection, which is written to as well.
type endUpgraded struct {
	endBody
	io.Writer
}

// keepWriter wraps a body and keeps its being an io.Writer, which is how net/http hands over an upgraded connection.
func keepWriter(body io.ReadCloser, end func()) io.ReadCloser {
	b := endBody{body, end}
	if w, ok := body.(io.Writer); ok {
		return &endUpgraded{b, w}
	}
	return &b
}

// PeerHTTP serves the HTTP routers of other nodes: X-Coppice-Target must be an instance of this node. The transport has authenticated the
// caller as a member.
func (r *Router) PeerHTTP() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		target := req.Header.Get(HeaderTarget)
		m, err := r.here(req.Context(), target, "")
		if err != nil {
			var ce *callError
			if errors.As(err, &ce) && ce.outcome == untouched {
				w.Header().Set(HeaderRetry, retryUntouched)
				if ce.moved != nil {
					w.Header().Set(HeaderMoved, ce.moved.String())
				}
			}
			httpError(w, fmt.Errorf("http: %w", err))
			return
		}
		m.HTTP().ServeHTTP(w, req)
	})
}
