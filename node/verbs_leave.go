package node

import (
	"cmp"
	"context"
	"fmt"
	"slices"
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

// drain has placement move everything away from this node and waits for that.
func (n *Node) drain(ctx context.Context, timeout time.Duration, send func(*apiv1.DrainUpdate) error) error {
	begin := time.Now()
	if timeout <= 0 {
		timeout = 5 * time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	what := "drain " + n.cfg.Name
	if len(n.members.Alive()) < 2 && n.sup.Drained() > 0 {
		return api.Fail(connect.CodeFailedPrecondition, what, "there is no other node to take its components", "coppice token, and join another node first")
	}
	n.members.UpdateSelf(func(i *members.Info) { i.Draining = true })
	was := map[string]bool{}
	for _, reg := range n.mine() {
		was[reg] = true
	}
	if err := send(&apiv1.DrainUpdate{Node: n.cfg.Name, State: "moving", Remaining: uint32(len(was))}); err != nil {
		return err
	}
	moved := uint32(0)
	for {
		left := n.mine()
		for name := range was {
			if slices.Contains(left, name) {
				continue
			}
			delete(was, name)
			moved++
			to := ""
			if reg, ok := n.arbiter.Get(components.InstanceRegister(name)); ok {
				to = n.nameOf(reg.Owner)
			}
			if err := send(&apiv1.DrainUpdate{Node: n.cfg.Name, Instance: name, To: to, State: "moved", Moved: moved, Remaining: uint32(len(left)), TookMs: ms(time.Since(begin))}); err != nil {
				return err
			}
		}
		if len(left) == 0 {
			return send(&apiv1.DrainUpdate{Node: n.cfg.Name, State: "done", Moved: moved, Done: true, TookMs: ms(time.Since(begin))})
		}
		select {
		case <-ctx.Done():
			n.members.UpdateSelf(func(i *members.Info) { i.Draining = false })
			return api.Fail(connect.CodeDeadlineExceeded, what, fmt.Sprintf("still here after %s: %v", timeout, left), "coppice why "+left[0])
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
