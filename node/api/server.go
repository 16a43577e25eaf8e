package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"time"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

const (
	// MaxMessage bounds one message in either direction: a manifest, a chunk of a pushed file, the rows of a query.
	MaxMessage = 16 << 20
	// MaxHeader bounds the headers of a request.
	MaxHeader = 64 << 10
	// MaxUnary bounds a call that answers once; a caller's own deadline is shorter or is cut to this.
	MaxUnary = 10 * time.Minute
	// MaxPush bounds the upload of artifacts.
	MaxPush = time.Hour

	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	stopGrace     = 2 * time.Second
)

// Config is what a Server needs.
type Config struct {
	Control apiv1connect.ControlHandler // the verbs
	Token   string                      // what the token door wants; at least 32 characters
	Log     *slog.Logger
}

// Server serves the verbs of one node behind its two doors. It has no state of its own besides the handlers; it is safe for use by
// several goroutines.
type Server struct {
	log    *slog.Logger
	secret secret
	mux    http.Handler
	writer *connect.ErrorWriter
}

// NewServer builds the handlers. It fails on an empty or short token: an open control API is never what is meant.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Control == nil || cfg.Log == nil {
		return nil, errors.New("api server: Control and Log must be set")
	}
	if len(cfg.Token) < minToken {
		return nil, fmt.Errorf("api server: the token has %d characters, want at least %d", len(cfg.Token), minToken)
	}
	s := &Server{log: cfg.Log, secret: newSecret(cfg.Token)}
	opts := []connect.HandlerOption{
		connect.WithReadMaxBytes(MaxMessage),
		connect.WithSendMaxBytes(MaxMessage),
		connect.WithCompressMinBytes(16 << 10),
		connect.WithCodec(jsonCodec{}),
		connect.WithInterceptors(&interceptor{log: cfg.Log}),
		connect.WithRecover(s.recovered),
	}
	path, h := apiv1connect.NewControlHandler(cfg.Control, opts...)
	mux := http.NewServeMux()
	mux.Handle(path, h)
	mux.Handle("/api"+path, http.StripPrefix("/api", h))
	s.mux, s.writer = mux, connect.NewErrorWriter(opts...)
	return s, nil
}

// recovered answers for a verb that panicked: the node goes on, the log has the stack, the caller no trace.
func (s *Server) recovered(_ context.Context, spec connect.Spec, _ http.Header, v any) error {
	s.log.Error("a verb of the control API panicked", "method", spec.Procedure, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
	return Fail(connect.CodeInternal, verbOf(spec), "a fault in this node, its log has the details", "coppice doctor")
}

// Handler is the token door. It serves the methods under / and under /api/.
func (s *Server) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tok, ok := bearer(r.Header.Get("Authorization"))
		if !ok || !s.secret.is(tok) {
			s.refuse(w, r, ok)
			return
		}
		s.mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), doorKey{}, door{})))
	})
}

func (s *Server) refuse(w http.ResponseWriter, r *http.Request, had bool) {
	why := "no token was sent"
	if had {
		why = "the token is not this node's"
	}
	s.log.Debug("control API: refused", "why", why, "path", r.URL.Path, "remote", r.RemoteAddr)
	err := Fail(connect.CodeUnauthenticated, "talk to the control API", why, "coppice --token @DATA/"+TokenFile+" …")
	w.Header().Set("WWW-Authenticate", `Bearer realm="coppice"`)
	if !s.writer.IsSupported(r) {
		http.Error(w, err.Message(), http.StatusUnauthorized)
		return
	}
	if werr := s.writer.Write(w, r, err); werr != nil {
		s.log.Debug("control API: the refusal was not sent", "err", werr)
	}
}

// PeerHandler is the door for calls that the member called from forwarded. The caller must have authenticated from.
func (s *Server) PeerHandler(from string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d := door{from: from, hops: hopsOf(r.Header)}
		s.mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), doorKey{}, d)))
	})
}

// Serve answers on a listener until ctx ends, then lets running calls finish for two seconds. It closes the listener. The handler is
// one of the two doors, or one that wraps them.
func Serve(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    MaxHeader,
		Protocols:         new(http.Protocols),
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true) // gRPC clients
	done := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopGrace)
		defer cancel()
		err := srv.Shutdown(grace)
		if errors.Is(err, context.DeadlineExceeded) {
			err = srv.Close()
		}
		done <- err
	})
	err := srv.Serve(ln)
	if stop() { // nobody asked it to end
		return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
	}
	if err = <-done; err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("stop serving on %s: %w", ln.Addr(), err)
	}
	return nil
}
