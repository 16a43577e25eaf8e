package membrane

import (
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/components/runner/runnertest"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// BenchmarkCall compares one read: straight to the component, through this process's gate, and as another component would call it, through
// the node's socket.
func BenchmarkCall(b *testing.B) {
	run, err := runner.New(runner.Config{})
	if err != nil {
		b.Fatal(err)
	}
	dir := shortDir(b)
	p, err := run.Start(b.Context(), runner.Spec{
		Instance: instance, Exec: runner.ExecFile{Path: "/proc/self/exe"}, Env: []string{runnertest.EnvQuickExit},
		RunDir: filepath.Join(dir, "r"), LogDir: dir,
	})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Kill() //nolint:errcheck // benchmark
	m, d := New(Config{Instance: instance}), newDirectory()
	if _, err := m.Attach(p, runnertest.Description("1.0"), Token{1, 1}); err != nil {
		b.Fatal(err)
	}
	if err := m.Start(b.Context(), &componentv1.StartRequest{Instance: instance}); err != nil {
		b.Fatal(err)
	}
	defer m.unwatch()
	r := NewRouter(RouterConfig{Self: "n1", Caller: "x", Directory: d})
	r.Add(m)
	d.set("test/counter", &Route{Instance: instance, Node: "n1", Token: Token{1, 1}})
	l, err := listenIn(dir)
	if err != nil {
		b.Fatal(err)
	}
	s := NewServer(r.ClientHandler())
	go s.Serve(l) //nolint:errcheck // stopped below
	defer s.Stop()
	socket, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	ctx := with(b.Context(), componentv1.MetaTarget, "test/counter")
	for _, way := range []struct {
		name string
		conn grpc.ClientConnInterface
	}{{"direct", p.Conn()}, {"gate", r.Conn("test/counter", "")}, {"socket", socket}} {
		b.Run(way.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var out wrapperspb.Int64Value
				if err := way.conn.Invoke(ctx, runnertest.Get, &emptypb.Empty{}, &out); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
