package supervisor

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/membrane"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Shell is the membrane of one instance together with the node socket that its process is given.
type Shell interface {
	Membrane() *membrane.Membrane
	NodeSocket() string
	// Credential returns a new credential for the next process, which may use the node socket from now on.
	Credential() string
	// Forbid ends that: the process of that credential gets no lease any more, and no answer.
	Forbid(credential string)
	// Bind sets the bindings that the component should have now.
	Bind(eff *components.Effective) error
	Close()
}

// Hooks is what a membrane tells the supervisor. None may block.
type Hooks struct {
	Stale func()                                     // a caller knows of a newer epoch than the one served here
	Hung  func(process *membrane.Backend, err error) // it missed its heartbeats
	// Serving says whether the instance may be served now.
	Serving func() bool
	// Lease says for how long a process of the instance may be granted to run, if it runs under a lease of the arbiter.
	Lease func() (left time.Duration, leased bool)
}

// ShellFactory makes the membrane of an instance.
type ShellFactory func(instance string, eff *components.Effective, hooks Hooks) (Shell, error)

// What the component is told about why it is to be quiet.
const (
	reasonSwap   = componentv1.QuiesceRequest_SWAP
	reasonMove   = componentv1.QuiesceRequest_MIGRATE
	reasonFreeze = componentv1.QuiesceRequest_FREEZE
)

// hooks are for the membrane of an instance, which may exist before the instance has an actor: a move prepares it.
func (s *Supervisor) hooks(name string, eff *components.Effective) Hooks {
	sv := s.service(name)
	sv.free.Store(free(eff))
	return Hooks{
		Stale: func() { s.spawn(func() { s.lookUp(name) }) },
		Hung: func(process *membrane.Backend, err error) {
			if i, gerr := s.get(name); gerr == nil {
				i.mu.Lock()
				i.hung = &hung{process, err}
				i.mu.Unlock()
				i.poke()
			}
		},
		Serving: func() bool {
			return sv.free.Load() || !sv.stale.Load() && s.mayServe(&sv.lease) && (s.lease.holds() || sv.keeps.Load() && s.CutOff())
		},
		Lease: func() (time.Duration, bool) {
			return s.left(&sv.lease) - leaseMargin, sv.lease.leased.Load()
		},
	}
}

// hung is a process that missed its heartbeats.
type hung struct {
	process *membrane.Backend
	why     error
}

// service says under which conditions an instance is served here.
type service struct {
	stale atomic.Bool // the log says that the instance is not this node's
	free  atomic.Bool // nothing has to hold
	keeps atomic.Bool // on_partition: keep
	lease leaseState
}

// free: what keeps no state may go on in any partition: whoever reaches it is served.
func free(eff *components.Effective) bool {
	return eff.Durable == componentsv1.Durability_DURABILITY_NONE && !eff.Leased()
}

func (s *Supervisor) service(name string) *service {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.services[name]
	if f == nil {
		f = &service{}
		s.services[name] = f
	}
	return f
}

// judge marks the instances that this node does not own any more, by the local view. It is called before serving is taken up again.
func (s *Supervisor) judge() {
	s.mu.Lock()
	names := make([]string, 0, len(s.actors))
	for name := range s.actors {
		names = append(names, name)
	}
	s.mu.Unlock()
	for _, name := range names {
		reg, ok := s.register(components.InstanceRegister(name))
		s.service(name).stale.Store(!ok || reg.Owner != s.cfg.Self || reg.Boot != s.cfg.Boot)
	}
}

// lookUp reads an instance's register through the log, instead of waiting for the view: somebody knows of a newer epoch. Answers are
// withheld meanwhile, so it does not give up.
func (s *Supervisor) lookUp(name string) {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
		reg, ok, err := s.cfg.Arbiter.Read(ctx, components.InstanceRegister(name))
		cancel()
		if err == nil {
			if ok {
				s.adopt(reg)
			}
			s.Wake()
			return
		}
		s.cfg.Log.Warn("a caller knows of a newer epoch, but the register could not be read; it is tried again", "instance", name, "error", err)
		if pause(s.ctx, wait) != nil {
			return
		}
	}
}

// open makes the instance's membrane if it has none.
func (i *instance) open(eff *components.Effective) error {
	if i.shell != nil {
		i.mem().Reopen("it is starting")
		return nil
	}
	i.sup.dropStandby(i.name) // its membrane has the same name and the same socket
	sh, err := i.sup.cfg.Shell(i.name, eff, i.sup.hooks(i.name, eff))
	if err != nil {
		return err
	}
	i.shell = sh
	return nil
}

func (i *instance) mem() *membrane.Membrane { return i.shell.Membrane() }

// shut refuses calls from now on: the instance is not here any more. owner, when known, is where callers go.
func (i *instance) shut(why string, owner *arbiter.Register) {
	if i.shell == nil {
		return
	}
	var to *membrane.Redirect
	if owner != nil && owner.Owner != "" && owner.Owner != i.sup.cfg.Self {
		to = &membrane.Redirect{Token: membrane.Token{Incarnation: owner.Incarnation, Epoch: owner.Epoch}, Node: owner.Owner.String()}
	}
	i.mem().Fail(why)
	i.mem().Close(why, to)
}

// release opens the gate again; a process that has ended meanwhile is noticed by the loop.
func (i *instance) release() {
	if err := i.mem().Release(); err != nil {
		i.sup.cfg.Log.Warn("the gate stays closed", "instance", i.name, "error", err)
	}
}

// held is how many calls wait at the gate now.
func (i *instance) held() uint64 { return uint64(i.mem().Stats().Held) }

func tokenOf(t components.Token) membrane.Token {
	return membrane.Token{Incarnation: t.Incarnation, Epoch: t.Epoch}
}
