package runnertest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// EnvMode switches to one of the Mode values.
const EnvMode = "RUNNERTEST_MODE"

// EnvVersion is the version that Describe and the http interface tell; default "1.0".
const EnvVersion = "RUNNERTEST_VERSION"

// EnvQuickExit is to be in the environment of a component that is a test binary: with the race detector it would take a second to exit.
const EnvQuickExit = "GORACE=atexit_sleep_ms=0"

// Ways to misbehave.
const (
	ModeHangHello    = "hang-hello"    // runs and never says hello
	ModeExit         = "exit"          // prints a reason and exits with 3 before saying hello
	ModeGarbage      = "garbage"       // says something else and exits
	ModeVersion      = "version"       // says hello with contract 9
	ModeTCP          = "tcp"           // listens on TCP
	ModeForeign      = "foreign"       // names a socket outside its folder
	ModeDescribeFail = "describe-fail" // Describe returns an error
	ModeDescribeHang = "describe-hang" // Describe never returns
	ModeIgnoreTerm   = "ignore-term"   // ignores SIGTERM, and Stop does nothing
	ModeNoHeartbeat  = "no-heartbeat"  // Heartbeat never returns
	ModeRefuse       = "refuse"        // Restore fails
)

// Main serves the component and exits when the environment says that a node started us; otherwise it returns.
func Main() {
	if os.Getenv(componentv1.CookieKey) != componentv1.CookieValue {
		return
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func hello(version int, network, addr string) {
	fmt.Printf("1|%d|%s|%s|grpc|\n", version, network, addr)
}

// hang never returns. An empty select would have the runtime call it a deadlock, where nothing else waits for anything.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}

func serve() error {
	dir, mode := os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), os.Getenv(EnvMode)
	if m, ok := strings.CutPrefix(filepath.Base(os.Args[0]), "mode-"); ok {
		mode = m // where no environment can be given: Describe
	}
	sock := filepath.Join(dir, "c")
	switch mode {
	case ModeHangHello:
		hang()
	case ModeExit:
		fmt.Fprintln(os.Stderr, "cannot go on: no configuration")
		os.Exit(3)
	case ModeGarbage:
		fmt.Println("usage: hello [flags]")
		return nil
	case ModeTCP:
		hello(1, "tcp", "127.0.0.1:1")
		hang()
	case ModeForeign:
		hello(1, "unix", "/tmp/elsewhere")
		hang()
	}
	l, err := net.Listen("unix", sock)
	if err != nil {
		return err
	}
	c := &component{mode: mode, version: os.Getenv(EnvVersion), answered: map[string]answer{}, changed: make(chan struct{})}
	if c.version == "" {
		c.version = "1.0"
	}
	c.http = filepath.Join(dir, "h")
	hl, err := net.Listen("unix", c.http)
	if err != nil {
		return err
	}
	go http.Serve(hl, http.HandlerFunc(c.serveHTTP)) //nolint:errcheck // ends with the process
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for s := range term {
			if s == syscall.SIGTERM && mode != ModeIgnoreTerm {
				os.Exit(0)
			}
		}
	}()
	s := grpc.NewServer(grpc.UnaryInterceptor(checkUnary), grpc.StreamInterceptor(checkStream), grpc.MaxRecvMsgSize(64<<20))
	componentv1.RegisterComponentServer(s, c)
	s.RegisterService(counterDesc(c), c)
	version := componentv1.ProtocolVersion
	if mode == ModeVersion {
		version = 9
	}
	hello(version, "unix", sock)
	return s.Serve(l)
}

var errCredential = status.Error(codes.Unauthenticated, "wrong credential")

func allowed(ctx context.Context) bool {
	md, _ := metadata.FromIncomingContext(ctx)
	got := md.Get(componentv1.MetaCredential)
	return len(got) == 1 && got[0] == os.Getenv(componentv1.EnvCredential)
}

func checkUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	if !allowed(ctx) {
		return nil, errCredential
	}
	return h(ctx, req)
}

func checkStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
	if !allowed(ss.Context()) {
		return errCredential
	}
	return h(srv, ss)
}

type answer struct {
	Value int64
	Mark  uint64
}

// component is a counter with a table of answers by key: each Add is one transaction with its reply.
type component struct {
	componentv1.UnimplementedComponentServer
	mode, version, http string

	mu       sync.Mutex // guards the fields below
	value    int64
	mark     uint64
	answered map[string]answer
	changed  chan struct{}
	start    *componentv1.StartRequest
	quiet    bool
	attrs    map[string][]byte
	revision uint64
	bindings map[string][]string
}

func (c *component) Describe(ctx context.Context, _ *componentv1.DescribeRequest) (*componentv1.Description, error) {
	switch c.mode {
	case ModeDescribeFail:
		return nil, status.Error(codes.Internal, "no description today")
	case ModeDescribeHang:
		<-ctx.Done()
		hang()
	}
	return Description(c.version), nil
}

func (c *component) Start(_ context.Context, r *componentv1.StartRequest) (*componentv1.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.start = r
	c.attrs = maps.Clone(r.GetAttributes().GetJson())
	return &componentv1.Status{State: componentv1.State_STARTED, Info: map[string]string{componentv1.InfoHTTPSocket: c.http}}, nil
}

func (c *component) Stop(context.Context, *componentv1.StopRequest) (*componentv1.Status, error) {
	if c.mode != ModeIgnoreTerm {
		go func() {
			time.Sleep(time.Millisecond)
			os.Exit(0)
		}()
	}
	return &componentv1.Status{State: componentv1.State_STOPPED}, nil
}

func (c *component) Quiesce(context.Context, *componentv1.QuiesceRequest) (*componentv1.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.quiet = true
	return &componentv1.Status{State: componentv1.State_FROZEN}, nil
}

func (c *component) Resume(context.Context, *componentv1.ResumeRequest) (*componentv1.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.quiet = false
	return &componentv1.Status{State: componentv1.State_STARTED}, nil
}

func (c *component) Heartbeat(ctx context.Context, b *componentv1.Beat) (*componentv1.Beat, error) {
	if c.mode == ModeNoHeartbeat {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c.mu.Lock()
	mark := c.mark
	c.mu.Unlock()
	b.Status = &componentv1.Status{State: componentv1.State_STARTED, Info: map[string]string{componentv1.InfoHTTPSocket: c.http, componentv1.InfoMark: fmt.Sprint(mark)}}
	return b, nil
}

func (c *component) GetAttributes(context.Context, *componentv1.AttributeNames) (*componentv1.Attributes, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &componentv1.Attributes{Json: maps.Clone(c.attrs), Revision: c.revision}, nil
}

func (c *component) SetAttributes(_ context.Context, r *componentv1.SetAttributesRequest) (*componentv1.Attributes, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r.GetIfRevision() != 0 && r.GetIfRevision() != c.revision {
		return nil, status.Errorf(codes.Aborted, "revision is %d", c.revision)
	}
	next := maps.Clone(c.attrs)
	if next == nil {
		next = map[string][]byte{}
	}
	maps.Copy(next, r.GetJson())
	if r.GetDryRun() {
		return &componentv1.Attributes{Json: next, Revision: c.revision}, nil
	}
	c.attrs, c.revision = next, c.revision+1
	return &componentv1.Attributes{Json: maps.Clone(next), Revision: c.revision}, nil
}

func (c *component) BindingChanged(_ context.Context, b *componentv1.BindingState) (*componentv1.Status, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bindings == nil {
		c.bindings = map[string][]string{}
	}
	c.bindings[b.GetName()] = b.GetTargets()
	return &componentv1.Status{State: componentv1.State_STARTED}, nil
}

type saved struct {
	Value    int64
	Answered map[string]answer
}

// Checkpoint sends the whole state each time; since_mark only saves the work when nothing changed.
func (c *component) Checkpoint(from *componentv1.CheckpointFrom, s grpc.ServerStreamingServer[componentv1.StateFrame]) error {
	c.mu.Lock()
	mark := c.mark
	b, err := json.Marshal(saved{c.value, c.answered})
	c.mu.Unlock()
	if err != nil {
		return err
	}
	for _, f := range []*componentv1.StateFrame{
		{Mark: mark, TotalBytes: uint64(len(b)), Schema: from.GetSchema()},
		{Section: "all", Data: b, Last: true},
		{Section: componentv1.SectionEnd, Mark: mark, Last: true},
	} {
		if err := s.Send(frames.Seal(f)); err != nil {
			return err
		}
	}
	return nil
}

func (c *component) Restore(s grpc.ClientStreamingServer[componentv1.StateFrame, componentv1.RestoreReply]) error {
	if c.mode == ModeRefuse {
		return status.Error(codes.FailedPrecondition, "cannot read this state")
	}
	var mark, n uint64
	for {
		f, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.SendAndClose(&componentv1.RestoreReply{Bytes: n, Mark: mark})
		}
		if err != nil {
			return err
		}
		mark = max(mark, f.GetMark())
		n += uint64(len(f.GetData()))
		if f.GetSection() != "all" {
			continue
		}
		var v saved
		if err := json.Unmarshal(f.GetData(), &v); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		c.mu.Lock()
		c.value, c.answered, c.mark = v.Value, v.Answered, mark
		c.mu.Unlock()
	}
}

// Deltas tells each new mark as a frame, with the whole state.
func (c *component) Deltas(from *componentv1.CheckpointFrom, s grpc.ServerStreamingServer[componentv1.StateFrame]) error {
	sent := from.GetSinceMark()
	for {
		c.mu.Lock()
		mark, changed := c.mark, c.changed
		b, err := json.Marshal(saved{c.value, c.answered})
		c.mu.Unlock()
		if err != nil {
			return err
		}
		if mark > sent {
			if err := s.Send(&componentv1.StateFrame{Mark: mark, Section: "all", Data: b, Last: true}); err != nil {
				return err
			}
			sent = mark
			continue
		}
		select {
		case <-s.Context().Done():
			return s.Context().Err()
		case <-changed:
		}
	}
}

// add runs one transaction: the effect and the answer by its key.
func (c *component) add(key string, n int64) answer {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a, ok := c.answered[key]; ok && key != "" {
		return a
	}
	c.value += n
	c.mark++
	a := answer{c.value, c.mark}
	if key != "" {
		c.answered[key] = a
	}
	close(c.changed)
	c.changed = make(chan struct{})
	return a
}

func (c *component) get() answer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return answer{c.value, c.mark}
}

func (c *component) serveHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get(componentv1.HeaderCredential) != os.Getenv(componentv1.EnvCredential) {
		http.Error(w, "wrong credential", http.StatusUnauthorized)
		return
	}
	a := c.get()
	switch {
	case r.URL.Path == "/crash":
		os.Exit(7)
	case r.URL.Path == "/events":
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			fmt.Fprintf(w, "data: %d\n\n", i)
			w.(http.Flusher).Flush()
			time.Sleep(5 * time.Millisecond)
		}
		return
	case r.URL.Path == "/upgrade":
		upgrade(w)
		return
	case r.Method == http.MethodPost:
		n, err := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		a = c.add(r.Header.Get(componentv1.HeaderKey), n)
	}
	w.Header().Set("X-Version", c.version)
	w.Header().Set(componentv1.HeaderMark, strconv.FormatUint(a.Mark, 10))
	fmt.Fprint(w, a.Value)
}

// upgrade echoes bytes after a 101.
func upgrade(w http.ResponseWriter) {
	conn, rw, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close() //nolint:errcheck // test component
	fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	if rw.Flush() == nil {
		io.Copy(conn, rw) //nolint:errcheck // ends with the connection
	}
}

// The user's own service: see counterDesc.

func (c *component) handleAdd(ctx context.Context, in *wrapperspb.Int64Value) (*wrapperspb.Int64Value, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	var key string
	if k := md.Get(componentv1.MetaKey); len(k) > 0 {
		key = k[0]
	}
	if d := md.Get("test-crash"); len(d) > 0 && d[0] == "before" {
		os.Exit(7)
	}
	if d := md.Get("test-delay"); len(d) > 0 {
		d, err := time.ParseDuration(d[0])
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		time.Sleep(d)
	}
	a := c.add(key, in.GetValue())
	err := grpc.SetTrailer(ctx, metadata.Pairs(componentv1.MetaMark, strconv.FormatUint(a.Mark, 10)))
	if err == nil {
		err = grpc.SetHeader(ctx, metadata.Pairs("test-version", c.version))
	}
	return wrapperspb.Int64(a.Value), err
}

func (c *component) handleGet(ctx context.Context, _ *emptypb.Empty) (*wrapperspb.Int64Value, error) {
	a := c.get()
	return wrapperspb.Int64(a.Value), grpc.SetTrailer(ctx, metadata.Pairs(componentv1.MetaMark, strconv.FormatUint(a.Mark, 10)))
}

func (c *component) handleWatch(_ *emptypb.Empty, s grpc.ServerStream) error {
	for i := range int64(3) {
		if err := s.SendMsg(wrapperspb.Int64(i)); err != nil {
			return err
		}
	}
	<-s.Context().Done()
	return s.Context().Err()
}

func (c *component) handleEcho(s grpc.ServerStream) error {
	for {
		var m wrapperspb.Int64Value
		if err := s.RecvMsg(&m); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := s.SendMsg(&m); err != nil {
			return err
		}
	}
}

// handleProbe tries what a sandbox should deny and reports each try: "" means it worked.
func (c *component) handleProbe(context.Context, *emptypb.Empty) (*wrapperspb.StringValue, error) {
	out := Probe()
	fmt.Fprintln(os.Stderr, "probe done")
	b, err := json.Marshal(out)
	return wrapperspb.String(string(b)), err
}
