package sdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// Handler returns what serves the HTTP interface: Component.HTTP behind the credential check and the transactions.
func (in *Instance) Handler() http.Handler {
	return http.HandlerFunc(in.serveHTTP)
}

func (in *Instance) serveHTTP(w http.ResponseWriter, r *http.Request) {
	if err := in.checkCredential(r.Header.Values(componentv1.HeaderCredential)); err != nil {
		httpError(w, http.StatusUnauthorized, fmt.Errorf("this component answers its node only: header %s is missing or wrong", componentv1.HeaderCredential))
		return
	}
	r.Header.Del(componentv1.HeaderCredential)
	c := &call{in: in, key: r.Header.Get(componentv1.HeaderKey), caller: r.Header.Get(componentv1.HeaderCaller)}
	if low := r.Header.Get(componentv1.HeaderLow); low != "" {
		n, err := strconv.ParseUint(low, 10, 64)
		if err != nil {
			httpError(w, http.StatusBadRequest, fmt.Errorf("header %s is %q, not a number", componentv1.HeaderLow, low))
			return
		}
		c.low = n
	}
	name := r.Method + " " + r.URL.Path
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		in.readRequest(w, r, c, name)
	default:
		in.writeRequest(w, r, c, name)
	}
}

// readRequest runs on one version of the state. It is not counted as in flight, so a response that streams for hours does not hold up a freeze.
func (in *Instance) readRequest(w http.ResponseWriter, r *http.Request, c *call, name string) {
	if in.currentState() != componentv1.State_STARTED {
		httpRefuse(w, in.refusal())
		return
	}
	if in.store != nil {
		c.tx = in.store.NewTxn(name, true)
		defer in.store.Rollback(c.tx)
		if err := in.store.Begin(r.Context(), c.tx); err != nil {
			httpRefuse(w, stateError(err))
			return
		}
		if mark := c.tx.Mark(); mark > 0 {
			w.Header().Set(componentv1.HeaderMark, strconv.FormatUint(mark, 10))
		}
	}
	defer func() {
		if p := recover(); p != nil {
			httpRefuse(w, in.panicked(name, p))
		}
	}()
	in.comp.HTTP.ServeHTTP(w, r.WithContext(c.context(r.Context())))
	if c.tx != nil && c.tx.Err() != nil {
		in.log.Error("a read-only request misused its transaction", "instance", in.Name(), "request", name, "error", c.tx.Err())
	}
}

// writeRequest runs as one transaction with its response, which is kept back until the transaction has ended.
func (in *Instance) writeRequest(w http.ResponseWriter, r *http.Request, c *call, name string) {
	if !in.calls.enter() {
		httpRefuse(w, in.refusal())
		return
	}
	defer in.calls.leave()
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxMessageBytes))
	if err != nil {
		var tooBig *http.MaxBytesError
		if errors.As(err, &tooBig) {
			httpError(w, http.StatusRequestEntityTooLarge, fmt.Errorf("a request body may have %d bytes", maxMessageBytes))
			return
		}
		httpError(w, http.StatusBadRequest, fmt.Errorf("read request body: %w", err))
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	rec := &recording{header: http.Header{}, status: http.StatusOK}
	ctx := c.context(r.Context())
	if in.store == nil {
		in.handle(ctx, name, rec, r)
		rec.send(w, 0)
		return
	}
	c.tx = in.store.NewTxn(name, false)
	defer in.store.Rollback(c.tx)
	ticket, remembered, err := in.admit(ctx, c, func() (uint64, error) { return requestPrint(r, body), nil })
	if err != nil {
		httpRefuse(w, err)
		return
	}
	if remembered != nil {
		if remembered.GetHttpStatus() == 0 { // a gRPC call's
			httpError(w, http.StatusUnprocessableEntity, errors.New("the key was used before for a different request: use a new key for each request"))
			return
		}
		recordingOf(remembered).send(w, remembered.GetMark())
		return
	}
	defer ticket.Done()
	in.handle(ctx, name, rec, r)
	if rec.status >= http.StatusBadRequest {
		rec.send(w, c.tx.Mark())
		return
	}
	mark, err := in.store.Commit(context.WithoutCancel(ctx), c.tx, ticket, rec.reply())
	if err != nil {
		httpRefuse(w, stateError(fmt.Errorf("%s: %w", name, err)))
		return
	}
	rec.send(w, mark)
}

// handle runs the author's handler; a panic becomes status 500, which rolls back.
func (in *Instance) handle(ctx context.Context, name string, rec *recording, r *http.Request) {
	defer func() {
		if p := recover(); p != nil {
			*rec = recording{header: http.Header{}}
			httpRefuse(rec, in.panicked(name, p))
		}
	}()
	in.comp.HTTP.ServeHTTP(rec, r.WithContext(ctx))
}

// requestPrint tells one request from another under the same key.
func requestPrint(r *http.Request, body []byte) uint64 {
	h := xxhash.New()
	// Write and WriteString of a xxhash.Digest never return an error.
	_, _ = h.WriteString(r.Method + "\x00" + r.URL.RequestURI() + "\x00" + r.Header.Get("Content-Type") + "\x00")
	_, _ = h.Write(body)
	return h.Sum64()
}

// recording is a response that has not been sent.
type recording struct {
	header http.Header
	status int
	wrote  bool
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (r *recording) Header() http.Header { return r.header }

// WriteHeader implements http.ResponseWriter; informational statuses are left out.
func (r *recording) WriteHeader(status int) {
	if r.wrote || status < http.StatusOK {
		return
	}
	r.status, r.wrote = status, true
}

// Write implements http.ResponseWriter.
func (r *recording) Write(b []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	if r.body.Len()+len(b) > maxMessageBytes {
		return 0, fmt.Errorf("the response to a request that may change state has at most %d bytes: it is kept to be sent again", maxMessageBytes)
	}
	return r.body.Write(b)
}

func (r *recording) reply() *statev1.Reply {
	out := &statev1.Reply{HttpStatus: uint32(r.status), Body: bytes.Clone(r.body.Bytes())}
	for name, values := range r.header {
		for _, v := range values {
			out.Headers = append(out.Headers, &statev1.Header{Name: name, Value: v})
		}
	}
	return out
}

func recordingOf(reply *statev1.Reply) *recording {
	r := &recording{header: http.Header{}, status: int(reply.GetHttpStatus())}
	for _, h := range reply.GetHeaders() {
		r.header.Add(h.GetName(), h.GetValue())
	}
	r.body.Write(reply.GetBody()) // a bytes.Buffer never returns an error
	return r
}

func (r *recording) send(w http.ResponseWriter, mark uint64) {
	for name, values := range r.header {
		w.Header()[name] = values
	}
	if mark > 0 {
		w.Header().Set(componentv1.HeaderMark, strconv.FormatUint(mark, 10))
	}
	w.WriteHeader(r.status)
	// A client that has gone away asks again with its key.
	_, _ = w.Write(r.body.Bytes())
}

func httpError(w http.ResponseWriter, code int, err error) {
	http.Error(w, err.Error(), code)
}

// httpRefuse answers with the HTTP status that fits a gRPC error of the SDK.
func httpRefuse(w http.ResponseWriter, err error) {
	code := http.StatusInternalServerError
	s := status.Convert(err)
	switch s.Code() {
	case codes.Unavailable, codes.ResourceExhausted:
		code = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	case codes.FailedPrecondition:
		code = http.StatusConflict
	case codes.Aborted:
		code = http.StatusUnprocessableEntity
	case codes.DeadlineExceeded, codes.Canceled:
		code = http.StatusGatewayTimeout
	}
	http.Error(w, s.Message(), code)
}
