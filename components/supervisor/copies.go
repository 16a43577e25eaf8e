package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
)

// The copies of what is committed: how many there should be, and in how many zones. The owner of a running instance looks after those of its checkpoint
// (saver.repair) and of its history (custodian). Of what does not run (stopped, quarantined, failing, paused) the owner does, too, here; where it is gone, and of
// branches, one of the holders.

const (
	// restingGrace is how long copies of what does not run may be missing before they are made again: a node that is started anew has them still. A checkpoint with
	// fewer than restingLeast is not waited with.
	restingGrace = 10 * time.Second
	restingLeast = 2
	// restingShare: after copies of what does not run were made nothing more is copied for so many times as long. Nobody waits for them.
	restingShare = 3
	// branchCopiesEvery is how often the copies of branches are counted.
	branchCopiesEvery = 2 * time.Second
	// branchCopyWithin bounds the making of one branch's copies.
	branchCopyWithin = time.Minute
)

// lacking names those who are to be given a root that have keep, when to should: as many as are missing, and when none is, one who brings it into another
// zone where all of those who keep it are in one.
func lacking(to, have []peer.ID, apart func([]peer.ID) bool) []peer.ID {
	missing := slices.DeleteFunc(slices.Clone(to), func(id peer.ID) bool { return slices.Contains(have, id) })
	if want := len(to) - len(have); want > 0 {
		return missing[:min(len(missing), want)]
	}
	if apart == nil || apart(have) {
		return nil
	}
	for _, id := range missing {
		if apart(append(slices.Clone(have), id)) {
			return []peer.ID{id}
		}
	}
	return nil
}

// apart says whether nodes are in more than one zone. Where this node has none, zones do not matter.
func (s *Supervisor) apart(ids []peer.ID) bool {
	if self, ok := s.cfg.Members.Member(s.cfg.Self); !ok || self.Zone == "" {
		return true
	}
	first := ""
	for _, id := range ids {
		m, ok := s.cfg.Members.Member(id)
		switch {
		case !ok || m.Zone == "":
		case first == "":
			first = m.Zone
		case m.Zone != first:
			return true
		}
	}
	return false
}

// keepBranchCopies looks after the copies of stored branches.
func (s *Supervisor) keepBranchCopies(ctx context.Context) {
	tick := time.NewTicker(branchCopiesEvery)
	defer tick.Stop()
	told := map[string]bool{} // what could not be repaired, by key
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, reg := range s.cfg.Arbiter.List(components.BranchPrefix) {
			if ctx.Err() != nil || !s.inTouch() {
				break
			}
			err := s.repairBranch(ctx, reg)
			if err != nil && ctx.Err() == nil && !told[reg.Key] {
				s.cfg.Log.Warn("copies of a branch are missing; it is tried again", "register", reg.Key, "error", err)
			}
			told[reg.Key] = err != nil
		}
	}
}

// keepRestingCopies looks after the copies of what does not run, one instance at a time.
func (s *Supervisor) keepRestingCopies(ctx context.Context) {
	tick := time.NewTicker(branchCopiesEvery)
	defer tick.Stop()
	r := &resting{sup: s, mine: map[string]time.Time{}, thin: map[string]time.Time{}, told: map[string]bool{}, custodians: map[string]*custodian{}}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !s.inTouch() {
			continue
		}
		for _, reg := range s.registers() {
			if ctx.Err() != nil {
				return
			}
			r.look(ctx, reg)
		}
		r.forget()
	}
}

// resting is what one node knows of the instances that do not run and whose copies it looks after.
type resting struct {
	sup *Supervisor
	// By register: since when this node looks after it, and since when copies are missing.
	mine, thin map[string]time.Time
	told       map[string]bool // what could not be repaired
	custodians map[string]*custodian
}

// look does for one instance what is due.
func (r *resting) look(ctx context.Context, reg arbiter.Register) {
	have := slices.DeleteFunc(slices.Clone(reg.Holders), func(id peer.ID) bool { return !r.sup.isAlive(id) })
	if hashFrom(reg.Root).IsZero() || reg.Seq == 0 || !r.sup.tends(reg, have) {
		delete(r.mine, reg.Key)
		delete(r.thin, reg.Key)
		return
	}
	if r.mine[reg.Key].IsZero() {
		r.mine[reg.Key] = time.Now()
	}
	begin := time.Now()
	did, err := r.copy(ctx, reg, have)
	if err == nil && !did && time.Since(r.mine[reg.Key]) >= restingGrace {
		did, err = r.history(ctx, reg)
	}
	if err != nil && ctx.Err() == nil && !r.told[reg.Key] {
		r.sup.cfg.Log.Warn("copies of what does not run are missing; it is tried again", "register", reg.Key, "error", err)
	}
	r.told[reg.Key] = err != nil
	if did {
		_ = pause(ctx, restingShare*time.Since(begin)) // its error is the context's, which the caller looks at
	}
}

// copy makes the missing copies of the last checkpoint; did says that there were any.
func (r *resting) copy(ctx context.Context, reg arbiter.Register, have []peer.ID) (did bool, err error) {
	to, _ := r.sup.holdersOf(reg.Key)
	if len(have) > 0 && len(lacking(to, have, r.sup.apart)) == 0 && len(have) == len(reg.Holders) {
		delete(r.thin, reg.Key)
		return false, nil
	}
	if r.thin[reg.Key].IsZero() {
		r.thin[reg.Key] = time.Now()
	}
	if (len(have) >= restingLeast || r.sup.paused()) && time.Since(r.thin[reg.Key]) < restingGrace {
		return false, nil
	}
	return true, r.sup.repairCopies(ctx, reg, have, to)
}

// history makes the missing copies of one earlier checkpoint.
func (r *resting) history(ctx context.Context, reg arbiter.Register) (did bool, err error) {
	name := instanceOf(reg.Key)
	c := r.custodians[name]
	if c == nil {
		c = newCustodian(newHistorian(r.sup, name), tokenIn(reg))
		r.custodians[name] = c
	}
	c.t = tokenIn(reg)
	if err := c.look(); err != nil {
		return false, err
	}
	return c.keepCopies(ctx)
}

// forget drops what is known of instances that others look after, or nobody has to.
func (r *resting) forget() {
	for key := range r.told {
		if _, mine := r.mine[key]; !mine {
			delete(r.told, key)
			delete(r.custodians, instanceOf(key))
		}
	}
}

// tends says whether this node is the one to look after the copies of an instance's checkpoint here: its owner, where no process of it is saved; where the owner is
// gone, of those that hold it the closest to its key. have are its holders that live.
func (s *Supervisor) tends(reg arbiter.Register, have []peer.ID) bool {
	if reg.Owner == s.cfg.Self {
		i, err := s.get(instanceOf(reg.Key))
		if err != nil {
			return true
		}
		sv := i.saver()
		if sv == nil {
			return true
		}
		_, over := sv.over()
		return over
	}
	if m, ok := s.cfg.Members.Member(reg.Owner); ok && m.State.Running() {
		return false
	}
	return s.keepsBranch(reg, have)
}

// repairBranch keeps a branch on as many live holders as an instance's checkpoint. One node does it: of those that hold it the closest to its key, and
// before any are named its owner. Two that do it at once do the same.
func (s *Supervisor) repairBranch(ctx context.Context, reg arbiter.Register) error {
	root := hashFrom(reg.Root)
	var b componentsv1.Branch
	if root.IsZero() {
		return nil
	}
	if err := proto.Unmarshal(reg.Body, &b); err != nil {
		return fmt.Errorf("read %s: %w", reg.Key, err)
	}
	have := slices.DeleteFunc(slices.Clone(reg.Holders), func(id peer.ID) bool { return !s.isAlive(id) })
	if !s.keepsBranch(reg, have) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, branchCopyWithin)
	defer cancel()
	to, _ := s.holdersOf(components.InstanceRegister(b.GetInstance()))
	return s.repairCopies(ctx, reg, have, to)
}

// repairCopies brings what a register names to those of to that are missing, and records who has it. have are its holders that live.
func (s *Supervisor) repairCopies(ctx context.Context, reg arbiter.Register, have, to []peer.ID) error {
	root := hashFrom(reg.Root)
	if err := s.fetch(ctx, root, reg.Key, reg.Holders); err != nil {
		return err
	}
	if !slices.Contains(have, s.cfg.Self) {
		have = append(have, s.cfg.Self)
	}
	if give := lacking(to, have, s.apart); len(give) > 0 {
		push := s.cfg.Blobs.Push
		if len(have) >= restingLeast {
			push = s.cfg.Blobs.PushGently
		}
		got, err := push(ctx, root, give, 1)
		if err != nil {
			return fmt.Errorf("copy %s to its holders: %w", reg.Key, err)
		}
		have = append(have, got...)
	}
	slices.Sort(have)
	have = slices.Compact(have)
	if slices.Equal(have, slices.Sorted(slices.Values(reg.Holders))) {
		return nil
	}
	if _, err := s.cfg.Arbiter.SetHolders(ctx, reg.Key, reg.Seq, have); err != nil {
		if _, refused := errors.AsType[*arbiter.RefusedError](err); refused {
			return nil // it is gone, or somebody else has looked after it
		}
		return fmt.Errorf("record the holders of %s: %w", reg.Key, err)
	}
	return nil
}

// keepsBranch says whether this node is the one to look after a branch. have are its holders that live.
func (s *Supervisor) keepsBranch(reg arbiter.Register, have []peer.ID) bool {
	if len(have) == 0 && s.isAlive(reg.Owner) {
		return reg.Owner == s.cfg.Self
	}
	if len(have) == 0 { // nobody is known to have it: whoever does
		return s.cfg.Blobs.Complete(hashFrom(reg.Root))
	}
	for _, m := range s.cfg.Members.Closest(reg.Key, 1, func(m members.Member) bool { return slices.Contains(have, m.ID) }) {
		return m.ID == s.cfg.Self
	}
	return false
}
