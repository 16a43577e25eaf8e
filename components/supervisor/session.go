package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/internal/planted"
	"github.com/coppice-project/coppice/internal/unison"
)

// The owner's side of leases (notes: consistency §5). One session renews the leases of all instances of this node whose takeover is leased.
// Nothing of such an instance is served, and no process of it runs, past the moment until which the arbiter's leader acknowledged it.

const (
	// leaseMargin before its end an instance is ended, unless the lease was renewed: its process is told to be quiet and then killed. Leases that
	// the process itself is granted end with it.
	leaseMargin = 500 * time.Millisecond
	// leaseKill before the end every process of the instance is killed, whatever else is going on.
	leaseKill = 250 * time.Millisecond
	// quietWithin is what a process gets to come to rest before it is killed for its lease.
	quietWithin = 200 * time.Millisecond
	// leaseRenew is how often leases are renewed before the arbiter has said how long they last; then it is a third of that.
	leaseRenew = time.Second
	// leaseRetry is the pause after a renewal that was not answered.
	leaseRetry = 100 * time.Millisecond
	// regainWithin bounds the waiting for a lease that a running process needs to go on.
	regainWithin = 2 * time.Second
)

// session renews leases.
type session struct {
	seq  atomic.Uint64
	kick chan struct{}
}

func newSession() *session { return &session{kick: make(chan struct{}, 1)} }

func (s *session) poke() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// leaseState is what a node knows of the lease of one instance. The zero value is: none.
type leaseState struct {
	leased  atomic.Bool   // a lease is needed
	until   atomic.Int64  // on Config.BootTime; 0: none
	round   atomic.Uint64 // raised when it is given up: what was asked before does not count any more
	handing atomic.Bool   // it was given up (a move whose target may claim, a stop): nothing is asked for

	mu    sync.Mutex // guards procs
	procs map[runner.Process]bool
}

// left is how long the instance's lease lasts; not above zero: there is none.
func (s *Supervisor) left(st *leaseState) time.Duration {
	until := time.Duration(st.until.Load())
	if until == 0 {
		return 0
	}
	return until - s.lease.boot()
}

// mayServe is asked on each call: is there no need of a lease, or is it held.
func (s *Supervisor) mayServe(st *leaseState) bool {
	return !st.leased.Load() || s.left(st) > 0 || planted.Bug("lease-not-asked")
}

// leaseHeld says whether the instance may run and go on for a while.
func (i *instance) leaseHeld() bool {
	st := i.leaseState()
	return !st.leased.Load() || i.sup.left(st) > leaseMargin
}

func (i *instance) leaseState() *leaseState { return &i.sup.service(i.name).lease }

// grade notes whether the instance's present epoch is leased. awaited: its process, which goes on, gets its lease from regain; it is not served and not ended
// until that has returned.
func (i *instance) grade(leased, awaited bool) {
	st := i.leaseState()
	if leased && !st.leased.Load() {
		st.handing.Store(awaited) // before watchLeases sees it
	}
	if was := st.leased.Swap(leased); leased && !was {
		i.sup.anyLeased.Store(true)
		select {
		case i.sup.leasing <- struct{}{}:
		default: // it is told already
		}
		i.sup.session.poke()
	}
}

// takeOn is called before a process is told to start: from then on it is killed when the lease ends.
func (i *instance) takeOn(g *generation) error {
	i.leaseState().add(g.proc)
	if g.dead() {
		i.leaseState().remove(g.proc)
	}
	if !i.leaseHeld() {
		return fmt.Errorf("%w: its lease has ended", errOverEpoch)
	}
	return nil
}

func (st *leaseState) add(p runner.Process) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.procs == nil {
		st.procs = map[runner.Process]bool{}
	}
	st.procs[p] = true
}

func (st *leaseState) remove(p runner.Process) {
	st.mu.Lock()
	defer st.mu.Unlock()
	delete(st.procs, p)
}

func (st *leaseState) list() []runner.Process {
	st.mu.Lock()
	defer st.mu.Unlock()
	out := make([]runner.Process, 0, len(st.procs))
	for p := range st.procs {
		out = append(out, p)
	}
	return out
}

// leasedKeys lists what this node owns and needs a lease for.
func (s *Supervisor) leasedKeys() (keys []arbiter.LeaseKey, rounds map[arbiter.LeaseKey]uint64) {
	s.mu.Lock()
	names := make([]string, 0, len(s.actors))
	for name := range s.actors {
		names = append(names, name)
	}
	s.mu.Unlock()
	rounds = map[arbiter.LeaseKey]uint64{}
	for _, name := range names {
		st := &s.service(name).lease
		if !st.leased.Load() || st.handing.Load() {
			continue
		}
		round := st.round.Load()
		reg, ok := s.register(components.InstanceRegister(name))
		if !ok || reg.Owner != s.cfg.Self || reg.Boot != s.cfg.Boot {
			continue
		}
		k := arbiter.LeaseKey{Key: reg.Key, Epoch: reg.Epoch}
		keys = append(keys, k)
		rounds[k] = round
	}
	return keys, rounds
}

// keepLeases renews leases while there are any, each third of their time.
func (s *Supervisor) keepLeases(ctx context.Context) {
	every := leaseRenew
	for {
		wait := every
		if ttl, err := s.renewLeases(ctx, every); err != nil {
			s.cfg.Log.Debug("leases were not renewed", "error", err)
			wait = leaseRetry
		} else if ttl > 0 {
			every = ttl / 3
			wait = every
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-s.session.kick:
		case <-t.C:
		}
		t.Stop()
	}
}

// renewLeases asks once, for everything.
func (s *Supervisor) renewLeases(ctx context.Context, within time.Duration) (ttl time.Duration, err error) {
	keys, rounds := s.leasedKeys()
	if len(keys) == 0 {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	got, err := s.cfg.Arbiter.Lease(ctx, arbiter.LeaseRequest{Boot: s.cfg.Boot, Seq: s.session.seq.Add(1), Keys: keys})
	if err != nil {
		return 0, err
	}
	for _, k := range got.Held {
		name := instanceOf(k.Key)
		st := &s.service(name).lease
		fresh := s.left(st) <= leaseMargin
		if st.extend(rounds[k], got.Asked+got.For) && fresh {
			if i, err := s.get(name); err == nil {
				i.poke()
			}
		}
	}
	for k, why := range got.Refused {
		s.cfg.Log.Debug("a lease was refused", "register", k.Key, "epoch", k.Epoch, "reason", why)
	}
	return got.For, nil
}

// extend takes over what was acknowledged, unless the lease was given up since it was asked for.
func (st *leaseState) extend(round uint64, until time.Duration) bool {
	st.mu.Lock() // a give-up comes before or after as a whole
	defer st.mu.Unlock()
	if st.round.Load() != round {
		return false
	}
	if old := st.until.Load(); int64(until) > old {
		st.until.Store(int64(until))
	}
	return true
}

// drop ends the lease here, at once.
func (st *leaseState) drop() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.round.Add(1)
	st.until.Store(0)
}

// watchLeases ends what runs on when its lease does not, whatever its actor is busy with.
func (s *Supervisor) watchLeases(ctx context.Context) {
	tick := unison.New(leaseTick, string(s.cfg.Self))
	defer tick.Stop()
	for {
		next := tick.C
		if !s.anyLeased.Load() { // most nodes have nothing that is leased: they need not wake for it
			next = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-s.leasing:
			tick.Next() // one that nobody waited for may be long past
			continue
		case <-next:
			tick.Next()
		}
		s.anyLeased.Store(false)
		s.mu.Lock()
		list := make([]*instance, 0, len(s.actors))
		for _, a := range s.actors {
			list = append(list, a)
		}
		s.mu.Unlock()
		if slices.ContainsFunc(list, func(i *instance) bool { return i.leaseState().leased.Load() }) {
			s.anyLeased.Store(true)
		}
		for _, i := range list {
			st := i.leaseState()
			if !st.leased.Load() || st.handing.Load() {
				continue
			}
			switch left := s.left(st); {
			case left <= leaseKill:
				for _, p := range st.list() {
					if err := p.Kill(); err != nil {
						s.cfg.Log.Warn("process could not be killed at the end of its lease", "instance", i.name, "pid", p.Ident().Pid, "error", err)
					}
				}
			case left <= leaseMargin:
				i.poke()
			}
		}
	}
}

// giveUp tells the arbiter that nothing of the instance acts here any more: its process is at rest behind a held gate. Another node may claim it
// at once. The lease has to be regained before the process may go on.
func (i *instance) giveUp(ctx context.Context, reg arbiter.Register) error {
	st := i.leaseState()
	st.handing.Store(true)
	st.drop()
	_, err := i.sup.cfg.Arbiter.Lease(ctx, arbiter.LeaseRequest{
		Boot: i.sup.cfg.Boot, Seq: i.sup.session.seq.Add(1), GiveUp: []arbiter.LeaseKey{{Key: i.key, Epoch: reg.Epoch}},
	})
	if err != nil {
		return fmt.Errorf("give up the lease of %s: %w", i.name, err)
	}
	return nil
}

// regain waits for the lease that a process at rest needs to go on.
func (i *instance) regain(ctx context.Context) error {
	st := i.leaseState()
	if !st.leased.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), regainWithin)
	defer cancel()
	defer context.AfterFunc(i.sup.ctx, cancel)()
	defer st.handing.Store(false)
	for i.sup.left(st) <= leaseMargin {
		reg, ok := i.sup.register(i.key)
		if !ok || reg.Owner != i.sup.cfg.Self {
			return ErrNotHere
		}
		round := st.round.Load()
		k := arbiter.LeaseKey{Key: i.key, Epoch: reg.Epoch}
		got, err := i.sup.cfg.Arbiter.Lease(ctx, arbiter.LeaseRequest{Boot: i.sup.cfg.Boot, Seq: i.sup.session.seq.Add(1), Keys: []arbiter.LeaseKey{k}})
		if err != nil {
			return err
		}
		if len(got.Held) == 1 {
			st.extend(round, got.Asked+got.For)
			continue
		}
		if perr := pause(ctx, leaseRetry); perr != nil {
			return fmt.Errorf("regain the lease of %s: %s: %w", i.name, got.Refused[k], perr)
		}
	}
	return nil
}

// yield ends a process whose lease ends, or waits for the lease that its start needs.
func (i *instance) yield() time.Duration {
	if i.gen == nil {
		i.leaseState().handing.Store(false) // it may have been given up by a stop
		if st := i.Info().State; st != components.Stopped {
			i.show(components.Starting, "it waits for its lease: it is exactly-one, and nothing of it runs before the arbiter says that nothing of it runs elsewhere")
		}
		i.sup.session.poke()
		return leaseRetry
	}
	i.endForLease()
	return leaseRetry
}

// endForLease ends the running process before another node may start one.
func (i *instance) endForLease() {
	left := i.sup.left(i.leaseState())
	i.mem().Fail("its lease ends")
	if left > leaseKill && !i.gen.dead() {
		ctx, cancel := context.WithTimeout(context.Background(), min(quietWithin, left-leaseKill))
		if err := i.gen.back.Quiesce(ctx, reasonFreeze); err != nil {
			i.sup.cfg.Log.Debug("it did not come to rest before the end of its lease", "instance", i.name, "error", err)
		}
		cancel()
	}
	i.kill("its lease is not renewed")
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "yielded", Cause: "the arbiter is out of reach, this node was suspended, or another node claims it",
		Message: i.name + " is exactly-one and ended on " + i.sup.cfg.Name + ": its lease was not renewed",
	})
	i.show(components.Stopped, "it is exactly-one, and its lease cannot be renewed now")
}

// regradeAgain is the pause after a change of the takeover that failed.
const regradeAgain = time.Second

// regrade begins an epoch in which the takeover is what desired state says: it is fixed for each epoch, so that whoever claims the next knows
// whether there is a lease to wait for. The process goes on.
func (i *instance) regrade(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, leased bool) time.Duration {
	next := proto.CloneOf(body)
	next.Leased, next.Trigger, next.Cause = leased, "operator", "another takeover is deployed"
	next.ClaimedUnixMs = i.sup.date()
	if err := i.claim(ctx, reg, next, arbiter.ClaimRequest{}); err != nil {
		i.regradeAt = time.Now().Add(regradeAgain)
		i.sup.cfg.Log.Warn("the takeover could not be changed; it is tried again", "instance", i.name, "error", err)
		return time.Millisecond
	}
	i.grade(leased, i.gen != nil)
	if i.gen != nil {
		if err := i.regain(ctx); err != nil && !errors.Is(err, ErrNotHere) {
			i.sup.cfg.Log.Warn("no lease yet: the process is ended until there is one", "instance", i.name, "error", err)
		}
	}
	return time.Millisecond
}
