package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/internal/sim/history"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
)

func (w *whole) anyInstance() string { return w.instances[w.intn(len(w.instances))] }

func (w *whole) crashProcess(*faults) string {
	name := w.anyInstance()
	n := w.owner(name)
	if n == nil {
		return ""
	}
	p := n.part()
	if p == nil {
		return ""
	}
	for _, proc := range p.procs.running(name) {
		w.logf("a process of %s on %s dies", name, n.name)
		proc.die("killed")
	}
	return name
}

// crashStandbys ends processes that stand by, at any moment: while they are built, while they are given something, while they are about to be taken.
func (w *whole) crashStandbys(r *rand.Rand, end time.Time) {
	for {
		select {
		case <-time.After(time.Duration(200+r.IntN(3000)) * time.Millisecond):
		case <-w.ctx.Done():
			return
		}
		if !time.Now().Before(end) {
			return
		}
		name := w.instances[r.IntN(len(w.instances))]
		for _, n := range w.live() {
			p := n.part()
			if p == nil || w.owner(name) == n {
				continue
			}
			for _, proc := range p.procs.running(name) {
				if !proc.begun.Load() {
					w.logf("a standby of %s on %s dies", name, n.name)
					proc.die("killed")
				}
			}
		}
	}
}

// takeOwner reserves the owner of an instance.
func (w *whole) takeOwner() (*node, string) {
	name := w.anyInstance()
	n := w.owner(name)
	if n == nil || !n.take() {
		return nil, ""
	}
	return n, name
}

func (w *whole) crashOwner(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	if f.crashOf(n) == "" {
		return ""
	}
	return fmt.Sprintf("%s of %s", n.name, name)
}

func (w *whole) isolateOwner(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	n.give()
	// It loses the others, but perhaps not its callers.
	var reach *node
	if live := w.live(); w.oneIn(2) && !w.trusting() {
		reach = live[w.intn(len(live))]
	}
	w.logf("%s, who owns %s, is cut off", n.name, name)
	heal := w.cut(func(a, b *node) bool { return (a == n || b == n) && a != reach && b != reach })
	f.pause(500*time.Millisecond, 7*time.Second)
	heal()
	return n.name
}

func (w *whole) freezeOwner(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	defer n.give()
	w.logf("%s, who owns %s, stands still", n.name, name)
	n.freeze()
	f.pause(200*time.Millisecond, 7*time.Second)
	n.thaw()
	w.logf("%s goes on", n.name)
	return n.name
}

func (w *whole) move(f *faults) string {
	if w.guarantee == components.ExactlyOne {
		return "" // a move has the old process quiet beside the new one for a moment, on purpose; alone would not know it from two
	}
	name := w.anyInstance()
	from, to := w.owner(name), f.any(false)
	if from == nil || to == nil || from == to {
		if to != nil {
			to.give()
		}
		return ""
	}
	to.give()
	p := from.part()
	if p == nil {
		return ""
	}
	w.logf("%s moves from %s to %s", name, from.name, to.name)
	ctx, cancel := within(5 * time.Second)
	defer cancel()
	_, err := p.sup.Move(ctx, name, to.id, supervisor.Wish{Trigger: "operator", Cause: "simulation"})
	return fmt.Sprintf("of %s to %s: %v", name, to.name, err)
}

// unclaimed is how long placement leaves a dead owner's instance to the neighbours, who know best; leaseOver is what exactly-one waits besides.
const (
	unclaimed = 2 * time.Second
	leaseOver = 3100 * time.Millisecond
)

// operate does what placement and an operator do: what nobody has taken over from a dead owner is claimed for somebody, and quarantines are
// lifted. (Neighbours take over from the process that they saw die; an owner whose later lives never got to claim its own is left to
// placement.)
func (w *whole) operate() {
	for {
		select {
		case <-time.After(300 * time.Millisecond):
		case <-w.ctx.Done():
			return
		}
		lead := w.leading()
		if lead == nil {
			continue
		}
		p := w.of(lead.Leader).part()
		if p == nil || p.l.frozen.Load() {
			continue
		}
		for _, name := range w.instances {
			if reg, ok := p.l.arb.Get(components.InstanceRegister(name)); ok {
				w.attend(p, name, reg)
			}
		}
	}
}

func (w *whole) attend(p *part, name string, reg arbiter.Register) {
	var body componentsv1.InstanceBody
	if proto.Unmarshal(reg.Body, &body) != nil {
		return
	}
	var op arbiter.Op
	m, known := p.members.Member(reg.Owner)
	wait := unclaimed
	if w.guarantee == components.ExactlyOne {
		wait += leaseOver
	}
	switch {
	case body.GetQuarantined():
		body.Quarantined, body.Deaths = false, nil
		data, err := proto.Marshal(&body)
		if err != nil {
			return
		}
		op.Put = &arbiter.PutOp{Key: reg.Key, Body: data}
	case known && !m.State.Running() && time.Since(m.Since) > wait:
		to := p.members.Closest(reg.Key, 1, func(m members.Member) bool { return m.State == members.Alive })
		if len(to) == 0 {
			return
		}
		next := components.Takeover(&body, components.OwnerDeath{Node: reg.Owner.String(), Name: m.Name, Boot: reg.Boot, Trigger: "placement", To: to[0].ID.String(), Now: time.Now()})
		data, err := proto.Marshal(next)
		if err != nil {
			return
		}
		op.Claim = &arbiter.ClaimRequest{Key: reg.Key, Expect: reg.Epoch, Nonce: p.l.rand.Uint64() | 1, Owner: to[0].ID, Boot: to[0].Boot, Body: data}
	default:
		return
	}
	ctx, cancel := context.WithTimeout(w.ctx, time.Second)
	defer cancel()
	res, err := p.l.arb.Txn(ctx, arbiter.TxnRequest{Compares: []arbiter.Compare{{Key: reg.Key, Field: "revision", Equal: reg.Revision}}, Then: []arbiter.Op{op}})
	if op.Claim != nil {
		w.logf("%s leads and claims %s of %s for %s: %v %v", p.l.n.name, name, w.named(reg.Owner), w.named(op.Claim.Owner), res.Succeeded, err)
	} else {
		w.logf("the operator lifts the quarantine of %s: %v %v", name, res.Succeeded, err)
	}
}

// afterwards asserts I10: every instance is served by a live owner, and answers everywhere.
func (w *whole) afterwards() {
	begun := time.Now()
	if took, ok := w.eventually(ownedWithin, w.served); !ok {
		w.failf("I10: not every instance runs on a live owner, once, %s after healing", took)
		w.owners()
		return
	}
	if w.keeps() {
		if w.decided(); w.failed() {
			return
		}
		begun = time.Now()
	}
	for _, n := range w.live() {
		p := n.part()
		for _, name := range w.instances {
			ctx, cancel := context.WithTimeout(context.Background(), time.Until(begun.Add(ownedWithin+healed)))
			o := history.Op[int64]{Client: 9, Call: w.now()}
			var header metadata.MD
			v, err := counterv1.NewCounterClient(p.router.Conn(name, "")).Add(ctx, &counterv1.AddRequest{N: 1}, grpc.Header(&header))
			cancel()
			if err != nil {
				w.failf("I10: %s is not answered at %s: %v", name, n.name, err)
				w.owners()
				return
			}
			o.Return = w.now()
			o.Name = fmt.Sprintf("the last add to %s at %s = %d", name, n.name, v.GetValue())
			o.Step = func(s int64) (int64, bool) { return s + 1, s+1 == v.GetValue() }
			w.logf("%s", o.Name)
			if w.keeps() {
				w.answered(name, added{o.Call, o.Return, v.GetValue(), lineOf(header, err)})
				continue
			}
			w.hist.Lock()
			w.ops[name] = append(w.ops[name], o)
			w.hist.Unlock()
		}
	}
	w.count.Heal = time.Since(begun)
}
