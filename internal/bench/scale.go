package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
)

const (
	scaleNodes = 250 // unless Config.Nodes says otherwise
	scaleLost  = 4   // one in so many is lost at once
	// joining is the time in which all nodes come, evenly.
	joining = 20 * time.Second
	// scaleSettle is how long nothing happens before traffic is counted, for scaleIdle.
	scaleSettle  = 70 * time.Second
	scaleIdle    = time.Minute
	scaleWithin  = 5 * time.Minute // virtual
	memberPrefix = "member/"
	// scaleMemory is how much the process may take before it collects garbage all the time.
	scaleMemory = 6500 << 20
)

// ScaleCommand is the command of the binary that is the process of the scale benchmark.
const ScaleCommand = "__scale"

// scale runs the protocol core of many nodes in a process of its own and in virtual time: members, arbiter and records, with what each node
// tells of its machine, the code that nodes run, over a network and disks in memory. Times are what the protocols take where a message takes 250 µs and computing takes nothing.
func scale(ctx context.Context, cfg Config) ([]Result, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("scale: %w", err)
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, cfg.Binary, ScaleCommand, strconv.Itoa(max(cfg.Nodes, 0)), cfg.Profile)
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
	cfg := Config{Progress: os.Stderr}
	if len(os.Args) > 3 {
		cfg.Profile = os.Args[3]
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(scaleMemory)
	}
	os.Args = os.Args[:1]
	testing.Main(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "scale", F: func(t *testing.T) {
		var out scaled
		synctest.Test(t, func(t *testing.T) {
			var err error
			if out.Results, err = simulate(context.Background(), cfg, nodes); err != nil {
				out.Error = err.Error()
			}
		})
		if err := json.NewEncoder(os.NewFile(3, "results")).Encode(out); err != nil {
			t.Error(err)
		}
	}}}, nil, nil)
}

// simulate grows a forest, in a bubble.
func simulate(ctx context.Context, cfg Config, nodes int) (out []Result, err error) {
	w := &forest{cfg: cfg, size: nodes, net: peers.NewNet(7), rng: rand.New(rand.NewPCG(7, 1))}
	defer func() { err = errors.Join(err, w.close()) }()
	if w.profile, err = members.ProfileOf(cfg.Profile); err != nil {
		return nil, err
	}
	return w.grow(ctx)
}

// forest is many nodes.
type forest struct {
	cfg     Config
	profile members.Profile
	size    int
	net     *peers.Net
	rng     *rand.Rand
	trees   []*tree
	gone    []*tree
}

func (w *forest) close() error {
	w.net.Close()
	var errs []error
	for _, n := range append(w.trees, w.gone...) {
		errs = append(errs, n.stop())
	}
	return errors.Join(errs...)
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
	for _, n := range w.trees {
		for p, s := range n.end.SentBy() {
			if out[string(p)] == nil {
				out[string(p)] = map[string]flow{}
			}
			out[string(p)][n.id.String()] = flow{float64(s.Bytes), float64(s.Writes), float64(s.Heard)}
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
	joined, err := w.join(ctx)
	if err != nil {
		return joined, err
	}
	idle, err := w.idle(ctx)
	if err != nil {
		return joined, err
	}
	lost, err := w.lose(ctx)
	return slices.Concat(joined, lost, idle), err
}

func (w *forest) join(ctx context.Context) ([]Result, error) {
	for i := range w.size {
		if err := w.plant(ctx, i); err != nil {
			return nil, fmt.Errorf("node %d: %w", i, err)
		}
		time.Sleep(joining / time.Duration(w.size))
	}
	met, err := w.agree("after they joined")
	if err != nil {
		return nil, err
	}
	w.cfg.say("%d nodes joined within %s and know each other %s after the last came", w.size, joining, met)
	return []Result{
		summary("joined → every node sees every node, after the last came", "ms", []float64{ms(met)}),
		summary(fmt.Sprintf("sent by a node while %d joined within %s, without framing", w.size, joining), "B", w.sent()),
	}, nil
}

// idle counts what is sent while nothing happens: when the voters stand, and the last newcomer's streams are closed.
func (w *forest) idle(ctx context.Context) ([]Result, error) {
	time.Sleep(scaleSettle)
	st := w.trees[0].arb.Status()
	leader := st.Leader.String()
	before := w.byProtocol()
	time.Sleep(scaleIdle)
	after := w.byProtocol()
	if now := w.trees[0].arb.Status(); !st.HasLeader || now.Leader != st.Leader {
		return nil, fmt.Errorf("the leader changed while nothing happened: from %s to %s", st.Leader, now.Leader)
	}
	what := fmt.Sprintf("idle, %s, %d simulated nodes", w.profile.Name, w.size)
	head := fmt.Sprintf("idle, %s, the leader of %d simulated nodes", w.profile.Name, w.size)
	all, lead := causes(what, before, after, scaleIdle, ""), causes(head, before, after, scaleIdle, leader)
	asks := w.questions()
	for i, of := range []*[]Result{&all, &lead} {
		*of = append(*of, mean(fmt.Sprintf("%s: of that questions and answers of yamux on %d idle connections", []string{what, head}[i], w.connections()), "B/s", []float64{asks}))
	}
	w.cfg.say("nodes were idle for %s: %d B are added for each write (TCP/IP, TLS, yamux), %d B for each that was received (its acknowledgement)", scaleIdle, perWrite, perSegment)
	return slices.Concat([]Result{total(what, all), total(head, lead)}, all, lead), ctx.Err()
}

// connections is how many a node has in the long run, for it meets all others: more than are simulated.
func (w *forest) connections() int { return min(w.size-1, dht.MaxConns) }

// questions is what a node sends for them: each end asks and answers now and then, and acknowledges the other's answer.
func (w *forest) questions() float64 {
	return round(float64(w.connections()) * (2*perWrite + perSegment) / dht.KeepAlive(w.profile.Name).Seconds())
}

// total adds causes up.
func total(what string, of []Result) Result {
	sum := 0.0
	for _, r := range of {
		sum += r.Median
	}
	return mean(what+": sent by a node, framing by rule, mean", "B/s", []float64{round(sum)})
}

// fall chooses who is lost: a part of all, and the worst that leaves a majority: the leader and another voter are among them.
func (w *forest) fall() (fall []peer.ID, dead, voters int) {
	st := w.trees[0].arb.Status()
	voters, dead = len(st.Voters), (len(st.Voters)-1)/2
	fall = []peer.ID{st.Leader}
	for _, id := range st.Voters {
		if id != st.Leader && len(fall) < dead {
			fall = append(fall, id)
		}
	}
	for _, i := range w.rng.Perm(len(w.trees)) {
		if id := w.trees[i].id; len(fall) < len(w.trees)/scaleLost && !slices.Contains(st.Voters, id) {
			fall = append(fall, id)
		}
	}
	return fall, dead, voters
}

// lose cuts the power of a part of the nodes at once.
func (w *forest) lose(ctx context.Context) ([]Result, error) {
	fall, dead, voters := w.fall()
	stays := w.trees[:0:0]
	for _, n := range w.trees {
		if slices.Contains(fall, n.id) {
			w.gone = append(w.gone, n)
		} else {
			stays = append(stays, n)
		}
	}
	w.trees = stays
	before, begun := w.sent(), time.Now()
	for _, n := range w.gone {
		w.net.Isolate(n.id) // nobody is told
	}
	for _, n := range w.gone {
		n.cancel()
	}
	tctx, done := context.WithTimeout(ctx, scaleWithin)
	defer done()
	if _, err := w.trees[0].arb.Txn(tctx, arbiter.TxnRequest{Nonce: w.rng.Uint64(), Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: "test/after", Body: []byte("x")}}}}); err != nil {
		return nil, fmt.Errorf("a commit after the loss of %d nodes, %d of %d voters among them: %w", len(fall), dead, voters, err)
	}
	commit := time.Since(begun)
	if _, err := w.agree("after the loss"); err != nil {
		return nil, err
	}
	settled := time.Since(begun)
	w.cfg.say("%d nodes lost power at once, %d of %d voters among them: next commit after %s, all views right after %s", len(fall), dead, voters, commit, settled)
	return []Result{
		summary(fmt.Sprintf("%d of %d nodes lose power at once, %d of %d voters among them → next commit", len(fall), w.size, dead, voters), "ms", []float64{ms(commit)}),
		summary("… → every view is right", "ms", []float64{ms(settled)}),
		summary("… sent by a node until then, without framing", "B", less(w.sent(), before, 1)),
	}, nil
}
