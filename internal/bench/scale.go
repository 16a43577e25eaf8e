package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
)

const (
	scaleNodes = 200 // unless Config.Nodes says otherwise
	scaleLost  = 4   // one in so many is lost at once
	// joining is the time in which all nodes come, evenly.
	joining = 20 * time.Second
	// scaleIdle is how long traffic is counted while nothing happens.
	scaleIdle    = 10 * time.Second
	scaleWithin  = 5 * time.Minute // virtual
	memberPrefix = "member/"
)

// ScaleCommand is the command of the binary that is the process of the scale benchmark.
const ScaleCommand = "__scale"

// scale runs the protocol core of many nodes in a process of its own and in virtual time: members and arbiter, the code that nodes run,
// over a network and disks in memory. Times are what the protocols take where a message takes 250 µs and computing takes nothing.
func scale(ctx context.Context, cfg Config) ([]Result, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("scale: %w", err)
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, cfg.Binary, ScaleCommand, strconv.Itoa(max(cfg.Nodes, 0)))
	cmd.Stderr, cmd.ExtraFiles = cfg.Progress, []*os.File{w}
	err = cmd.Start()
	if err = errors.Join(err, w.Close()); err != nil {
		return nil, fmt.Errorf("scale: %w", err)
	}
	var out scaled
	read := json.NewDecoder(r).Decode(&out)
	err = cmd.Wait()
	switch {
	case out.Error != "":
		return out.Results, errors.New(out.Error)
	case err != nil:
		return out.Results, fmt.Errorf("the simulated nodes did not come to an end: %w", err)
	}
	return out.Results, read
}

// scaled is what the process of the scale benchmark tells on its file 3.
type scaled struct {
	Results []Result `json:"results"`
	Error   string   `json:"error"`
}

// ServeScale is the process of the scale benchmark; it does not return. Only tests have virtual time in the standard library, so it is one.
func ServeScale() {
	nodes := scaleNodes
	if len(os.Args) > 2 {
		if n, err := strconv.Atoi(os.Args[2]); err == nil && n > 0 {
			nodes = n
		}
	}
	os.Args = os.Args[:1]
	testing.Main(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "scale", F: func(t *testing.T) {
		var out scaled
		synctest.Test(t, func(t *testing.T) {
			var err error
			if out.Results, err = simulate(context.Background(), Config{Progress: os.Stderr}, nodes); err != nil {
				out.Error = err.Error()
			}
		})
		if err := json.NewEncoder(os.NewFile(3, "results")).Encode(out); err != nil {
			t.Error(err)
		}
	}}}, nil, nil)
}

// simulate grows a forest, in a bubble.
func simulate(ctx context.Context, cfg Config, nodes int) ([]Result, error) {
	w := &forest{cfg: cfg, size: nodes, net: peers.NewNet(7), rng: rand.New(rand.NewPCG(7, 1))}
	defer w.close()
	return w.grow(ctx)
}

// forest is many nodes.
type forest struct {
	cfg   Config
	size  int
	net   *peers.Net
	rng   *rand.Rand
	trees []*tree
	gone  []*tree
}

// tree is a node's protocol core.
type tree struct {
	id      peer.ID
	end     *peers.Endpoint
	members *members.Members
	arb     *arbiter.Arbiter
	cancel  context.CancelFunc
	goes    sync.WaitGroup
}

func scaleID(n int) peer.ID {
	b := make([]byte, 34)
	b[0], b[1] = 0x12, 0x20
	r := rand.New(rand.NewPCG(uint64(n), 99))
	for i := 2; i < len(b); i++ {
		b[i] = byte(r.Uint64())
	}
	return peer.ID(b)
}

func (w *forest) plant(ctx context.Context, i int) (*tree, error) {
	n := &tree{id: scaleID(i)}
	n.end = w.net.Join(n.id)
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	boot := w.rng.Uint64()
	info := members.Info{ID: n.id, Name: fmt.Sprintf("n%d", i), Boot: boot, Addrs: []string{fmt.Sprintf("/mem/%d", i)}, Role: "full"}
	begun := time.Now()
	clock := func() time.Duration { return time.Since(begun) }
	var err error
	n.members, err = members.New(members.Config{Self: info, Peers: n.end, Links: n.end, BootTime: clock, Rand: rand.New(rand.NewPCG(boot, 1)), Log: quiet})
	if err != nil {
		return nil, err
	}
	if len(w.trees) > 0 { // what a newcomer is told by the node that it joins at
		for _, m := range w.trees[w.rng.IntN(len(w.trees))].members.All() {
			n.members.Admit(m.Info)
		}
	}
	var mu sync.Mutex
	nonces := rand.New(rand.NewPCG(boot, 2))
	n.arb, err = arbiter.New(arbiter.Config{
		Self: n.id, Boot: boot, Peers: n.end, Links: n.end, Members: arbiter.FromMembers(n.members), FS: vfs.NewCrashableMem(), Dir: "raft", Log: quiet, BootTime: clock,
		Rand: func() uint64 { mu.Lock(); defer mu.Unlock(); return nonces.Uint64() },
	})
	if err != nil {
		return nil, err
	}
	if len(w.trees) == 0 {
		if _, err := n.arb.Bootstrap(""); err != nil {
			return nil, err
		}
	}
	unwatch := n.arb.Watch(func(_, now *arbiter.Register) { // as nodes do: who was admitted is a member
		if now == nil || !strings.HasPrefix(now.Key, memberPrefix) {
			return
		}
		if m, err := members.DecodeInfo(now.Body); err == nil {
			n.members.Admit(m)
		}
	})
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	n.cancel = func() { unwatch(); cancel() }
	for _, f := range []func(context.Context) error{n.members.Run, n.arb.Run} {
		n.goes.Go(func() { f(run) }) //nolint:errcheck // ends with run
	}
	// Its admission is committed at one of those that are there.
	by := n
	if len(w.trees) > 0 {
		by = w.trees[w.rng.IntN(len(w.trees))]
	}
	w.trees = append(w.trees, n)
	ctx, done := context.WithTimeout(ctx, scaleWithin)
	defer done()
	_, err = by.arb.Txn(ctx, arbiter.TxnRequest{Nonce: w.rng.Uint64(), Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: memberPrefix + n.id.String(), Body: members.EncodeInfo(info)}}}})
	return n, err
}

func (n *tree) stop() {
	n.cancel()
	n.goes.Wait()
	n.arb.Close() //nolint:errcheck // in memory
}

func (w *forest) close() {
	w.net.Close()
	for _, n := range append(w.trees, w.gone...) {
		n.stop()
	}
}

// agree waits until every node sees exactly the nodes that are there, and returns how long that took.
func (w *forest) agree(what string) (time.Duration, error) {
	begun := time.Now()
	for from := 0; ; {
		// To look at all views all the time would be most of the work: the first that is off says enough.
		at := slices.IndexFunc(w.trees[from:], func(n *tree) bool { return len(n.members.Alive()) != len(w.trees) })
		switch {
		case at < 0 && from == 0:
			return time.Since(begun), nil
		case at < 0:
			from = 0
			continue
		case time.Since(begun) > scaleWithin:
			return 0, fmt.Errorf("%s: after %s node %d of %d still sees others than are there", what, scaleWithin, from+at, len(w.trees))
		}
		from += at
		time.Sleep(50 * time.Millisecond)
	}
}

// sent is what the nodes have sent, in bytes, each.
func (w *forest) sent() []float64 {
	var out []float64
	for _, n := range w.trees {
		_, bytes := n.end.Sent()
		out = append(out, float64(bytes))
	}
	return out
}

// byProtocol is the same by protocol and node.
func (w *forest) byProtocol() map[string]map[string]flow {
	out := map[string]map[string]flow{}
	for i, n := range w.trees {
		for p, s := range n.end.SentBy() {
			if out[string(p)] == nil {
				out[string(p)] = map[string]flow{}
			}
			out[string(p)][fmt.Sprint(i)] = flow{float64(s.Bytes), float64(s.Writes)}
		}
	}
	return out
}

func less(a, b []float64, by float64) []float64 {
	out := make([]float64, len(a))
	for i := range a {
		out[i] = (a[i] - b[i]) / by
	}
	return out
}

func (w *forest) grow(ctx context.Context) ([]Result, error) {
	for i := range w.size {
		if _, err := w.plant(ctx, i); err != nil {
			return nil, fmt.Errorf("node %d: %w", i, err)
		}
		time.Sleep(joining / time.Duration(w.size))
	}
	met, err := w.agree("after they joined")
	if err != nil {
		return nil, err
	}
	join := w.sent()
	w.cfg.say("%d nodes joined within %s and know each other %s after the last came", w.size, joining, met)
	time.Sleep(10 * time.Second)
	from, causesFrom := w.sent(), w.byProtocol()
	time.Sleep(scaleIdle)
	idle := less(w.sent(), from, scaleIdle.Seconds())
	why := causes(fmt.Sprintf("idle, %d simulated nodes", w.size), causesFrom, w.byProtocol(), scaleIdle)

	// The worst that leaves a majority: the leader and another voter are among them.
	st := w.trees[0].arb.Status()
	voters, dead := len(st.Voters), (len(st.Voters)-1)/2
	fall := []peer.ID{st.Leader}
	for _, id := range st.Voters {
		if id != st.Leader && len(fall) < dead {
			fall = append(fall, id)
		}
	}
	lost := len(w.trees) / scaleLost
	for _, i := range w.rng.Perm(len(w.trees)) {
		if id := w.trees[i].id; len(fall) < lost && !slices.Contains(st.Voters, id) {
			fall = append(fall, id)
		}
	}
	stays := w.trees[:0:0]
	for _, n := range w.trees {
		if slices.Contains(fall, n.id) {
			w.gone = append(w.gone, n)
		} else {
			stays = append(stays, n)
		}
	}
	w.trees = stays
	before := w.sent()
	for _, id := range fall {
		w.net.Isolate(id)
	}
	begun := time.Now()
	tctx, done := context.WithTimeout(ctx, scaleWithin)
	defer done()
	if _, err := w.trees[0].arb.Txn(tctx, arbiter.TxnRequest{Nonce: w.rng.Uint64(), Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: "test/after", Body: []byte("x")}}}}); err != nil {
		return nil, fmt.Errorf("a commit after the loss of %d nodes, %d of %d voters among them: %w", lost, dead, voters, err)
	}
	commit := time.Since(begun)
	if _, err := w.agree("after the loss"); err != nil {
		return nil, err
	}
	settled := time.Since(begun)
	w.cfg.say("%d nodes lost power at once, %d of %d voters among them: next commit after %s, all views right after %s", lost, dead, voters, commit, settled)
	storm := less(w.sent(), before, 1)
	return append([]Result{
		summary("joined → every node sees every node, after the last came", "ms", []float64{ms(met)}),
		summary(fmt.Sprintf("sent by a node while %d joined within %s", w.size, joining), "B", join),
		summary("idle: sent by a node, without framing", "B/s", idle),
		summary(fmt.Sprintf("%d of %d nodes lose power at once, %d of %d voters among them → next commit", lost, w.size, dead, voters), "ms", []float64{ms(commit)}),
		summary("… → every view is right", "ms", []float64{ms(settled)}),
		summary("… sent by a node until then", "B", storm),
	}, why...), nil
}
