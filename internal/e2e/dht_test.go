package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p"
	kaddht "github.com/libp2p/go-libp2p-kad-dht"

	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// signed takes any record that its writer signed.
type signed struct{}

func (signed) Validate(_ string, v []byte) error {
	_, err := records.Decode(v)
	return err
}

// Select takes the newest.
func (signed) Select(_ string, values [][]byte) (int, error) {
	best, at := records.Record{}, -1
	for i, v := range values {
		rec, err := records.Decode(v)
		if err == nil && (at < 0 || rec.Version().Compare(best.Version()) > 0) {
			best, at = rec, i
		}
	}
	if at < 0 {
		return 0, errors.New("none is a record")
	}
	return at, nil
}

// A program that has nothing but kad-dht, the prefix and a client's certificate finds in the DHT who owns an instance and where its last
// checkpoint lies.
func TestStockKadClientFindsOwnerAndCheckpoint(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	in := g.running(n1, "tally/counter-0", protected(3))
	g.counted(n1, 3)

	token, err := dht.DecodeToken(g.token(n1, "--uses", "1"))
	must(t, err)
	h, err := libp2p.New(libp2p.NoListenAddrs)
	must(t, err)
	defer func() { must(t, h.Close()) }()
	w, err := dht.JoinCluster(t.Context(), h, token, nil, true)
	must(t, err)
	defer dht.GreetEveryone(h, w.Cluster, w.Certificate, func(err error) { t.Error(err) })()
	kad, err := kaddht.New(h, kaddht.Mode(kaddht.ModeClient), kaddht.ProtocolPrefix(dht.KadPrefix(w.Cluster)), kaddht.NamespacedValidator(dht.Namespace, signed{}))
	must(t, err)
	defer func() { must(t, kad.Close()) }()

	var own struct {
		Node, Instance string
		Epoch          uint64
	}
	g.wait("the client to find who owns it", func(ctx context.Context) error { return get(ctx, kad, "/kb/own/tally/counter-0", &own) })
	if own.Node != in.GetNode() || own.Instance != "tally/counter-0" || own.Epoch != in.GetEpoch() {
		t.Errorf("/kb/own says %+v; it is on %s in epoch %d", own, in.GetNode(), in.GetEpoch())
	}
	var ckpt struct {
		Nodes []string
		Root  string
		Seq   uint64
		Epoch uint64
	}
	g.wait("the client to find the checkpoint that the cluster has", func(ctx context.Context) error {
		if err := get(ctx, kad, "/kb/ckpt/tally/counter-0", &ckpt); err != nil {
			return err
		}
		now, err := g.instance(ctx, n1, "tally/counter-0")
		if err == nil && (ckpt.Seq != now.GetCheckpointSeq() || len(ckpt.Nodes) != 3) {
			err = fmt.Errorf("the DHT has seq %d on %v, the cluster seq %d on %v", ckpt.Seq, ckpt.Nodes, now.GetCheckpointSeq(), now.GetReplicas())
		}
		return err
	})
	slices.Sort(ckpt.Nodes)
	if !slices.Equal(ckpt.Nodes, []string{"n1", "n2", "n3"}) || ckpt.Epoch != in.GetEpoch() || ckpt.Root == "" {
		t.Errorf("/kb/ckpt says %+v", ckpt)
	}
	rows := g.query(n1, "select root from checkpoints where instance = 'tally/counter-0'")
	if len(rows) != 1 || rows[0]["root"] != ckpt.Root {
		t.Errorf("the DHT's root is %s, the table's %v", ckpt.Root, rows)
	}
	// The owner dies: the DHT names the next one.
	_, err = g.Node(in.GetNode()).Kill()
	must(t, err)
	survivor := g.Alive()[0]
	next := g.running(survivor, "tally/counter-0", notOn(in.GetNode()))
	g.wait("the client to find the next owner", func(ctx context.Context) error {
		if err := get(ctx, kad, "/kb/own/tally/counter-0", &own); err != nil {
			return err
		}
		if own.Node != next.GetNode() || own.Epoch != next.GetEpoch() {
			return fmt.Errorf("%+v; it is on %s in epoch %d", own, next.GetNode(), next.GetEpoch())
		}
		return nil
	})
	for _, n := range g.Alive() {
		if len(g.nodesInState(n, "alive")) != 2 {
			t.Errorf("the client got into the view of %s", n.Name)
		}
	}
}

// get looks a key up as any kad-dht client does, and reads the JSON of the record.
func get(ctx context.Context, kad *kaddht.IpfsDHT, key string, into any) error {
	raw, err := kad.GetValue(ctx, key)
	if err != nil {
		return err
	}
	rec, err := records.Decode(raw)
	if err != nil {
		return err
	}
	return json.Unmarshal(rec.Value, into)
}

// What a node told before it died is still answered elsewhere, with an age that grows.
func TestFactsOfADeadNodeKeepTheirAge(t *testing.T) {
	g := plant(t, 4)
	dead := g.Nodes[3]
	g.wait("the facts of all at each", func(context.Context) error {
		for _, n := range g.Nodes {
			if rows := g.query(n, "select subject, value, age_ms from facts where name = 'free_mib'"); len(rows) != 4 {
				return fmt.Errorf("%s has %v", n.Name, rows)
			}
		}
		return nil
	})
	_, err := dead.Kill()
	must(t, err)
	age := func(n *cluster.Node) float64 {
		rows := g.query(n, "select value, age_ms, source from facts where subject = 'n4' and name = 'free_mib'")
		if len(rows) != 1 || rows[0]["source"] != "n4" {
			t.Fatalf("%s answers %v about the dead node", n.Name, rows)
		}
		ms, ok := rows[0]["age_ms"].(float64)
		if !ok {
			t.Fatalf("the age is %v", rows[0]["age_ms"])
		}
		return ms
	}
	for _, n := range g.Alive() {
		begin := time.Now()
		first := age(n)
		g.wait("the fact to age at "+n.Name, func(context.Context) error {
			if now := age(n); now < first+500 {
				return fmt.Errorf("%v ms, then %v ms", first, now)
			}
			return nil
		})
		if now := age(n); now > first+float64(time.Since(begin).Milliseconds())+1000 {
			t.Errorf("at %s the fact aged from %v to %v ms in %s", n.Name, first, now, time.Since(begin))
		}
	}
}

// placement is whom a node takes for the owner of system/placement, and the first eligible of the nodes closest to its key.
func (g *grove) placement(ctx context.Context, n *cluster.Node) (owner, first, coordinator string, err error) {
	c, err := n.Client()
	if err != nil {
		return "", "", "", err
	}
	near, err := c.DhtClosest(ctx, &apiv1.DhtClosestRequest{Key: "/system/placement"})
	if err != nil {
		return "", "", "", err
	}
	for _, x := range near.GetNodes() {
		if x.GetEligible() && first == "" {
			first = x.GetName()
		}
	}
	st, err := c.Status(ctx, &apiv1.StatusRequest{})
	if err != nil {
		return "", "", "", err
	}
	in, err := g.instance(ctx, n, "system/placement-0")
	if err != nil {
		return "", "", "", err
	}
	if in.GetState() != "running" {
		return "", "", "", fmt.Errorf("system/placement is %s on %s: %s", in.GetState(), in.GetNode(), in.GetReason())
	}
	return in.GetNode(), first, st.GetArbiter().GetCoordinator(), nil
}

// The DHT elects the coordinator: each time it is killed, system/placement runs on the first eligible node of `dht closest /system/placement`,
// and places.
func TestCoordinatorIsFirstOfDHTClosest(t *testing.T) {
	t.Parallel() // it waits most of the time
	coordinators(t, 4, 3)
}

// TestLongCoordinatorIsFirstOfDHTClosest is the same for twenty kills.
func TestLongCoordinatorIsFirstOfDHTClosest(t *testing.T) {
	long(t)
	coordinators(t, 5, 20)
}

func coordinators(t *testing.T, nodes, kills int) {
	g := plant(t, nodes)
	g.push(g.Nodes[0], component(t, "counter", "1.0.0"))
	for kill := range kills {
		var victim string
		g.wait("a coordinator", func(ctx context.Context) (err error) {
			_, _, victim, err = g.placement(ctx, g.Alive()[0])
			if err == nil && victim == "" {
				err = errors.New("nobody is")
			}
			return err
		})
		_, err := g.Node(victim).Kill()
		must(t, err)
		at := time.Now()
		for _, n := range g.Alive() {
			g.wait("placement to run where the DHT says, as "+n.Name+" sees it", func(ctx context.Context) error {
				owner, first, coordinator, err := g.placement(ctx, n)
				if err == nil && (owner != first || coordinator != first || owner == victim) {
					err = fmt.Errorf("it runs on %s, first is %s, the coordinator %s", owner, first, coordinator)
				}
				return err
			})
		}
		t.Logf("%s killed: settled after %s", victim, time.Since(at).Round(time.Millisecond))
		// It does its work.
		g.deploy(g.Alive()[0], fmt.Sprintf("application: tally%d\ncomponents:\n  - name: counter\n    artifact: counter\n", kill))
		g.do(g.Alive()[0], "remove", fmt.Sprintf("tally%d", kill))
		must(t, g.Node(victim).Start(t.Context()))
		g.waitVoters()
	}
}
