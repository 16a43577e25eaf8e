package peers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func grpcClient(t *testing.T, p Peers, to peer.ID) grpc_health_v1.HealthClient {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+to.String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(Dialer(p, grpcProto)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return grpc_health_v1.NewHealthClient(cc)
}

// gRPC over streams: the server sees the authenticated caller, and the server's sudden death ends a running call at once.
func TestGRPCOverPeers(t *testing.T) {
	a, b := newNode(t), newNode(t)
	introduce(a, b)
	srv, health := grpc.NewServer(), &slowHealth{}
	grpc_health_v1.RegisterHealthServer(srv, health)
	l := Listener(b, grpcProto)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	c := grpcClient(t, a, b.ID())
	for range 3 {
		if _, err := c.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if from := health.from.Load(); from == nil || *from != a.ID() {
		t.Fatalf("the server sees %v", from)
	}
	srv.Stop()
	if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		t.Fatal(err)
	}

	p := startProcess(t, "/ip4/127.0.0.1/tcp/0", nil)
	a.meet(p.id, p.addr)
	c = grpcClient(t, a, p.id)
	if _, err := c.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	started := make(chan struct{})
	go func() {
		close(started)
		_, err := c.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "slow"})
		failed <- err
	}()
	<-started
	time.Sleep(50 * time.Millisecond) // the call is on its way; nothing can be waited for
	killed := time.Now()
	p.signal(t, syscall.SIGKILL)
	select {
	case err := <-failed:
		t.Logf("failed after %v: %v", time.Since(killed), err)
		if status.Code(err) != codes.Unavailable {
			t.Fatalf("failed with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the call outlived its server by 5 s")
	}
}

// HTTP over streams, with the deadlines and aborted reads that net/http makes use of.
func TestHTTPOverPeers(t *testing.T) {
	a, b := newNode(t), newNode(t)
	introduce(a, b)
	l := Listener(b, httpProto)
	srv := &http.Server{ReadHeaderTimeout: time.Second, IdleTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprintf(w, "%s %s %d", r.RemoteAddr, r.URL.Path, len(body))
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	dial := Dialer(a, httpProto)
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) { return dial(ctx, addr) },
	}, Timeout: 10 * time.Second}
	big := strings.Repeat("x", 1<<20)
	for range 3 {
		resp, err := client.Post("http://"+b.ID().String()+"/path", "text/plain", strings.NewReader(big))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("%s /path %d", a.ID(), len(big)); string(body) != want {
			t.Fatalf("got %q, want %q", body, want)
		}
		if err := resp.Body.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client.CloseIdleConnections()
	if err := srv.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Fatal(err)
	}
}

// A Listener works over any Peers, also the simulated one, and after Close later streams are reset.
func TestListenerClose(t *testing.T) {
	a, b := newNode(t), newNode(t)
	introduce(a, b)
	l := Listener(b, echoProto)
	if id, ok := PeerOf(l.Addr()); !ok || id != b.ID() {
		t.Fatal("the listener's address is not its peer")
	}
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Fatal(err)
	}
	if err := echoOnce(t.Context(), a, b.ID()); err == nil {
		t.Fatal("a closed listener served")
	}
	if _, err := Dialer(a, echoProto)(t.Context(), "not a peer"); err == nil {
		t.Fatal("dialled nonsense")
	}
}
