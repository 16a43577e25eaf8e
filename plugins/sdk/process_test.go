package sdk_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// counterBinary is built once for the tests that need a process.
var counterBinary string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "sdk")
	if err == nil {
		counterBinary = filepath.Join(dir, "counter")
		build := exec.Command("go", "build", "-ldflags", "-X main.version=1.2.3", "-o", counterBinary, "../counter")
		build.Stderr = os.Stderr
		err = build.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "build the counter:", err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// TestStockGoPluginClient: nothing but go-plugin, its defaults, and the handshake.
func TestStockGoPluginClient(t *testing.T) {
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: sdk.Handshake, Plugins: sdk.Plugins(), Cmd: exec.Command(counterBinary),
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC}, Logger: hclog.NewNullLogger(),
	})
	defer client.Kill()
	protocol, err := client.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := protocol.Ping(); err != nil {
		t.Fatal(err)
	}
	raw, err := protocol.Dispense(componentv1.PluginName)
	if err != nil {
		t.Fatal(err)
	}
	control, ok := raw.(componentv1.ComponentClient)
	if !ok {
		t.Fatalf("dispensed a %T", raw)
	}
	d, err := control.Describe(t.Context(), &componentv1.DescribeRequest{})
	if err != nil || d.GetType() != "counter" || d.GetVersion() != "1.2.3" {
		t.Fatal(d, err)
	}
	if _, err := control.Start(t.Context(), &componentv1.StartRequest{Instance: "app/counter-0"}); err != nil {
		t.Fatal(err)
	}
	grpcClient, ok := protocol.(*plugin.GRPCClient)
	if !ok {
		t.Fatalf("protocol is a %T", protocol)
	}
	if v, err := counterv1.NewCounterClient(grpcClient.Conn).Add(t.Context(), &counterv1.AddRequest{N: 3}); err != nil || v.GetValue() != 3 {
		t.Fatal(v, err)
	}
	begin := time.Now()
	client.Kill()
	if took := time.Since(begin); !client.Exited() || took > 1900*time.Millisecond {
		t.Fatalf("Shutdown took %v: the client had to kill it", took)
	}
}

// process is a component started the way a node starts one.
type process struct {
	cmd    *exec.Cmd
	conn   *grpc.ClientConn
	dir    string
	stderr *bytes.Buffer
	ended  chan error
}

const credential = "s3cret"

func startProcess(t *testing.T, env ...string) *process {
	t.Helper()
	dir, err := os.MkdirTemp("", "c") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(counterBinary), dir: dir, stderr: &bytes.Buffer{}, ended: make(chan error, 1)}
	p.cmd.Env = append([]string{
		componentv1.CookieKey + "=" + componentv1.CookieValue, plugin.EnvUnixSocketDir + "=" + dir,
		componentv1.EnvCredential + "=" + credential,
	}, env...)
	p.cmd.Stderr = p.stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	parts := strings.Split(strings.TrimSpace(line), "|")
	if err != nil || len(parts) != 6 || parts[0] != "1" || parts[1] != "1" || parts[2] != "unix" || parts[4] != "grpc" {
		t.Fatalf("handshake %q: %v\n%s", line, err, p.stderr)
	}
	if p.conn, err = grpc.NewClient("unix:"+parts[3], grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	go func() { p.ended <- p.cmd.Wait() }()
	t.Cleanup(func() {
		if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		if err := errors.Join(p.conn.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return p
}

// exit waits for the end of the process and returns its status.
func (p *process) exit(t *testing.T) int {
	t.Helper()
	select {
	case err := <-p.ended:
		p.ended <- err
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(10 * time.Second):
		t.Fatalf("the process does not end\n%s", p.stderr)
		return 0
	}
}

func trusted(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, componentv1.MetaCredential, credential)
}

func TestProcess(t *testing.T) {
	p := startProcess(t)
	ctx := trusted(t.Context())
	_, err := grpc_health_v1.NewHealthClient(p.conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: plugin.GRPCServiceName})
	wantCode(t, err, codes.Unauthenticated, componentv1.MetaCredential)
	if _, err = grpc_health_v1.NewHealthClient(p.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: plugin.GRPCServiceName}); err != nil {
		t.Fatal(err)
	}
	control := componentv1.NewComponentClient(p.conn)
	st, err := control.Start(ctx, &componentv1.StartRequest{Instance: "app/c-0", Version: "9.0.0", Token: &componentv1.Token{Incarnation: 1, Epoch: 4}})
	if err != nil {
		t.Fatal(err)
	}
	socket := st.GetInfo()[componentv1.InfoHTTPSocket]
	if filepath.Dir(socket) != p.dir {
		t.Fatalf("http socket %q", socket)
	}
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	for range 2 {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://c/?n=5", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(componentv1.HeaderCredential, credential)
		req.Header.Set(componentv1.HeaderKey, "k")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			t.Fatal(err)
		}
		if string(body) != "5\n" || resp.Header.Get("X-Version") != "9.0.0" || resp.Header.Get("X-Epoch") != "4" {
			t.Fatal(string(body), resp.Header)
		}
	}
	if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if beat, err := control.Heartbeat(ctx, &componentv1.Beat{Seq: 1}); err != nil || beat.GetStatus().GetState() != componentv1.State_STARTED {
		t.Fatal("after SIGINT:", beat, err)
	}
	client.CloseIdleConnections()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := p.exit(t); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.stderr)
	}
	if left, err := os.ReadDir(p.dir); err != nil || len(left) != 0 {
		t.Fatal("sockets are left behind:", left, err)
	}
}

func TestStopEndsTheProcess(t *testing.T) {
	p := startProcess(t)
	if st, err := componentv1.NewComponentClient(p.conn).Stop(trusted(t.Context()), &componentv1.StopRequest{}); err != nil || st.GetState() != componentv1.State_STOPPED {
		t.Fatal(st, err)
	}
	if code := p.exit(t); code != 0 {
		t.Fatalf("exit %d\n%s", code, p.stderr)
	}
}

func TestNotStartedByANode(t *testing.T) {
	out, err := exec.Command(counterBinary).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "a node starts it") {
		t.Fatalf("%s: %v", out, err)
	}
	long := exec.Command(counterBinary)
	long.Env = []string{componentv1.CookieKey + "=" + componentv1.CookieValue, plugin.EnvUnixSocketDir + "=/" + strings.Repeat("x", 100)}
	if out, err = long.CombinedOutput(); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "shorter directory") {
		t.Fatalf("%s: %v", out, err)
	}
}

// leaser is a node that grants leases as long as it likes.
type leaser struct {
	componentv1.UnimplementedNodeServer
	epoch  atomic.Uint64
	silent atomic.Bool
	skip   atomic.Int64 // this many beats are not answered
}

func (l *leaser) Lease(stream grpc.BidiStreamingServer[componentv1.LeaseBeat, componentv1.LeaseGrant]) error {
	if md, _ := metadata.FromIncomingContext(stream.Context()); strings.Join(md.Get(componentv1.MetaCredential), "") != credential {
		return status.Error(codes.Unauthenticated, "who is that")
	}
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if l.skip.Add(-1) >= 0 {
			continue
		}
		if l.silent.Load() {
			<-stream.Context().Done()
			return stream.Context().Err()
		}
		if err := stream.Send(&componentv1.LeaseGrant{TtlMs: 900, Token: &componentv1.Token{Incarnation: 1, Epoch: l.epoch.Load()}}); err != nil {
			return err
		}
	}
}

func (l *leaser) serve(t *testing.T, path string) *grpc.Server {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	componentv1.RegisterNodeServer(s, l)
	go func() {
		if err := s.Serve(listener); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(s.Stop)
	return s
}

func TestLeaseLapseEndsTheProcess(t *testing.T) {
	dir, err := os.MkdirTemp("", "n")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "n")
	node := &leaser{}
	node.epoch.Store(3)
	server := node.serve(t, socket)
	p := startProcess(t, componentv1.EnvNodeSocket+"="+socket)
	control := componentv1.NewComponentClient(p.conn)
	epoch := func() uint64 {
		b, err := control.Heartbeat(trusted(t.Context()), &componentv1.Beat{})
		if err != nil {
			t.Fatalf("%v\n%s", err, p.stderr)
		}
		return b.GetToken().GetEpoch()
	}
	if !waitFor(t, func() bool { return epoch() == 3 }) {
		t.Fatal("the first grant's token")
	}
	server.Stop() // the daemon restarts, in time
	node.epoch.Store(4)
	server = node.serve(t, socket)
	if !waitFor(t, func() bool { return epoch() == 4 }) {
		t.Fatal("the new daemon's token")
	}
	node.epoch.Store(5)
	node.skip.Store(1) // a grant withheld for a moment, in time
	if !waitFor(t, func() bool { return epoch() == 5 }) {
		t.Fatal("the grant after one that was withheld")
	}
	time.Sleep(time.Second) // longer than one grant: renewals keep it alive
	epoch()
	node.silent.Store(true) // hangs: the connection is there, the grants are not
	if code := p.exit(t); code != componentv1.ExitLeaseLapsed || !strings.Contains(p.stderr.String(), "lease lapsed") {
		t.Fatalf("exit %d\n%s", code, p.stderr)
	}
	server.Stop()
}

// A large state may take longer than a lease, on a machine that has no time for its beats: the process is not ended over it, and begins with a lease.
func TestAProcessOutlivesItsLeaseWhileItIsGivenItsState(t *testing.T) {
	dir, err := os.MkdirTemp("", "n")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "n")
	node := &leaser{}
	node.epoch.Store(1)
	node.serve(t, socket)
	p := startProcess(t, componentv1.EnvNodeSocket+"="+socket)
	control := componentv1.NewComponentClient(p.conn)
	if !waitFor(t, func() bool {
		b, err := control.Heartbeat(trusted(t.Context()), &componentv1.Beat{})
		return err == nil && b.GetToken().GetEpoch() == 1
	}) {
		t.Fatal("the first grant's token")
	}
	in, err := control.Restore(trusted(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	send := func(f *componentv1.StateFrame) {
		t.Helper()
		f.Xxh64 = frames.Digest(f)
		if err := in.Send(f); err != nil {
			t.Fatal(err)
		}
	}
	send(&componentv1.StateFrame{Section: componentv1.SectionHeader, Schema: 1, Mark: 7})
	if _, err := control.Heartbeat(trusted(t.Context()), &componentv1.Beat{}); err != nil {
		t.Fatal(err)
	}
	const many = 1 << 30
	node.skip.Store(many) // grants stay away for several leases
	if !waitFor(t, func() bool { return many-node.skip.Load() > 8 }) {
		t.Fatalf("it does not ask any more\n%s", p.stderr)
	}
	send(&componentv1.StateFrame{Section: componentv1.SectionEnd, Mark: 7, Last: true})
	if _, err := in.CloseAndRecv(); err != nil {
		t.Fatalf("its state could not be restored: %v\n%s", err, p.stderr)
	}
	node.skip.Store(0)
	req := &componentv1.StartRequest{Instance: "a/counter-0", Token: &componentv1.Token{Incarnation: 1, Epoch: 1}, Leased: true}
	if _, err := control.Start(trusted(t.Context()), req); err != nil {
		t.Fatalf("%v\n%s", err, p.stderr)
	}
}

// Exactly-one: nothing of the component runs before the node has granted the first lease, whoever calls Start.
func TestALeasedStartWaitsForTheFirstGrant(t *testing.T) {
	dir, err := os.MkdirTemp("", "n")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "n")
	node := &leaser{}
	node.epoch.Store(1)
	node.skip.Store(1 << 30)
	node.serve(t, socket)
	p := startProcess(t, componentv1.EnvNodeSocket+"="+socket)
	control := componentv1.NewComponentClient(p.conn)
	req := &componentv1.StartRequest{Instance: "a/counter-0", Token: &componentv1.Token{Incarnation: 1, Epoch: 1}, Leased: true}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := control.Start(trusted(ctx), req); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("it started without a grant: %v", err)
	}
	node.skip.Store(0)
	if _, err := control.Start(trusted(t.Context()), req); err != nil {
		t.Fatalf("%v\n%s", err, p.stderr)
	}
}
