package node

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (v *verbs) Down(ctx context.Context, r *apiv1.DownRequest) (*apiv1.DownResponse, error) {
	begin := time.Now()
	if !r.GetAll() || api.ForwardedFrom(ctx) != "" {
		actx, done := context.WithTimeout(ctx, aheadWithin)
		n := v.n.finalCheckpoints(actx)
		done()
		v.n.stopSoon(whyDown)
		return &apiv1.DownResponse{Nodes: []*apiv1.DownNode{{Node: v.n.cfg.Name, Stopped: true}}, Checkpoints: n, TookMs: ms(time.Since(begin))}, nil
	}
	out := &apiv1.DownResponse{Checkpoints: v.n.finalCheckpoints(ctx)}
	if err := v.n.put(ctx, pausedKey, []byte(time.Now().UTC().Format(time.RFC3339))); err != nil {
		return nil, fail("down --all", fmt.Errorf("commit that the cluster is paused: %w", err))
	}
	v.n.resting(ctx)
	// Voters last: each node still needs the arbiter for its final checkpoints.
	voters := v.n.arbiter.Status().Voters
	list := v.n.members.Alive()
	slices.SortStableFunc(list, func(a, b members.Member) int {
		return cmp.Compare(btoi(slices.Contains(voters, a.ID)), btoi(slices.Contains(voters, b.ID)))
	})
	for _, m := range list {
		if m.ID == v.n.id {
			continue
		}
		node := &apiv1.DownNode{Node: m.Name}
		c, err := api.Forward(ctx, v.n, m.ID.String())
		if err == nil {
			var res *apiv1.DownResponse
			if res, err = c.Down(ctx, &apiv1.DownRequest{All: true, TimeoutMs: r.GetTimeoutMs()}); err == nil {
				node.Stopped = true
				out.Checkpoints += res.GetCheckpoints()
			}
		}
		if err != nil {
			node.Reason = err.Error()
		}
		out.Nodes = append(out.Nodes, node)
	}
	out.Nodes = append(out.Nodes, &apiv1.DownNode{Node: v.n.cfg.Name, Stopped: true})
	out.TookMs = ms(time.Since(begin))
	v.n.stopSoon("down --all")
	return out, nil
}

// answerTime is what the answer to a command that ends the node gets to leave it.
const answerTime = 200 * time.Millisecond

// stopSoon ends Run once the answer that says so had time to reach who asked, maybe through another node.
func (n *Node) stopSoon(why string) {
	time.AfterFunc(answerTime, func() { n.Stop(why) })
}

// finalCheckpoints saves what runs here, while it goes on, and returns how many instances that were. A failure is logged: it is tried again when they are at rest.
func (n *Node) finalCheckpoints(ctx context.Context) uint32 {
	var count atomic.Uint32
	var wg sync.WaitGroup
	for _, in := range n.sup.Infos() {
		if !in.State.Serves() || in.Durable == "none" {
			continue
		}
		wg.Go(func() {
			if _, err := n.sup.Checkpoint(ctx, in.Instance); err != nil {
				n.log.Warn("checkpoint ahead of the stop", "instance", in.Instance, "error", err)
				return
			}
			count.Add(1)
		})
	}
	wg.Wait()
	return count.Load()
}

// resting waits until everything in the paused cluster is at rest: the last checkpoints need a majority of the voters, which the next nodes to stop may be.
func (n *Node) resting(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, saveWithin)
	defer cancel()
	var left []string
	if !n.waitFor(ctx, saveWithin, func() bool {
		left = nil
		for _, in := range n.instances("") {
			if components.State(in.GetState()).Serves() {
				left = append(left, in.GetInstance())
			}
		}
		return len(left) == 0
	}) {
		n.log.Error("the cluster stops although not everything is at rest", "instances", left)
	}
}

// handWithin bounds the first try of a drain to give the vote up; what runs here then moves before the next one.
const handWithin = 30 * time.Second

// drain gives leadership and vote of this node to others, has placement move everything away from it, and waits for both.
func (n *Node) drain(ctx context.Context, timeout time.Duration, send func(*apiv1.DrainUpdate) error) error {
	if timeout <= 0 {
		timeout = 5 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if len(n.members.Alive()) < 2 && n.sup.Drained() > 0 {
		return api.Fail(connect.CodeFailedPrecondition, "drain "+n.cfg.Name, "there is no other node to take its components", "coppice token, and join another node first")
	}
	n.members.UpdateSelf(func(i *members.Info) { i.Draining = true })
	d := &draining{n: n, what: "drain " + n.cfg.Name, begin: time.Now(), timeout: timeout, send: send}
	err := d.run(ctx)
	if err != nil {
		n.members.UpdateSelf(func(i *members.Info) { i.Draining = false })
	}
	return err
}

// draining is one drain of this node.
type draining struct {
	n       *Node
	what    string
	begin   time.Time
	timeout time.Duration
	send    func(*apiv1.DrainUpdate) error
	moved   uint32
}

func (d *draining) run(ctx context.Context) error {
	// The leadership first: a leader that is emptied and stopped while everything moves through its log makes all of it wait for an election.
	hctx, cancel := context.WithTimeout(ctx, handWithin)
	err := d.hand(hctx)
	cancel()
	if err != nil && ctx.Err() == nil {
		n := d.n
		n.log.Warn("a drain: the vote is not given up yet; what runs here moves first", "error", err)
		if err := d.send(&apiv1.DrainUpdate{Node: n.cfg.Name, State: "voting", Reason: "it still " + n.duty() + ": " + n.voteStuck()}); err != nil {
			return err
		}
	}
	if err := d.move(ctx); err != nil {
		return err
	}
	if d.hand(ctx) != nil {
		return api.Fail(connect.CodeDeadlineExceeded, d.what, fmt.Sprintf("nothing runs here any more, but after %s it still %s: %s", d.timeout, d.n.duty(), d.n.voteStuck()), "coppice status")
	}
	done := &apiv1.DrainUpdate{Node: d.n.cfg.Name, State: "done", Moved: d.moved, Done: true, TookMs: ms(time.Since(d.begin))}
	if d.n.votes() && !d.n.othersMayVote() {
		done.Reason = lastVoter
	}
	return d.send(done)
}

// lastVoter says why a drained node still votes.
const lastVoter = "it goes on voting, for no other node may"

// votes says whether this node has a vote, as far as it knows.
func (n *Node) votes() bool { return slices.Contains(n.arbiter.Status().Voters, n.id) }

// duty is what a node that is to give its vote up still does.
func (n *Node) duty() string {
	if st := n.arbiter.Status(); st.HasLeader && st.Leader == n.id {
		return "leads"
	}
	return "votes"
}

// voteStuck says what keeps the vote here.
func (n *Node) voteStuck() string {
	st := n.arbiter.Status()
	if !st.HasLeader {
		return "the arbiter has no leader that could take the vote away"
	}
	var voters []string
	for _, id := range st.Voters {
		m, _ := n.members.Member(id)
		voters = append(voters, fmt.Sprintf("%s (%s)", n.nameOf(id), m.State))
	}
	return "without it too few of the voters would be in touch: " + strings.Join(voters, ", ")
}

// othersMayVote says whether there is another node that could vote in this one's place.
func (n *Node) othersMayVote() bool {
	return slices.ContainsFunc(n.members.Alive(), func(m members.Member) bool {
		return m.ID != n.id && !m.NoVoter && !m.Draining && m.Role != components.RoleWorker
	})
}

// hand gives leadership and vote up, if this node has them and another one may have them.
func (d *draining) hand(ctx context.Context) error {
	n := d.n
	if !n.votes() || !n.othersMayVote() {
		return nil
	}
	led := n.duty() == "leads"
	if err := d.send(&apiv1.DrainUpdate{Node: n.cfg.Name, State: "handing over"}); err != nil {
		return err
	}
	if err := n.arbiter.StepDown(ctx); err != nil {
		return err
	}
	if st := n.arbiter.Status(); led && st.HasLeader && st.Leader != n.id {
		return d.send(&apiv1.DrainUpdate{Node: n.cfg.Name, State: "handed over", To: n.nameOf(st.Leader), TookMs: ms(time.Since(d.begin))})
	}
	return nil
}

// move waits until placement has moved everything.
func (d *draining) move(ctx context.Context) error {
	n := d.n
	was := map[string]bool{}
	for _, reg := range n.mine() {
		was[reg] = true
	}
	if err := d.send(&apiv1.DrainUpdate{Node: n.cfg.Name, State: "moving", Remaining: uint32(len(was))}); err != nil {
		return err
	}
	for {
		left := n.mine()
		for name := range was {
			if slices.Contains(left, name) {
				continue
			}
			delete(was, name)
			d.moved++
			to := ""
			if reg, ok := n.arbiter.Get(components.InstanceRegister(name)); ok {
				to = n.nameOf(reg.Owner)
			}
			err := d.send(&apiv1.DrainUpdate{
				Node: n.cfg.Name, Instance: name, To: to, State: "moved", Moved: d.moved, Remaining: uint32(len(left)), TookMs: ms(time.Since(d.begin)),
			})
			if err != nil {
				return err
			}
		}
		if len(left) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return api.Fail(connect.CodeDeadlineExceeded, d.what, fmt.Sprintf("still here after %s: %v", d.timeout, left), "coppice why "+left[0])
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// mine lists the instances this node owns and that can live elsewhere.
func (n *Node) mine() []string {
	var out []string
	for _, reg := range n.arbiter.List(components.InstancePrefix) {
		var body componentsv1.InstanceBody
		if reg.Owner == n.id && proto.Unmarshal(reg.Body, &body) == nil && body.GetEachNode() == "" && !systemComponent(body.GetComponent()) {
			name := components.InstanceOfKey(reg.Key)
			out = append(out, name)
		}
	}
	return out
}
