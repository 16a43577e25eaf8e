package bench

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
)

// figureOf is the figure whose name contains a text.
func figureOf(t *testing.T, rs []Result, name string) Result {
	t.Helper()
	for _, r := range rs {
		if strings.Contains(r.Name, name) {
			return r
		}
	}
	t.Fatalf("there is no figure %q in %+v", name, rs)
	return Result{}
}

func small(t *testing.T, f func(context.Context, Config) ([]Result, error)) []Result {
	t.Helper()
	out, err := f(t.Context(), Config{Binary: clustertest.Binary(t), Runs: 1, Size: 256 << 10, Span: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if figureOf(t, out, "fsync in the data folder").Median <= 0 {
		t.Error("fsync takes no time")
	}
	return out
}

func TestDurable(t *testing.T) {
	out := small(t, durable)
	for _, name := range []string{"1 callers: latency", "64 callers: latency", "64 callers: throughput"} {
		if r := figureOf(t, out, name); r.Median <= 0 || r.Ratio == nil {
			t.Errorf("%+v", r)
		}
	}
	_, err := exec.LookPath("etcd")
	if r := figureOf(t, out, "1 callers: latency"); strings.HasPrefix(r.Against, "etcd put") != (err == nil) {
		t.Errorf("etcd is here: %v; compared with %q", err == nil, r.Against)
	}
}

// Where there is no etcd the baseline is a log on three disks, and its name says so.
func TestDurableWithoutEtcd(t *testing.T) {
	net, err := cluster.NewLoopback(durableNodes)
	if err != nil {
		t.Fatal(err)
	}
	s := &stand{dir: t.TempDir()}
	if s.cluster, err = cluster.New(cluster.Config{Binary: clustertest.Binary(t), Dir: s.dir, Network: net, Nodes: durableNodes}); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir())
	put, what, end, err := s.durableBaseline(t.Context())
	if err != nil || !strings.HasPrefix(what, "no etcd here") {
		t.Fatalf("%q %v", what, err)
	}
	if took, err := drive(t.Context(), durableCallers[1], 50*time.Millisecond, put); err != nil || len(took) == 0 {
		t.Errorf("%d writes, %v", len(took), err)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}

func TestCheckpoint(t *testing.T) {
	out := small(t, checkpoint)
	if r := figureOf(t, out, "to 3 other nodes and this one"); r.Median <= 0 || r.Ratio == nil {
		t.Errorf("%+v", r)
	}
	if r := figureOf(t, out, "bytes sent, of those of the whole"); r.Median <= 0 || r.Median >= 100 {
		t.Errorf("%+v", r)
	}
}

func TestMove(t *testing.T) {
	out := small(t, move)
	if r := figureOf(t, out, "pause of a move with 256 KiB"); r.Median <= 0 {
		t.Errorf("%+v", r)
	}
	if r := figureOf(t, out, "failed calls"); r.Median != 0 {
		t.Errorf("%+v", r)
	}
}
