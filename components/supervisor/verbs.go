package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
)

// Wish is what an operator wants an instance replaced by. App, when set, is the desired state that says the same, committed in one
// transaction with the new epoch, against Revision.
type Wish struct {
	Digest   string // of the artifact
	Artifact string // its name
	Version  string
	App      []byte // the application's new body
	Revision uint64
	Trigger  string
	Cause    string
}

// Swap replaces the running version of an instance on this node. Whatever fails before the new epoch leaves the old version serving.
func (s *Supervisor) Swap(ctx context.Context, name string, w Wish) (Replaced, error) {
	return s.replace(ctx, name, func(ctx context.Context, i *instance, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) (Replaced, error) {
		if i.gen.digest == w.Digest {
			return Replaced{From: i.gen.version, To: i.gen.version, Epoch: reg.Epoch}, nil
		}
		delete(i.refused, w.Digest)
		p := s.plan(w, body, blobs.Hash{})
		p.why = components.WhyBeforeSwap
		return i.swap(ctx, reg, body, eff, p)
	})
}

func (s *Supervisor) plan(w Wish, body *componentsv1.InstanceBody, root blobs.Hash) swapPlan {
	p := swapPlan{digest: w.Digest, artifact: w.Artifact, version: w.Version, trigger: w.Trigger, cause: w.Cause, root: root}
	if w.App != nil {
		app, _, _ := strings.Cut(body.GetComponent(), "/")
		p.app, p.revision = &arbiter.PutOp{Key: components.ApplicationRegister(app), Body: w.App}, w.Revision
	}
	return p
}

// Move hands an instance of this node to another one, with its state.
func (s *Supervisor) Move(ctx context.Context, name string, to peer.ID, w Wish) (Replaced, error) {
	if to == s.cfg.Self {
		return Replaced{}, fmt.Errorf("%s is on %s already", name, s.cfg.Name)
	}
	if !s.hosts(to) {
		return Replaced{}, fmt.Errorf("%s is not a node that takes components now", s.nodeName(to))
	}
	return s.replace(ctx, name, func(ctx context.Context, i *instance, reg arbiter.Register, body *componentsv1.InstanceBody, _ *components.Effective) (Replaced, error) {
		if body.GetEachNode() != "" {
			return Replaced{}, fmt.Errorf("%s belongs to its node: its component runs on each node", name)
		}
		return i.move(ctx, reg, body, to, s.plan(w, body, blobs.Hash{}))
	})
}

// replacing is what a verb does in an instance's actor.
type replacing func(context.Context, *instance, arbiter.Register, *componentsv1.InstanceBody, *components.Effective) (Replaced, error)

// replace runs f in the instance's actor, with what it owns and should be, if it runs.
func (s *Supervisor) replace(ctx context.Context, name string, f replacing) (Replaced, error) {
	return s.onInstance(ctx, name, func(ctx context.Context, i *instance, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) (Replaced, error) {
		if !i.running(reg) {
			return Replaced{}, fmt.Errorf("%s is not running (%s)", name, i.Info().State)
		}
		return f(ctx, i, reg, body, eff)
	})
}

// running says whether a process of the epoch that the register tells of is there.
func (i *instance) running(reg arbiter.Register) bool {
	return i.gen != nil && !i.gen.dead() && reg.Epoch == i.gen.token.Epoch
}

// onInstance runs f in the instance's actor, with what it owns and should be.
func (s *Supervisor) onInstance(ctx context.Context, name string, f replacing) (Replaced, error) {
	i, err := s.get(name)
	if err != nil {
		return Replaced{}, err
	}
	var out Replaced
	var ferr error
	err = i.do(ctx, func(ctx context.Context) {
		reg, ok := s.register(i.key)
		if !ok || reg.Owner != s.cfg.Self || reg.Boot != s.cfg.Boot {
			ferr = fmt.Errorf("%s: %w", name, ErrNotHere)
			return
		}
		if ferr = i.together(); ferr != nil {
			i.poke()
			return
		}
		var body componentsv1.InstanceBody
		if ferr = proto.Unmarshal(reg.Body, &body); ferr != nil {
			return
		}
		eff, err := s.effective(body.GetComponent())
		if err != nil || eff == nil {
			ferr = errors.Join(fmt.Errorf("%s: its application is gone", name), err)
			return
		}
		out, ferr = f(ctx, i, reg, &body, eff)
		i.poke()
	})
	return out, errors.Join(err, ferr)
}

// Checkpoint commits everything the instance has done so far. It returns once that is acknowledged.
func (s *Supervisor) Checkpoint(ctx context.Context, name string) (Saved, error) {
	saved, _, err := s.checkpoint(ctx, name)
	return saved, err
}

func (s *Supervisor) checkpoint(ctx context.Context, name string) (Saved, *saver, error) {
	i, err := s.get(name)
	if err != nil {
		return Saved{}, nil, err
	}
	var sv *saver
	var ferr error
	if err := i.do(ctx, func(context.Context) {
		switch {
		case i.gen == nil:
			ferr = fmt.Errorf("%s is not running", name)
		case !i.gen.stateful():
			ferr = fmt.Errorf("%s has no state to save", name)
		default:
			sv = i.gen.saver
		}
	}); err != nil {
		return Saved{}, nil, err
	}
	if ferr != nil {
		return Saved{}, nil, ferr
	}
	if sv.cfg.mode == componentsv1.Durability_DURABILITY_NONE {
		return Saved{}, nil, fmt.Errorf("%s is durable: none; its state is not saved", name)
	}
	if err := sv.Flush(ctx, false); err != nil {
		return Saved{}, nil, err
	}
	saved, err := sv.Saved()
	return saved, sv, err
}

// Info returns what this node knows about an instance it runs.
func (s *Supervisor) Info(name string) (Info, bool) {
	i, err := s.get(name)
	if err != nil {
		return Info{}, false
	}
	return i.Info(), true
}

// Infos lists every instance of this node, by name.
func (s *Supervisor) Infos() []Info {
	s.mu.Lock()
	list := make([]*instance, 0, len(s.actors))
	for _, a := range s.actors {
		list = append(list, a)
	}
	s.mu.Unlock()
	out := make([]Info, 0, len(list))
	for _, a := range list {
		out = append(out, a.Info())
	}
	slices.SortFunc(out, func(a, b Info) int { return strings.Compare(a.Instance, b.Instance) })
	return out
}

// Shell returns the membrane of an instance that is on this node.
func (s *Supervisor) Shell(ctx context.Context, name string) (Shell, error) {
	i, err := s.get(name)
	if err != nil {
		return nil, err
	}
	var sh Shell
	if err := i.do(ctx, func(context.Context) { sh = i.shell }); err != nil {
		return nil, err
	}
	if sh == nil {
		return nil, fmt.Errorf("%s: it has no membrane yet (%s)", name, i.Info().State)
	}
	return sh, nil
}

// OnAcked is to be told by the blobs that a member acknowledged a root.
func (s *Supervisor) OnAcked(root blobs.Hash, from peer.ID) {
	s.mu.Lock()
	list := make([]*saver, 0, len(s.actors))
	for _, a := range s.actors {
		if sv := a.saver(); sv != nil {
			list = append(list, sv)
		}
	}
	s.mu.Unlock()
	for _, sv := range list {
		sv.Acked(root, from)
	}
}

// Drained reports how many instances this node still owns.
func (s *Supervisor) Drained() int {
	n := 0
	for _, reg := range s.registers() {
		var body componentsv1.InstanceBody
		if reg.Owner == s.cfg.Self && (proto.Unmarshal(reg.Body, &body) != nil || body.GetEachNode() == "") {
			n++
		}
	}
	return n
}

// Info returns a copy of what is shown of the instance.
func (i *instance) Info() Info {
	i.mu.Lock()
	defer i.mu.Unlock()
	info := i.info
	if i.sv != nil {
		info.Saved, _ = i.sv.Saved()
		info.Listen = i.back.Listen()
		if f := i.follower; f.id != "" && time.Since(f.at) <= followSlow {
			info.Standby = f.id
			if info.Saved.Seq > f.seq {
				info.StandbyBehind = info.Saved.Seq - f.seq
			}
		}
		if i.sv.cfg.mode != componentsv1.Durability_DURABILITY_NONE {
			info.Unsaved = i.back.Unsaved()
		}
	}
	return info
}

func (i *instance) saver() *saver {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.sv
}

// Uptime of an instance that runs.
func (in Info) Uptime() time.Duration {
	if in.Started.IsZero() {
		return 0
	}
	return time.Since(in.Started)
}
