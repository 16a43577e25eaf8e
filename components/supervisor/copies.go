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
// (saver.repair); of branches, which nobody runs, the holders do.

const (
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
	if err := s.fetch(ctx, root, reg.Key, reg.Holders); err != nil {
		return err
	}
	if !slices.Contains(have, s.cfg.Self) {
		have = append(have, s.cfg.Self)
	}
	to, _ := s.holdersOf(components.InstanceRegister(b.GetInstance()))
	if give := lacking(to, have, s.apart); len(give) > 0 {
		got, err := s.cfg.Blobs.Push(ctx, root, give, 1)
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
