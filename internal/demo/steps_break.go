package demo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// failoverWithin is how long anything may take until the store answers again.
const failoverWithin = 20 * time.Second

// kill: the owner's machine is gone, processes and all.
func (d *demo) kill(ctx context.Context) (string, error) {
	victim := d.cluster.Node(d.owner)
	in, err := d.store(ctx, d.survivor(d.owner))
	if err != nil {
		return "", err
	}
	predicted := in.GetWouldRestartOn()
	at, err := victim.Kill()
	if err != nil {
		return "", err
	}
	first, err := d.answered(ctx, at, victim.Name)
	if err != nil {
		return "", err
	}
	if first.Node != predicted {
		return "", fmt.Errorf("it was taken over by %s, predicted was %s", first.Node, predicted)
	}
	text, err := d.aftermath(ctx, at, victim)
	took := first.Time.Sub(at)
	d.figure("answered_ms", float64(took.Microseconds())/1000)
	return fmt.Sprintf("%s and its components · answered on %s after %s · %s", victim.Name, first.Node, msOf(took), text), err
}

// answered waits for the first write of the store that another node than the victim answers.
func (d *demo) answered(ctx context.Context, at time.Time, victim string) (load.First, error) {
	ctx, cancel := context.WithTimeout(ctx, failoverWithin)
	defer cancel()
	return d.load.Await(ctx, load.FirstQuery{After: at, Component: storeComponent, NotNode: victim, Writes: true})
}

// aftermath waits until all is well without the victim and says what the loss of it cost.
func (d *demo) aftermath(ctx context.Context, at time.Time, victim *cluster.Node) (string, error) {
	if err := d.calm(ctx, d.survivor(victim.Name)); err != nil {
		return "", err
	}
	f, err := d.since(at, "")
	if err != nil {
		return "", err
	}
	rep, err := d.checked()
	if err != nil {
		return "", err
	}
	d.figure("retried", f.Retried)
	return fmt.Sprintf("lost 0/%d · doubled 0 · retried %d", rep.Answered, f.Retried), d.noneFailed()
}

// cut: the owner's link is gone. Nobody is told; it goes on without the others, who have to find out.
func (d *demo) cut(ctx context.Context) (string, error) {
	victim := d.cluster.Node(d.owner)
	epoch, pid := d.epoch, d.pid
	at, what := time.Now(), "'s link down"
	err := victim.Cut()
	suspended := errors.Is(err, cluster.ErrNoCut)
	if suspended {
		at, err = victim.Stop()
		what = " suspended (SIGSTOP: loopback has no link to cut)"
	}
	if err != nil {
		return "", err
	}
	witness := d.survivor(victim.Name)
	var confirmed time.Duration
	var seen error
	var wg sync.WaitGroup
	wg.Go(func() { confirmed, seen = d.seenDead(ctx, witness, victim, at) })
	first, err := d.answered(ctx, at, victim.Name)
	wg.Wait()
	if err = errors.Join(err, seen); err != nil {
		return "", err
	}
	d.isolated = startProbe(victim, epoch, pid, suspended)
	text, err := d.aftermath(ctx, at, victim)
	if err != nil {
		return "", err
	}
	took := first.Time.Sub(at)
	d.figure("confirmed_ms", confirmed.Milliseconds())
	d.figure("answered_ms", took.Milliseconds())
	lost, _, _ := strings.Cut(text, " · ")
	return fmt.Sprintf("%s%s: confirmed %s, answered on %s %s · %s", victim.Name, what, msOf(confirmed), first.Node, msOf(took), lost), nil
}

func (d *demo) seenDead(ctx context.Context, witness, victim *cluster.Node, at time.Time) (time.Duration, error) {
	c, err := witness.Client()
	if err != nil {
		return 0, err
	}
	err = cluster.WaitFor(ctx, failoverWithin, witness.Name+" to confirm that "+victim.Name+" is gone", func(ctx context.Context) (bool, error) {
		res, err := c.Nodes(ctx, &apiv1.NodesRequest{Node: victim.Name})
		return err == nil && len(res.GetNodes()) == 1 && res.GetNodes()[0].GetState() == "dead", err
	})
	return time.Since(at), err
}

// probe asks a node that was taken over from, through its own control API, which no cut link disturbs. A write that it answers itself would be
// a stale owner's answer, and so would a read once it is back. (A read before that is none of the guarantees: until it has lost touch for
// 3 s a node does not know that it is alone.)
type probe struct {
	node  *cluster.Node
	epoch uint64 // that it owned
	pid   int    // of its process
	// suspended: by SIGSTOP; else its link was cut
	suspended bool
	back      atomic.Bool // it can be reached again
	cancel    context.CancelFunc
	done      sync.WaitGroup
	asked     atomic.Int64
	served    atomic.Int64 // by itself
	refused   atomic.Int64
	mu        sync.Mutex // guards why
	why       string
}

func startProbe(n *cluster.Node, epoch uint64, pid int, suspended bool) *probe {
	ctx, cancel := context.WithCancel(context.Background())
	p := &probe{node: n, epoch: epoch, pid: pid, suspended: suspended, cancel: cancel}
	for i := range 2 { // a reader and a writer
		p.done.Go(func() { p.run(ctx, i == 1) })
	}
	return p
}

func (p *probe) run(ctx context.Context, write bool) {
	req := &apiv1.CallRequest{Component: storeComponent, Method: "shop.v1.Store/Ledger", TimeoutMs: 500}
	if write {
		req.Method, req.Json = "shop.v1.Store/SetLine", `{"cart": "probe", "isbn": "0", "quantity": 0}`
	}
	for ctx.Err() == nil {
		c, err := p.node.Client()
		if err == nil {
			var res *apiv1.CallResponse
			counts := write || p.back.Load()
			p.asked.Add(1)
			actx, cancel := context.WithTimeout(ctx, 2*time.Second)
			res, err = c.Call(actx, req)
			cancel()
			if err == nil && counts && res.GetNode() == p.node.Name {
				p.served.Add(1)
			}
		}
		if err != nil && ctx.Err() == nil {
			p.refused.Add(1)
			p.mu.Lock()
			p.why = err.Error()
			p.mu.Unlock()
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (p *probe) stop() {
	p.cancel()
	p.done.Wait()
}

// wake: the old owner is back and finds out that it is not the owner.
func (d *demo) wake(ctx context.Context) (string, error) {
	p := d.isolated
	n := p.node
	since := time.Now()
	p.back.Store(true)
	back := "'s link up"
	if p.suspended {
		back = " awake"
		if _, err := n.Cont(); err != nil {
			return "", err
		}
	} else if err := n.Heal(); err != nil {
		return "", err
	}
	now, err := d.fenced(ctx, p)
	if err == nil {
		err = d.allAlive(ctx)
	}
	took := time.Since(since)
	if err == nil {
		err = cluster.Sleep(ctx, 500*time.Millisecond) // of asking it while it is a member again
	}
	p.stop()
	d.isolated = nil
	if err != nil {
		return "", err
	}
	served, refused := p.served.Load(), p.refused.Load()
	switch {
	case served > 0:
		return "", fmt.Errorf("%s served %d calls itself after it had been taken over from", n.Name, served)
	case refused == 0:
		return "", fmt.Errorf("%s was asked %d times and refused nothing: it was never isolated", n.Name, p.asked.Load())
	}
	d.figure("served_by_stale_owner", served)
	d.figure("asked", p.asked.Load())
	d.figure("back_ms", took.Milliseconds())
	return fmt.Sprintf("%s%s: stale owner refused (epoch %d < %d), %d of %d calls served by it", n.Name, back, p.epoch, now, served, p.asked.Load()), d.noneFailed()
}

// fenced waits until the old owner itself knows of the new epoch and the process of its own has ended, and returns the new epoch.
func (d *demo) fenced(ctx context.Context, p *probe) (epoch uint64, err error) {
	err = cluster.WaitFor(ctx, failoverWithin, p.node.Name+" to give the store up", func(ctx context.Context) (bool, error) {
		in, err := d.store(ctx, p.node)
		if err != nil {
			return false, err
		}
		if epoch = in.GetEpoch(); epoch <= p.epoch || in.GetNode() == p.node.Name {
			return false, fmt.Errorf("it holds epoch %d for its own", epoch)
		}
		below, err := p.node.Components()
		if slices.Contains(below, p.pid) {
			return false, fmt.Errorf("process %d of epoch %d still runs", p.pid, p.epoch)
		}
		return err == nil, err
	})
	return epoch, err
}

// leader: the node that leads the arbiter and places is gone.
func (d *demo) leader(ctx context.Context) (string, error) {
	if err := d.restart(ctx); err != nil {
		return "", err
	}
	order, err := d.homed(ctx)
	if err != nil {
		return "", err
	}
	victim := d.cluster.Node(order[0])
	c, err := d.survivor(victim.Name).Client()
	if err != nil {
		return "", err
	}
	at, err := victim.Kill()
	if err != nil {
		return "", err
	}
	cctx, cancel := context.WithTimeout(ctx, failoverWithin)
	defer cancel()
	if _, err := c.Token(cctx, &apiv1.TokenRequest{Uses: 1, TtlMs: 1000}); err != nil {
		return "", fmt.Errorf("a commit after the coordinator's death: %w", err)
	}
	took := time.Since(at)
	order, err = d.homed(ctx)
	if err != nil {
		return "", err
	}
	if _, err := d.aftermath(ctx, at, victim); err != nil {
		return "", err
	}
	d.figure("commit_ms", float64(took.Microseconds())/1000)
	return fmt.Sprintf("coordinator %s killed: next commit %s · system/placement now %s = first of `dht closest`", victim.Name, msOf(took), order[0]), d.restart(ctx)
}

// restart starts the nodes that do not run again and waits until all is well.
func (d *demo) restart(ctx context.Context) error {
	for _, n := range d.cluster.Nodes {
		if n.Running() {
			continue
		}
		if err := n.Start(ctx); err != nil {
			return err
		}
	}
	if err := d.allAlive(ctx); err != nil {
		return err
	}
	return d.calm(ctx, d.cluster.Nodes[0])
}
