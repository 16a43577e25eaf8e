package supervisor

import (
	"context"

	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
)

// Survey tells which checkpoints this node knows: of each instance that runs here the last one that was acknowledged to its process, and of
// the others the newest whose pages lie here whole, by (epoch, mark). It reads the head of every checkpoint that is kept, so it is for a
// recovery, not for every day.
func (s *Supervisor) Survey(ctx context.Context) ([]*componentsv1.HeldCheckpoint, error) {
	best := map[string]*componentsv1.HeldCheckpoint{}
	err := s.cfg.Blobs.Roots(ctx, []string{kindBase, kindDelta}, func(h blobs.Hash, n blobs.Node) error {
		var meta componentsv1.CheckpointMeta
		if proto.Unmarshal(n.Data, &meta) != nil || meta.GetInstance() == "" {
			return nil // of a version that this one does not know
		}
		x := &componentsv1.HeldCheckpoint{Instance: meta.GetInstance(), Epoch: meta.GetEpoch(), Mark: meta.GetMark(), Root: h[:]}
		if NewerCheckpoint(x, best[x.GetInstance()]) {
			best[x.GetInstance()] = x
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, in := range s.Infos() {
		if in.Saved.Seq == 0 || in.Epoch == 0 || in.Saved.Root.IsZero() {
			continue
		}
		best[in.Instance] = &componentsv1.HeldCheckpoint{Instance: in.Instance, Epoch: in.Epoch, Mark: in.Saved.Mark, Root: in.Saved.Root[:], Seq: in.Saved.Seq}
	}
	out := make([]*componentsv1.HeldCheckpoint, 0, len(best))
	for _, x := range best {
		out = append(out, x)
	}
	return out, nil
}

// NewerCheckpoint says whether a is of a later epoch than b or, within one, of a later mark. Where neither tells (a state without marks), what
// runs goes before what merely lies there. b may be nil.
func NewerCheckpoint(a, b *componentsv1.HeldCheckpoint) bool {
	switch {
	case b == nil:
		return true
	case a.GetEpoch() != b.GetEpoch():
		return a.GetEpoch() > b.GetEpoch()
	case (a.GetSeq() > 0) != (b.GetSeq() > 0):
		return a.GetSeq() > 0 // its process goes on from it, whatever else was copied
	}
	return a.GetMark() > b.GetMark()
}

// CheckpointOf reads what a root that is here says about itself.
func (s *Supervisor) CheckpointOf(root blobs.Hash) (*componentsv1.HeldCheckpoint, error) {
	head, _, err := readHead(s.cfg.Blobs, root)
	if err != nil {
		return nil, err
	}
	return &componentsv1.HeldCheckpoint{Instance: head.meta.GetInstance(), Epoch: head.meta.GetEpoch(), Mark: head.meta.GetMark(), Root: root[:]}, nil
}
