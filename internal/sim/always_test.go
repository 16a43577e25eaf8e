package sim

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
)

// alwaysKind is whole nodes whose instances go on in a cut, on both sides: on_partition keep, and reconcile merge or keep_majority. What is called is not
// one register then, but a line of owners that the cluster knows, and branches beside it. What is asked of it:
//
//   - what goes on without the arbiter goes on at its owner only, in the epoch that it owned;
//   - the line is linearizable by itself: what it answered is there, and what branches answered may be, when it was merged;
//   - after healing there is one owner, no branch is open, and each that was stored has been decided about, its pages on its holders;
//   - with merge every answered call is in the end in the count; with keep_majority a branch that was left beside holds what it answered.
//
// The manifest refuses keep_majority for components of which each call is saved, because a branch then keeps answered calls to itself. Here they are put
// together on purpose: what is lost would not show otherwise.
//
// It is a kind of its own, and no third guarantee of whole: so that a seed of whole means what it meant.
var alwaysKind = kind{"always", func(s *schedule) { newAlways(s).run() }}

// darkKind is always, with owners that lose power and uplink at once and come back without the latter, most of which are no voters: they go on from what their
// disks remember, which need not be the last that was answered.
var darkKind = kind{"dark", func(s *schedule) {
	w := newAlways(s)
	w.dark = true
	w.run()
}}

// decidedWithin is when no branch is open any more, after all instances are served.
const decidedWithin = 30 * time.Second

func newAlways(s *schedule) *whole {
	w := newWhole(s)
	w.guarantee, w.reconcile = components.AlwaysOn, components.ReconMerge
	if w.oneIn(3) {
		w.reconcile = components.KeepMajority
	}
	return w
}

func (w *whole) keeps() bool { return w.guarantee == components.AlwaysOn }

// added is one call, as its caller saw it.
type added struct {
	call, back time.Duration
	value      int64
	line       string // the epoch of the process that answered; "": nobody did
}

// alwaysHarms are what brings branches about, and what goes wrong with them.
func (w *whole) alwaysHarms(f *faults) {
	f.losses = 0 // a branch that is lost with its disk is lost
	f.harms = slices.DeleteFunc(f.harms, func(h harm) bool { return h.name == "crash of all" })
	f.more(harm{"long cut", 12, w.longCut}, harm{"all apart", 3, w.allApart})
	if w.dark {
		f.more(harm{"reboot without an uplink", 20, w.darkReboot})
	}
}

// darkReboot cuts the power of an owner, and its uplink with it, which comes back later.
func (w *whole) darkReboot(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	defer n.give()
	w.logf("%s, who owns %s, loses power and uplink", n.name, name)
	heal := w.cut(func(a, b *node) bool { return a == n || b == n })
	defer heal()
	w.kill(n)
	f.pause(20*time.Millisecond, time.Second)
	w.begin(n)
	f.pause(6*time.Second, 12*time.Second)
	return n.name
}

// longCut cuts the owner off for long enough to go on alone, alone or with another node, and has its process die, or all of it.
func (w *whole) longCut(f *faults) string {
	n, name := w.takeOwner()
	if n == nil {
		return ""
	}
	defer n.give()
	side := map[*node]bool{n: true}
	if live := w.live(); w.oneIn(3) {
		side[live[w.intn(len(live))]] = true
	}
	w.logf("%s, who owns %s, is cut off for long: %s", n.name, name, names(side))
	heal := w.cut(func(a, b *node) bool { return side[a] != side[b] })
	defer heal()
	f.pause(3500*time.Millisecond, 7*time.Second)
	switch w.intn(4) {
	case 0:
		if p := n.part(); p != nil {
			for _, proc := range p.procs.running(name) {
				w.logf("its process dies")
				proc.die("killed")
			}
		}
		f.pause(500*time.Millisecond, 2*time.Second)
	case 1:
		w.kill(n)
		f.pause(20*time.Millisecond, time.Second)
		w.begin(n)
		f.pause(4*time.Second, 9*time.Second)
	}
	return n.name
}

// allApart cuts everybody off from everybody: nobody can claim, and a branch is committed afterwards.
func (w *whole) allApart(f *faults) string {
	w.logf("all are apart")
	heal := w.cut(func(a, b *node) bool { return a != b })
	f.pause(3500*time.Millisecond, 8*time.Second)
	heal()
	return "everybody"
}

// ownNode asserts that an instance runs only at the node that owns the epoch in which it runs.
func (w *whole) ownNode() {
	for _, name := range w.instances {
		for _, n := range w.live() {
			p := n.part()
			if p == nil || p.l.frozen.Load() || len(p.procs.running(name)) == 0 {
				continue
			}
			info, here := p.sup.Info(name)
			if !here || info.Epoch == 0 || info.State != components.Running {
				continue
			}
			if owner, known := w.eyes.ownerAt(1, components.InstanceRegister(name), info.Epoch); known && owner != n.id {
				w.failf("%s runs %s in epoch %d, which is %s's: a branch goes on at its owner only", n.name, name, info.Epoch, w.named(owner))
			}
		}
	}
}

// answered notes a call.
func (w *whole) answered(name string, a added) {
	w.hist.Lock()
	defer w.hist.Unlock()
	if a.line == "" {
		w.count.InDoubt++
	} else {
		w.count.Answers++
	}
	w.adds[name] = append(w.adds[name], a)
}

// decided waits until no branch is open and each has been decided about, and asserts that.
func (w *whole) decided() {
	time.Sleep(3 * time.Second) // who was started last reads what he has
	why := ""
	if _, ok := w.eventually(decidedWithin, func() bool { why = w.undecided(); return why == "" && w.served() }); !ok {
		w.failf("%s after healing, and %s after all instances are served: %s", ownedWithin, decidedWithin, why)
		w.owners()
	}
}

// undecided says what is left to do about branches.
func (w *whole) undecided() string {
	for _, n := range w.live() {
		p := n.part()
		if p == nil {
			return n.name + " does not run"
		}
		if open := p.sup.Branches(); len(open) > 0 {
			return fmt.Sprintf("%s has %d open branches", n.name, len(open))
		}
	}
	for _, b := range w.stored() {
		if b.GetOutcome() == "" {
			return fmt.Sprintf("branch %d of %s on %s is not decided about", b.GetNumber(), b.GetInstance(), b.GetNodeName())
		}
	}
	return ""
}

// stored are the branches that the cluster keeps, as the node sees them that is furthest.
func (w *whole) stored() (out []*componentsv1.Branch) {
	best := uint64(0)
	for _, n := range w.live() {
		p := n.part()
		if p == nil || p.l.arb.Status().Index < best {
			continue
		}
		best, out = p.l.arb.Status().Index, nil
		for _, reg := range p.l.arb.List(components.BranchPrefix) {
			var b componentsv1.Branch
			if err := proto.Unmarshal(reg.Body, &b); err != nil {
				w.failf("the register %s cannot be read: %v", reg.Key, err)
				continue
			}
			out = append(out, &b)
		}
	}
	return out
}

// kept asserts what must be there in the end.
func (w *whole) kept() {
	w.hist.Lock()
	defer w.hist.Unlock()
	branches := w.stored()
	for _, name := range w.instances {
		beside := map[string]*componentsv1.Branch{} // by line
		for _, b := range branches {
			if b.GetInstance() == name {
				beside[fmt.Sprintf("%d/%d", b.GetIncarnation(), b.GetEpoch())] = b
				w.logf("branch %d of %s on %s: epoch %d, %d checkpoints after %d, mark %d: %s %s", b.GetNumber(), name, b.GetNodeName(), b.GetEpoch(), b.GetCommits(), b.GetBaseSeq(), b.GetMark(), b.GetOutcome(), b.GetReason())
			}
		}
		var line, loose []added
		last, told := int64(0), 0
		for _, a := range w.adds[name] {
			b := beside[a.line]
			if a.line != "" {
				told++
			}
			switch {
			case a.line == "" || b != nil && b.GetOutcome() == "merged":
				loose = append(loose, a, a) // on both sides of a cut, perhaps
			case b != nil:
				loose = append(loose, a)
				// A state's mark counts the calls that have written it.
				if uint64(a.value) > b.GetMark() {
					w.failf("%d was answered for %s in epoch %s; the branch beside has only %d calls", a.value, name, a.line, b.GetMark())
				}
			default:
				line = append(line, a)
				last = max(last, a.value)
			}
		}
		if why := inLine(line, loose); why != "" {
			w.failf("the line of %s: %s", name, why)
		}
		if w.reconcile == components.ReconMerge && last < int64(told) {
			w.failf("%d calls of %s were answered, on both sides of cuts that are over and merged: %d are counted", told, name, last)
		}
		w.whereKept(name, beside)
	}
}

// whereKept asserts that the pages of a stored branch are where its register says.
func (w *whole) whereKept(name string, beside map[string]*componentsv1.Branch) {
	p := w.live()[0].part()
	for _, b := range beside {
		reg, ok := p.l.arb.Get(components.BranchRegister(name, b.GetNodeName(), b.GetNumber()))
		if !ok || len(reg.Root) != len(blobs.Hash{}) {
			continue
		}
		whole := 0
		for _, n := range w.live() {
			if q := n.part(); q != nil && q.blobs.Complete(blobs.Hash(reg.Root)) {
				whole++
			}
		}
		if whole == 0 {
			w.failf("nobody has the pages of branch %d of %s on %s", b.GetNumber(), name, b.GetNodeName())
		}
	}
}

// inLine says what is wrong with the calls of one counter: those that were answered are ordered by their answers, and what lies between must be explained
// by calls of which it is open whether they count; "": nothing. It is what porcupine would find, and takes no longer with many calls in doubt.
func inLine(known, loose []added) string {
	known = slices.Clone(known)
	slices.SortFunc(known, func(a, b added) int { return int(a.value - b.value) })
	var latest time.Duration // call of the ones before
	for i, a := range known {
		if i > 0 && known[i-1].value == a.value {
			return fmt.Sprintf("%d was answered twice, from %.4f to %.4f and from %.4f to %.4f", a.value, known[i-1].call.Seconds(), known[i-1].back.Seconds(), a.call.Seconds(), a.back.Seconds())
		}
		if a.back < latest {
			return fmt.Sprintf("%d was answered at %.4f, before the call of a smaller answer", a.value, a.back.Seconds())
		}
		latest = max(latest, a.call)
	}
	// Each gap below an answer was filled before it.
	calls := make([]time.Duration, len(loose))
	for i, a := range loose {
		calls[i] = a.call
	}
	slices.Sort(calls)
	by := make([]time.Duration, len(known)) // the first return of this answer or a greater one
	for i := len(known) - 1; i >= 0; i-- {
		by[i] = known[i].back
		if i < len(known)-1 {
			by[i] = min(by[i], by[i+1])
		}
	}
	for i, a := range known {
		gaps := int(a.value) - (i + 1)
		may, _ := slices.BinarySearch(calls, by[i])
		if gaps > may {
			return fmt.Sprintf("%d was answered by %.4f, after %d answers and at most %d others: something was counted twice, or too often", a.value, by[i].Seconds(), i, may)
		}
	}
	return ""
}
