package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/internal/planted"
	"github.com/coppice-project/coppice/internal/unison"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Registers is what the supervisor needs of the arbiter.
type Registers interface {
	Get(key string) (arbiter.Register, bool)
	List(prefix string) []arbiter.Register
	Watch(f func(old, now *arbiter.Register)) (cancel func())
	Read(ctx context.Context, key string) (arbiter.Register, bool, error)
	Claim(ctx context.Context, r arbiter.ClaimRequest) (arbiter.Register, error)
	Commit(ctx context.Context, r arbiter.CommitRequest) (arbiter.Register, error)
	SetHolders(ctx context.Context, key string, seq uint64, holders []peer.ID) (arbiter.Register, error)
	Txn(ctx context.Context, r arbiter.TxnRequest) (arbiter.TxnResult, error)
	Lease(ctx context.Context, r arbiter.LeaseRequest) (arbiter.Leases, error)
	Sync(ctx context.Context) error
	Status() arbiter.Status
}

// View is what it needs of the members.
type View interface {
	Member(id peer.ID) (members.Member, bool)
	Alive() []members.Member
	Closest(key string, n int, ok func(members.Member) bool) []members.Member
	Subscribe(f func(members.Change)) (cancel func())
}

// Artifacts gives executables and what they say about themselves; of a program that is what the component says that runs it.
type Artifacts interface {
	Open(ctx context.Context, digest string) (*os.File, *componentsv1.Artifact, error)
	Description(ctx context.Context, digest string) (*componentv1.Description, error)
	Warm(ctx context.Context, digest string) error
	Cached(digest string) bool
}

// Publisher takes events.
type Publisher interface{ Publish(ev events.Event) }

// Builtin is a component that the binary brings along: it is started from Exec with Args, whatever the registry holds.
type Builtin struct {
	Exec runner.ExecFile
	Args []string
}

// BuiltinPrefix begins the digest of a builtin: "builtin:placement".
const BuiltinPrefix = components.BuiltinPrefix

// Config of a node's supervisor. All fields are needed unless said otherwise.
type Config struct {
	Self      peer.ID
	Name      string // of this node
	Boot      uint64 // of this process
	Arbiter   Registers
	Members   View
	Blobs     *blobs.Store
	Artifacts Artifacts
	Runner    runner.Runner
	Peers     peers.Peers
	Caller    *peers.Caller
	Events    Publisher
	Shell     ShellFactory
	Builtins  map[string]Builtin // by digest
	RunDir    string             // short; sockets of processes
	LogDir    string
	DataDir   string
	Settle    time.Duration // an epoch that has answered and held so long is settled; default 5 s
	Rand      *rand.Rand    // default: seeded by the system
	Log       *slog.Logger
	// Now is what time it is in the cluster, for dates that other nodes compare with theirs. Default: this machine's clock.
	Now func() time.Time
	// Profile is lan (default), local or wan: how long the node goes without a word of the arbiter.
	Profile string
	// BootTime is CLOCK_BOOTTIME; Touch says how long ago the arbiter was last heard of (negative: never).
	BootTime func() time.Duration
	Touch    func() time.Duration
	// Changed is told that an instance's state changed; it must not block. May be nil.
	Changed func()
	// Copies of a checkpoint, this node's included, and how many of them a commit waits for at least; 0: Replicas, and a majority.
	Copies, CopyAcks int
	// Adopted is told registers that are newer than the local view; it must not block. May be nil.
	Adopted func(reg arbiter.Register)
}

const defaultSettle = 5 * time.Second

// Supervisor of one node. Safe for concurrent use.
type Supervisor struct {
	cfg    Config
	ctx    context.Context // ends with Run
	cancel context.CancelFunc
	goes   sync.WaitGroup
	kick   chan struct{}
	// lease is this node's right to serve what it owns.
	lease *lease
	// restored is how fast states are restored here.
	restored restoreSpeed
	// session renews the leases of single instances.
	session *session
	// retiring: nothing is to run here any more.
	retiring   atomic.Bool
	reconciles chan struct{}
	leasing    chan struct{} // something of this node has become leased
	anyLeased  atomic.Bool   // something may be

	randMu sync.Mutex // guards cfg.Rand

	mu     sync.Mutex // guards the fields below
	actors map[string]*instance
	newer  map[string]arbiter.Register // what claims answered before the local view has it
	moves  map[string]*prepared
	// preparing counts the moves whose process is being prepared here, by instance; standbys are those kept here, or about to be.
	preparing map[string]int
	standbys  map[string]*standby
	// services are by instance and stay: a membrane may outlive the actor that made it.
	services map[string]*service
	warming  map[string]time.Time // by digest: not again before
	deaths   map[peer.ID]death    // the last of each node that was seen
	// successions are by register.
	successions map[string]*succession
	// sightings are the epochs that there are, by register; watching: the view has been that of the arbiter.
	sightings map[string]sighting
	watching  bool
	keepings  map[string]keepingAt // by component
	// branches are those of this node that are not stored in the cluster yet, by instance and ownership.
	branches map[string]*componentsv1.Branch
	closed   bool // Run has ended: nothing is started any more
}

// date is now, as records have it.
func (s *Supervisor) date() uint64 { return uint64(max(s.cfg.Now().UnixMilli(), 0)) }

// New returns a supervisor that does nothing before Run.
func New(cfg Config) *Supervisor {
	if cfg.Settle == 0 {
		cfg.Settle = defaultSettle
	}
	if cfg.Copies <= 0 {
		cfg.Copies = replicas
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	s := &Supervisor{
		cfg: cfg, kick: make(chan struct{}, 1), actors: map[string]*instance{}, newer: map[string]arbiter.Register{},
		moves: map[string]*prepared{}, services: map[string]*service{}, warming: map[string]time.Time{},
		deaths: map[peer.ID]death{}, successions: map[string]*succession{}, sightings: map[string]sighting{}, keepings: map[string]keepingAt{}, standbys: map[string]*standby{}, preparing: map[string]int{}, branches: map[string]*componentsv1.Branch{},
		reconciles: make(chan struct{}, 1), leasing: make(chan struct{}, 1),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.lease, s.session = newLease(s.cfg), newSession()
	s.handleMoves()
	s.handleReconcile()
	return s
}

// Run works until ctx ends, then ends every process of this node's instances, without giving up their ownership. It is called once.
func (s *Supervisor) Run(ctx context.Context) error {
	defer context.AfterFunc(ctx, s.cancel)()
	defer s.shutDown()
	s.endLeftovers(ctx)
	s.loadBranches()
	defer s.cfg.Arbiter.Watch(func(old, now *arbiter.Register) {
		if concerns(old, now) {
			s.Wake()
		}
	})()
	defer s.cfg.Members.Subscribe(func(c members.Change) {
		s.onMember(c)
		s.Wake()
	})()
	s.spawn(func() { s.lease.run(s.ctx, s.judge, s.Wake) })
	s.spawn(func() { s.keepLeases(s.ctx) })
	s.spawn(func() { s.keepReconciling(s.ctx) })
	s.spawn(func() { s.watchLeases(s.ctx) })
	s.spawn(func() { s.keepBranchCopies(s.ctx) })
	s.spawn(func() { s.keepRestingCopies(s.ctx) })
	s.spawn(func() { s.keepWarm(s.ctx) })
	tick := unison.New(time.Second, string(s.cfg.Self))
	defer tick.Stop()
	s.sweep()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.kick:
		case <-tick.C:
			tick.Next()
		}
		s.sweep()
	}
}

// shutDown ends everything and waits for it.
func (s *Supervisor) shutDown() {
	s.cancel()
	s.mu.Lock()
	s.closed = true
	moves := maps.Clone(s.moves)
	s.mu.Unlock()
	for name, p := range moves {
		s.dispose(name, p)
	}
	s.goes.Wait()
}

// spawn runs f beside everything else; false: Run has ended, and f does not run.
func (s *Supervisor) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.goes.Go(f)
	return true
}

// concerns says whether a change of a register may make an actor act: pure checkpoints do not.
func concerns(old, now *arbiter.Register) bool {
	reg := now
	if reg == nil {
		reg = old
	}
	switch {
	case strings.HasPrefix(reg.Key, components.InstancePrefix):
		return old == nil || now == nil || old.Revision != now.Revision || old.Epoch != now.Epoch || old.Incarnation != now.Incarnation
	case strings.HasPrefix(reg.Key, components.ApplicationPrefix):
		return true
	}
	return reg.Key == pausedKey
}

// Wake has every actor look again.
func (s *Supervisor) Wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// owns says whether an instance is this node's to run.
func (s *Supervisor) owns(reg arbiter.Register) bool {
	return reg.Owner == s.cfg.Self || planted.Bug("branch-elsewhere") && s.CutOff()
}

// sweep makes sure that each instance this node owns has an actor, and that actors look.
func (s *Supervisor) sweep() {
	list := s.registers()
	s.sight(list)
	stand := map[string]standing{}
	for _, reg := range list {
		s.overtaken(reg)
		if s.owns(reg) {
			s.actor(instanceOf(reg.Key))
			continue
		}
		s.succeed(reg)
		body := s.inLine(reg)
		if body == nil {
			continue
		}
		s.warm(reg, body)
		if want, ok := s.standsBy(reg, body); ok {
			stand[instanceOf(reg.Key)] = want
		}
	}
	s.stand(stand)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.actors {
		a.poke()
	}
}

const (
	// warmWithin bounds the fetching of an artifact ahead of its need; warmAgain is the pause after one that failed.
	warmWithin = time.Minute
	warmAgain  = 10 * time.Second
	// warmRanks is how many successors fetch ahead, where the manifest does not want it of all.
	warmRanks = 2
)

// warm brings the artifact of an instance here when this node is among the first in line to take it over.
func (s *Supervisor) warm(reg arbiter.Register, body *componentsv1.InstanceBody) {
	succ, digest := body.GetSuccessors(), body.GetDigest()
	if !s.warms(body) {
		succ = succ[:min(len(succ), warmRanks)]
	}
	if !slices.Contains(succ, s.cfg.Self.String()) || strings.HasPrefix(digest, BuiltinPrefix) || s.cfg.Artifacts.Cached(digest) {
		return
	}
	s.mu.Lock()
	busy := time.Now().Before(s.warming[digest])
	if !busy {
		s.warming[digest] = time.Now().Add(warmWithin + warmAgain)
	}
	s.mu.Unlock()
	if busy {
		return
	}
	s.spawn(func() {
		ctx, cancel := context.WithTimeout(s.ctx, warmWithin)
		defer cancel()
		err := s.cfg.Artifacts.Warm(ctx, digest)
		if err != nil && s.ctx.Err() == nil {
			s.cfg.Log.Warn("artifact could not be fetched ahead", "instance", instanceOf(reg.Key), "digest", digest, "error", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if err == nil {
			delete(s.warming, digest)
		} else {
			s.warming[digest] = time.Now().Add(warmAgain)
		}
	})
}

// actor returns the instance's actor, started if need be; nil after Run has ended.
func (s *Supervisor) actor(name string) *instance {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.actors[name]; a != nil || s.closed {
		return a
	}
	a := newInstance(s, name)
	s.actors[name] = a
	s.goes.Go(func() { a.loop(s.ctx) })
	return a
}

// drop forgets an actor that has nothing left to do.
func (s *Supervisor) drop(i *instance) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.actors[i.name] == i {
		delete(s.actors, i.name)
	}
	close(i.gone)
}

// registers lists the instances' registers as this node knows them best.
func (s *Supervisor) registers() []arbiter.Register {
	list := s.cfg.Arbiter.List(components.InstancePrefix)
	for i := range list {
		list[i] = s.best(list[i])
	}
	return list
}

// Register returns an instance's register as this node knows it best: what its own claims answered may be ahead of the local view.
func (s *Supervisor) Register(key string) (arbiter.Register, bool) { return s.register(key) }

// register returns one register as this node knows it best.
func (s *Supervisor) register(key string) (arbiter.Register, bool) {
	if reg, ok := s.cfg.Arbiter.Get(key); ok {
		return s.best(reg), true
	}
	s.mu.Lock()
	n, have := s.newer[key]
	s.mu.Unlock()
	if !have {
		return arbiter.Register{}, false
	}
	// The view does not have it: not yet, or not any more.
	st := s.cfg.Arbiter.Status()
	if reg, ok := s.cfg.Arbiter.Get(key); ok {
		return s.best(reg), true
	}
	if n.Incarnation < st.Incarnation || n.Incarnation == st.Incarnation && n.Index <= st.Index {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.newer[key].Index == n.Index {
			delete(s.newer, key)
		}
		return arbiter.Register{}, false
	}
	return n, true
}

func (s *Supervisor) best(reg arbiter.Register) arbiter.Register {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.newer[reg.Key]
	if !ok {
		return reg
	}
	if !later(n, reg) {
		delete(s.newer, reg.Key)
		return reg
	}
	return n
}

// later says whether a is of a later point of the log than b.
func later(a, b arbiter.Register) bool {
	return a.Incarnation > b.Incarnation || a.Incarnation == b.Incarnation && a.Index > b.Index
}

// Adopt takes over a register that an answer of the arbiter showed, before the local view has it.
func (s *Supervisor) Adopt(reg arbiter.Register) { s.adopt(reg) }

// adopt takes over what an answer of the arbiter said, before the local view says it.
func (s *Supervisor) adopt(reg arbiter.Register) {
	if reg.Key == "" || reg.Deleted {
		return
	}
	s.mu.Lock()
	if old, ok := s.newer[reg.Key]; !ok || later(reg, old) {
		s.newer[reg.Key] = reg
	}
	s.mu.Unlock()
	if name := instanceOf(reg.Key); name != "" && reg.Owner == s.cfg.Self {
		s.openStandby(name)
		if a := s.actor(name); a != nil {
			a.poke()
		}
	}
	if s.cfg.Adopted != nil {
		s.cfg.Adopted(reg)
	}
	s.Wake()
}

// effective returns a component as it should be now; nil when no application has it (any more).
func (s *Supervisor) effective(component string) (*components.Effective, error) {
	eff, _, err := s.desired(component)
	return eff, err
}

// desired is effective with the revision of the desired state that says so; 0: there is none.
func (s *Supervisor) desired(component string) (eff *components.Effective, revision uint64, err error) {
	app, name, _ := strings.Cut(component, "/")
	reg, ok := s.register(components.ApplicationRegister(app))
	if !ok {
		return nil, 0, nil
	}
	var a componentsv1.Application
	if err := proto.Unmarshal(reg.Body, &a); err != nil {
		return nil, reg.Revision, fmt.Errorf("read application %s: %w", app, err)
	}
	if a.GetRemoving() {
		return nil, reg.Revision, nil
	}
	eff, err = components.EffectiveOf(&a, name)
	return eff, reg.Revision, err
}

func (s *Supervisor) nonce() uint64 {
	s.randMu.Lock()
	defer s.randMu.Unlock()
	for {
		if n := s.cfg.Rand.Uint64(); n != 0 {
			return n
		}
	}
}

func (s *Supervisor) nodeName(id peer.ID) string {
	if m, ok := s.cfg.Members.Member(id); ok && m.Name != "" {
		return m.Name
	}
	return id.String()
}

func instanceOf(key string) string { return components.InstanceOfKey(key) }

// ErrNotHere says that this node does not run the instance: another one owns it, or nobody. Nothing was done.
var ErrNotHere = errors.New("not on this node")

// ErrBranch says that what an instance did without the arbiter is not committed yet: only then may its version, state or node change. Nothing was done.
var ErrBranch = errors.New("it has gone on without the arbiter, and that is not brought together yet")

func (s *Supervisor) get(name string) (*instance, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.actors[name]; a != nil {
		return a, nil
	}
	return nil, fmt.Errorf("%s: %w", name, ErrNotHere)
}
