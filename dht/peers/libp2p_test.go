package peers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	grpcpeer "google.golang.org/grpc/peer"
)

// The test binary is also a peer in a process of its own, to be killed and stopped.
const childEnv = "COPPICE_TEST_PEER"

func TestMain(m *testing.M) {
	if listen := os.Getenv(childEnv); listen != "" {
		child(listen)
		return
	}
	os.Exit(m.Run())
}

// child serves echo and a gRPC health service that never answers Watch's second message, until it is killed.
func child(listen string) {
	opts := append(hostOptions(), libp2p.ListenAddrStrings(listen))
	if k := os.Getenv(childEnv + "_KEY"); k != "" {
		b, err := base64.StdEncoding.DecodeString(k)
		if err != nil {
			panic(err)
		}
		key, err := crypto.UnmarshalPrivateKey(b)
		if err != nil {
			panic(err)
		}
		opts = append(opts, libp2p.Identity(key))
	}
	h, err := libp2p.New(opts...)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	p := NewLibp2p(h, func(peer.ID) bool { return true }, nil, slog.New(slog.DiscardHandler))
	p.Handle(echoProto, func(_ peer.ID, s Stream) { _, _ = io.Copy(s, s); _ = s.Close() })
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, &slowHealth{})
	go srv.Serve(Listener(p, grpcProto)) //nolint:errcheck // ends with the process
	fmt.Println("ready", h.ID(), h.Addrs()[0])
	_, _ = io.Copy(io.Discard, os.Stdin) // ends with the parent
}

// slowHealth answers Check("slow") never and others at once.
type slowHealth struct {
	grpc_health_v1.UnimplementedHealthServer
	from atomic.Pointer[peer.ID]
}

func (s *slowHealth) Check(ctx context.Context, r *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	if p, ok := grpcpeer.FromContext(ctx); ok {
		if id, ok := PeerOf(p.Addr); ok {
			s.from.Store(&id)
		}
	}
	if r.Service == "slow" {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
}

const (
	echoProto = "/coppice/test-echo/1"
	grpcProto = "/coppice/test-grpc/1"
	httpProto = "/coppice/test-http/1"
)

func hostOptions() []libp2p.Option {
	return []libp2p.Option{
		libp2p.Transport(tcp.NewTCPTransport, tcp.DisableReuseport()), libp2p.Security(libp2ptls.ID, libp2ptls.New),
		libp2p.DisableRelay(), libp2p.DisableMetrics(), libp2p.ResourceManager(&network.NullResourceManager{}),
	}
}

// node is a host with its Libp2p, which takes those in members for members.
type node struct {
	*Libp2p
	h host.Host

	mu      sync.Mutex
	members map[peer.ID][]ma.Multiaddr
	log     strings.Builder
}

func (n *node) Write(b []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.log.Write(b)
}

func newNode(t *testing.T) *node {
	t.Helper()
	h, err := libp2p.New(append(hostOptions(), libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"))...)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{h: h, members: map[peer.ID][]ma.Multiaddr{}}
	n.Libp2p = NewLibp2p(h, func(id peer.ID) bool { n.mu.Lock(); defer n.mu.Unlock(); return n.members[id] != nil },
		func(id peer.ID) []ma.Multiaddr { n.mu.Lock(); defer n.mu.Unlock(); return n.members[id] }, slog.New(slog.NewTextHandler(n, nil)))
	t.Cleanup(func() {
		n.Close()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *node) meet(id peer.ID, addrs ...ma.Multiaddr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.members[id] = addrs
}

func introduce(a, b *node) {
	a.meet(b.ID(), b.h.Addrs()...)
	b.meet(a.ID(), a.h.Addrs()...)
}

// process is a peer in a process of its own.
type process struct {
	cmd  *exec.Cmd
	id   peer.ID
	addr ma.Multiaddr
}

func startProcess(t *testing.T, listen string, key crypto.PrivKey) *process {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+listen)
	if key != nil {
		b, err := crypto.MarshalPrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, childEnv+"_KEY="+base64.StdEncoding.EncodeToString(b))
	}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: cmd}
	t.Cleanup(p.kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(line)
	if len(f) != 3 || f[0] != "ready" {
		t.Fatalf("the process said %q", line)
	}
	if p.id, err = peer.Decode(f[1]); err != nil {
		t.Fatal(err)
	}
	if p.addr, err = ma.NewMultiaddr(f[2]); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // may be dead already
	_ = p.cmd.Wait()
}

func (p *process) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func echoOnce(ctx context.Context, p Peers, to peer.ID) error {
	s, err := p.Open(ctx, to, echoProto)
	if err != nil {
		return err
	}
	defer s.Reset() //nolint:errcheck // a test's stream
	if err := s.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := s.Write([]byte("hello")); err != nil {
		return err
	}
	_, err = io.ReadFull(s, make([]byte, 5))
	return err
}

// kill -9: the link's end is told within milliseconds, the probe finds proof, and the same peer restarted on the same port is reached
// at once, back-off or not.
func TestKilledPeer(t *testing.T) {
	n := newNode(t)
	key, _, err := crypto.GenerateEd25519Key(nil)
	if err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, "/ip4/127.0.0.1/tcp/0", key)
	n.meet(p.id, p.addr)
	type change struct {
		id peer.ID
		up bool
		at time.Time
	}
	changes := make(chan change, 10)
	n.Notify(func(id peer.ID, up bool) { changes <- change{id, up, time.Now()} })
	if err := echoOnce(t.Context(), n, p.id); err != nil {
		t.Fatal(err)
	}
	if c := <-changes; c.id != p.id || !c.up {
		t.Fatalf("heard %+v", c)
	}
	if o := n.Probe(t.Context(), p.id); o != Reached {
		t.Fatalf("alive: %v", o)
	}
	killed := time.Now()
	p.signal(t, syscall.SIGKILL)
	select {
	case c := <-changes:
		if c.id != p.id || c.up {
			t.Fatalf("heard %+v", c)
		}
		t.Logf("told after %v", c.at.Sub(killed))
	case <-time.After(10 * time.Second):
		t.Fatal("not told")
	}
	// The kernel closes a dead process's sockets one by one: a dial may still be taken by its listener, to be reset then.
	for o := n.Probe(t.Context(), p.id); o != Refused; o = n.Probe(t.Context(), p.id) {
		if time.Since(killed) > 10*time.Second || o == Reached {
			t.Fatalf("dead: %v", o)
		}
	}
	t.Logf("proof after %v", time.Since(killed))
	if err := echoOnce(t.Context(), n, p.id); !errors.Is(err, ErrUnreachable) {
		t.Fatalf("opening to the dead: %v", err)
	}
	p.kill()
	again := startProcess(t, p.addr.String(), key)
	if again.id != p.id {
		t.Fatal("not the same peer")
	}
	if o := n.Probe(t.Context(), p.id); o != Reached {
		t.Fatalf("restarted: %v", o)
	}
	if err := echoOnce(t.Context(), n, p.id); err != nil {
		t.Fatalf("restarted: %v", err)
	}
}

// SIGSTOP: the kernel still accepts, which is no sign of life.
func TestStoppedPeerIsSilent(t *testing.T) {
	n := newNode(t)
	p := startProcess(t, "/ip4/127.0.0.1/tcp/0", nil)
	n.meet(p.id, p.addr)
	if err := echoOnce(t.Context(), n, p.id); err != nil {
		t.Fatal(err)
	}
	p.signal(t, syscall.SIGSTOP)
	for state := byte(0); state != 'T'; { // a signal is not obeyed at once
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		state = stat[bytes.LastIndexByte(stat, ')')+2]
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	if o := n.Probe(ctx, p.id); o != Silent {
		t.Fatalf("stopped: %v", o)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("the probe took %v", d)
	}
	p.signal(t, syscall.SIGCONT)
	ctx2, cancel2 := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel2()
	if o := n.Probe(ctx2, p.id); o != Reached {
		t.Fatalf("awake: %v", o)
	}
}

// What a port says decides: mute, talking nonsense, hanging up at once, somebody else, closed.
func TestProbeOutcomes(t *testing.T) {
	n, other := newNode(t), newNode(t)
	key, _, err := crypto.GenerateEd25519Key(nil)
	if err != nil {
		t.Fatal(err)
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	listener := func(serve func(net.Conn)) ma.Multiaddr {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go serve(c)
			}
		}()
		return ma.StringCast(fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", l.Addr().(*net.TCPAddr).Port))
	}
	mute := listener(func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	nonsense := listener(func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 400 no\r\n\r\n")); _, _ = io.Copy(io.Discard, c) })
	hangup := listener(func(c net.Conn) { _ = c.Close() })
	closed := func() ma.Multiaddr {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() //nolint:errcheck // a test's
		return ma.StringCast(fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", l.Addr().(*net.TCPAddr).Port))
	}()
	for name, c := range map[string]struct {
		addrs []ma.Multiaddr
		want  Outcome
	}{
		"mute":                       {[]ma.Multiaddr{mute}, Silent},
		"nonsense":                   {[]ma.Multiaddr{nonsense}, Silent},
		"hangs up":                   {[]ma.Multiaddr{hangup}, Silent},
		"somebody else":              {other.h.Addrs(), Silent},
		"closed":                     {[]ma.Multiaddr{closed}, Refused},
		"one closed, one mute":       {[]ma.Multiaddr{closed, mute}, Silent},
		"one closed, one unroutable": {[]ma.Multiaddr{closed, ma.StringCast("/ip4/255.255.255.255/tcp/1")}, Silent},
		"no address":                 {nil, Silent},
	} {
		n.meet(id, c.addrs...)
		n.h.Peerstore().ClearAddrs(id) // those of the case before
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		if got := n.Probe(ctx, id); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
		cancel()
	}
	// Once the peer was met at an address, its refusal there counts although another address says nothing.
	n.meet(id, closed, ma.StringCast("/ip4/255.255.255.255/tcp/1"))
	n.h.Peerstore().ClearAddrs(id)
	n.Libp2p.mu.Lock()
	n.proven[id] = closed
	n.Libp2p.mu.Unlock()
	if got := n.Probe(t.Context(), id); got != Refused {
		t.Errorf("refused where it was met: %v", got)
	}
}

// A probe leaves no trace: the probed side is told of no link, so that two watchers cannot probe each other in a circle.
func TestProbeIsNoLink(t *testing.T) {
	a, b := newNode(t), newNode(t)
	introduce(a, b)
	var links atomic.Int32
	b.Notify(func(peer.ID, bool) { links.Add(1) })
	a.Notify(func(peer.ID, bool) { links.Add(1) })
	for range 20 {
		if o := a.Probe(t.Context(), b.ID()); o != Reached {
			t.Fatal(o)
		}
	}
	if n := links.Load(); n != 0 {
		t.Fatalf("%d link changes", n)
	}
}

func TestStreamsOfNonMembersAreReset(t *testing.T) {
	a, b := newNode(t), newNode(t)
	a.meet(b.ID(), b.h.Addrs()...) // b does not know a
	handled := make(chan peer.ID, 10)
	b.Handle(echoProto, func(from peer.ID, s Stream) { handled <- from; _, _ = io.Copy(s, s); _ = s.Close() })
	b.HandleOpen("/coppice/test-open/1", func(from peer.ID, s Stream) { handled <- from; _ = s.Close() })
	for range 2 {
		if err := echoOnce(t.Context(), a, b.ID()); !IsGated(err) {
			t.Fatalf("a stranger's stream: %v", err)
		}
	}
	b.mu.Lock()
	said := strings.Count(b.log.String(), "refused a stream")
	b.mu.Unlock()
	if said != 1 || b.Refused() != 2 || len(handled) != 0 {
		t.Fatalf("logged %d times, counted %d, handled %d", said, b.Refused(), len(handled))
	}
	s, err := a.Open(t.Context(), b.ID(), "/coppice/test-open/1")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	if from := <-handled; from != a.ID() {
		t.Fatal("not from a")
	}
	// Becoming known while the stream waits is soon enough.
	if err := a.Disconnect(b.ID()); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { b.meet(a.ID(), a.h.Addrs()...) })
	if err := echoOnce(t.Context(), a, b.ID()); err != nil {
		t.Fatal(err)
	}
}

func TestOpenSaysWhy(t *testing.T) {
	a, b := newNode(t), newNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := a.Open(ctx, b.ID(), echoProto); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "no address") {
		t.Errorf("unknown address: %v", err)
	}
	introduce(a, b)
	if _, err := a.Open(ctx, b.ID(), "/coppice/none/1"); err == nil || errors.Is(err, ErrUnreachable) {
		t.Errorf("unknown protocol: %v", err)
	}
	if _, err := a.Open(ctx, a.ID(), echoProto); err == nil {
		t.Error("a node dialled itself")
	}
}
