package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster"
)

// TestWhatIsNotSavedIsShown: how many calls were answered since the last checkpoint, and on how many living nodes that is, stands in ps, inspect, status, SQL and the
// metrics, from any node; a checkpoint makes it none, and the death of a holder one copy less until it is made again.
func TestWhatIsNotSavedIsShown(t *testing.T) {
	g := plant(t, 4)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, strings.Replace(counterApp, "durable: each-call", "durable: 1h", 1))
	in := g.running(n1, "tally/counter-0", protected(3))
	owner := g.Node(in.GetNode())
	asked := g.others(owner)[0]
	g.counted(asked, 5)
	g.unsaved(owner, 5)
	rows := g.query(owner, "SELECT calls_since_checkpoint, replicas_alive, durable_now FROM instances WHERE instance = 'tally/counter-0'")
	if len(rows) != 1 || fmt.Sprint(rows[0]["calls_since_checkpoint"]) != "5" || fmt.Sprint(rows[0]["replicas_alive"]) != "3" || rows[0]["durable_now"] != "1h0m0s" {
		t.Errorf("SQL says %v", rows)
	}
	g.wait("another node to know", func(ctx context.Context) error {
		in, err := g.instance(ctx, asked, "tally/counter-0")
		if err == nil && in.GetCallsSinceCheckpoint() != 5 {
			err = fmt.Errorf("%d calls", in.GetCallsSinceCheckpoint())
		}
		return err
	})
	g.do(asked, "checkpoint", "tally/counter")
	g.unsaved(owner, 0)

	var holder *cluster.Node
	for _, name := range in.GetReplicas() {
		if name != owner.Name {
			holder = g.Node(name)
		}
	}
	_, err := holder.Kill()
	must(t, err)
	g.running(owner, "tally/counter-0", protected(3)) // on three living ones again
	g.wait("three living nodes to hold it", func(ctx context.Context) error {
		in, err := g.instance(ctx, owner, "tally/counter-0")
		if err == nil && in.GetReplicasAlive() != 3 {
			err = fmt.Errorf("%d do", in.GetReplicasAlive())
		}
		return err
	})
}

// unsaved waits until the owner says everywhere that so many calls are not in a checkpoint.
func (g *grove) unsaved(owner *cluster.Node, want uint64) {
	g.t.Helper()
	g.wait(fmt.Sprintf("%d calls to be unsaved", want), func(ctx context.Context) error {
		in, err := g.instance(ctx, owner, "tally/counter-0")
		if err != nil {
			return err
		}
		if in.CallsSinceCheckpoint == nil || in.GetCallsSinceCheckpoint() != want {
			return fmt.Errorf("ps says %d", in.GetCallsSinceCheckpoint())
		}
		st, err := g.status(ctx, owner)
		if err != nil {
			return err
		}
		if st.GetUnsaved().GetCalls() != want {
			return fmt.Errorf("status says %d", st.GetUnsaved().GetCalls())
		}
		text, err := metrics(ctx, owner)
		if err != nil {
			return err
		}
		if line := fmt.Sprintf("coppice_calls_since_checkpoint{instance=\"tally/counter-0\"} %d\n", want); !strings.Contains(text, line) {
			return fmt.Errorf("the metrics lack %q", line)
		}
		if !strings.Contains(text, "coppice_checkpoint_holders_alive{instance=\"tally/counter-0\"} ") {
			return fmt.Errorf("the metrics do not say who holds it")
		}
		return nil
	})
}

func metrics(ctx context.Context, n *cluster.Node) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.HTTP+"/metrics", nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}
