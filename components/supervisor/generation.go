package supervisor

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/internal/planted"
	"github.com/coppice-project/coppice/membrane"
	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	// Replicas of a checkpoint, the owner's own copy included, where there are so many nodes.
	Replicas = components.DefaultReplicas
	replicas = Replicas
	// startDeadline bounds the Start call of a component; swaps are stricter, for calls are held meanwhile.
	startDeadline = 10 * time.Second
	stopGrace     = 2 * time.Second
)

// generation is one process of an instance: the one that serves, or one that is being prepared to.
type generation struct {
	instance string
	digest   string
	artifact string
	version  string
	desc     *componentv1.Description
	proc     runner.Process
	comp     componentv1.ComponentClient
	back     *membrane.Backend
	fetched  time.Time // when its artifact was here
	// launchTook is how long the process took from then until it said what it is, beginTook its Start.
	launchTook, beginTook time.Duration
	// credential that its process uses the node socket with.
	credential string

	token components.Token
	nonce uint64     // of the claim that made the epoch; 0 before it is saved
	head  *chainHead // of the chain it was restored from or has written
	saved Saved
	mark  uint64            // journal mark it was restored to
	run   *componentsv1.Run // as its process was told; nil: it runs no program

	saver    *saver
	endSaver context.CancelFunc
	since    time.Time // it has run as owner since then
	// recalled: it was started from what this node's disk showed, with nobody to ask whether that is the last that was acknowledged.
	recalled bool
}

// stopSaver has the saver end; it may be finishing a commit for a moment yet.
func (g *generation) stopSaver() {
	if g.endSaver != nil {
		g.endSaver()
	}
}

// waits says whether answers of the process wait for their commit.
func waits(g *generation, eff *components.Effective) bool {
	return mode(g, eff) == componentsv1.Durability_DURABILITY_EACH_CALL
}

// mode is how the process's state is saved. Each call can only be saved where the component makes it one transaction with its reply; what
// cannot do that is saved as often as an interval allows, and health says so.
func mode(g *generation, eff *components.Effective) componentsv1.Durability {
	switch {
	case !g.stateful():
		return componentsv1.Durability_DURABILITY_NONE
	case eff.Durable == componentsv1.Durability_DURABILITY_EACH_CALL && !g.has(componentv1.FeatureTxnCalls):
		return componentsv1.Durability_DURABILITY_INTERVAL
	}
	return eff.Durable
}

// interval is how often an interval saves.
func interval(g *generation, eff *components.Effective) time.Duration {
	switch {
	case eff.Durable == componentsv1.Durability_DURABILITY_EACH_CALL && mode(g, eff) != eff.Durable:
		return components.MinInterval
	case eff.Interval > 0:
		return eff.Interval
	}
	return components.DefaultInterval
}

// durableNow is how the process's state is saved in fact, in the words of the manifest.
func durableNow(g *generation, eff *components.Effective) string {
	return components.DurableName(mode(g, eff), interval(g, eff))
}

func (g *generation) stateful() bool { return g.desc.GetState().GetStateful() }

func (g *generation) has(feature string) bool { return slices.Contains(g.desc.GetFeatures(), feature) }

// launch starts a process for the instance. It serves nothing yet. phase is told what it is waiting for.
func (s *Supervisor) launch(ctx context.Context, name, digest string, eff *components.Effective, sh Shell, phase func(components.State)) (*generation, error) {
	g := &generation{instance: name, digest: digest, artifact: eff.ArtifactName, version: eff.Version}
	spec := runner.Spec{
		Instance: name, RunDir: s.runDir(name), LogDir: filepath.Join(s.cfg.LogDir, fileName(name)), DataDir: filepath.Join(s.cfg.DataDir, fileName(name)),
		NodeSocket: sh.NodeSocket(), Limits: runner.Limits{MemoryBytes: eff.MemoryBytes, CPUMillis: eff.CPUMillis},
		Sandbox: runner.Sandbox{Read: eff.Spec.GetSandbox().GetRead()},
	}
	for k, v := range eff.Spec.GetEnv() {
		spec.Env = append(spec.Env, k+"="+v)
	}
	slices.Sort(spec.Env)
	file, err := s.executable(ctx, g, &spec, eff, phase)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // opened for reading, or nothing
	phase(components.Starting)
	g.fetched = time.Now()
	spec.Credential = sh.Credential()
	proc, err := s.cfg.Runner.Start(ctx, spec)
	for tries := 0; errors.Is(err, syscall.ETXTBSY) && tries < 10 && pause(ctx, 5*time.Millisecond) == nil; tries++ {
		// Another process that was being forked while this file was written still has it open for writing, until it executes its own.
		proc, err = s.cfg.Runner.Start(ctx, spec)
	}
	if err != nil {
		sh.Forbid(spec.Credential)
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	st := &s.service(name).lease
	s.remember(proc, func() {
		sh.Forbid(spec.Credential)
		st.remove(proc)
	})
	g.credential = spec.Credential
	g.proc, g.comp = proc, componentv1.NewComponentClient(proc.Conn())
	if g.desc == nil {
		dctx, cancel := context.WithTimeout(ctx, startDeadline)
		defer cancel()
		if g.desc, err = g.comp.Describe(dctx, &componentv1.DescribeRequest{HostContract: componentv1.ProtocolVersion}); err != nil {
			return nil, errors.Join(fmt.Errorf("describe %s: %w", name, err), proc.Kill())
		}
	}
	g.back = sh.Membrane().Prepare(proc, g.desc)
	g.launchTook = time.Since(g.fetched)
	return g, nil
}

// restore gives the process the state of root, or of the nodes after `after` when it has been given that before.
func (s *Supervisor) restore(ctx context.Context, g *generation, root, after blobs.Hash) error {
	steps, head, err := chainSteps(s.cfg.Blobs, root, after)
	if err != nil {
		return err
	}
	if planted.Bug("restore-older") && len(steps) > 1 {
		steps = steps[:len(steps)-1]
	}
	if len(steps) == 0 {
		return nil
	}
	return s.replay(ctx, g, steps, head)
}

// replay gives the process nodes of a chain, in one stream: frames of a base and of the deltas after it are restore input in this order.
func (s *Supervisor) replay(ctx context.Context, g *generation, steps []blobs.Hash, head *chainHead) error {
	if head != nil && !s.reads(g, head.meta.GetSchema()) {
		return fmt.Errorf("%s@%s cannot read the state's schema %d (it reads %v): deploy a version that can", g.artifact, g.version, head.meta.GetSchema(), g.desc.GetState().GetReadsSchemas())
	}
	begin, bytes := time.Now(), uint64(0)
	if err := g.receive(ctx, func(send func(*componentv1.StateFrame) error) error {
		count := func(f *componentv1.StateFrame) error {
			bytes += uint64(len(f.GetData()))
			return send(f)
		}
		for _, node := range steps {
			if err := s.checkedStep(g.instance, node, count); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return fmt.Errorf("restore %s: %w", g.instance, err)
	}
	s.restored.note(bytes, time.Since(begin))
	if head != nil {
		g.head = head
	}
	return nil
}

// checkedStep sends the frames of one node of a chain, checked. What was stored before frames were checked is left to the component to judge.
func (s *Supervisor) checkedStep(instance string, step blobs.Hash, send func(*componentv1.StateFrame) error) error {
	node, err := s.cfg.Blobs.Get(step)
	if err != nil {
		return fmt.Errorf("read checkpoint %s: %w", step, err)
	}
	meta, err := metaOf(node)
	if err != nil {
		return err
	}
	check := frames.Stored()
	var wrong error
	look := func(err error) error {
		if err == nil || !meta.GetChecked() {
			wrong = cmp.Or(wrong, err)
			return nil
		}
		return fmt.Errorf("the checkpoint of mark %d: %w", meta.GetMark(), err)
	}
	err = nodeFrames(s.cfg.Blobs, node, func(f *componentv1.StateFrame) error {
		if wrong == nil {
			if err := look(check.Frame(f)); err != nil {
				return err
			}
		}
		return send(f)
	})
	if err == nil && wrong == nil {
		err = look(check.End())
	}
	if wrong != nil {
		s.cfg.Log.Warn("a checkpoint of an earlier version is not as the contract says; the component judges it", "instance", instance, "mark", meta.GetMark(), "error", wrong)
	}
	return err
}

// receive gives the process one stream of frames. A process that stands still is given up.
func (g *generation) receive(ctx context.Context, all func(send func(*componentv1.StateFrame) error) error) error {
	p := membrane.NewPatience(ctx)
	defer p.Close()
	stream, err := g.comp.Restore(p.Context())
	if err != nil {
		return err
	}
	ferr := all(func(f *componentv1.StateFrame) error {
		return p.Step(membrane.StateStall, "took nothing of its state", func() error { return stream.Send(f) })
	})
	if ferr != nil && !errors.Is(ferr, io.EOF) {
		return ferr // the stream is given up before its end: nothing of it counts
	}
	var reply *componentv1.RestoreReply
	if err := p.Step(membrane.StateTaken, "did not say that it has taken its state", func() (err error) { reply, err = stream.CloseAndRecv(); return err }); err != nil {
		return err // why the component refused says more than that the stream broke
	}
	if ferr != nil {
		return ferr
	}
	g.mark = reply.GetMark()
	return nil
}

// reads says whether the process can take a state of this schema.
func (s *Supervisor) reads(g *generation, schema uint32) bool { return readsSchema(g.desc, schema) }

func readsSchema(d *componentv1.Description, schema uint32) bool {
	st := d.GetState()
	return schema == 0 || schema == st.GetWritesSchema() || slices.Contains(st.GetReadsSchemas(), schema)
}

func isBuiltin(digest string) bool { return strings.HasPrefix(digest, BuiltinPrefix) }

func (g *generation) dead() bool {
	select {
	case <-g.proc.Done():
		return true
	default:
		return false
	}
}

// request is what the component is told when it starts as owner of token's epoch.
func (g *generation) request(token components.Token, eff *components.Effective, restored bool) *componentv1.StartRequest {
	attrs := map[string][]byte{}
	for k, v := range eff.Spec.GetAttributes() {
		attrs[k] = []byte(v)
	}
	return &componentv1.StartRequest{
		Instance: g.instance, Token: token.Proto(), Version: g.version, Attributes: &componentv1.Attributes{Json: attrs}, Restored: restored,
		Leased: eff.Leased(),
	}
}

// start runs the component's Start beside the process that serves, and asks it for a first sign of life.
func (g *generation) start(ctx context.Context, sh Shell, token components.Token, eff *components.Effective, restored bool, deadline time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	begin := time.Now()
	if err := sh.Membrane().StartBackend(ctx, g.back, g.request(token, eff, restored)); err != nil {
		return fmt.Errorf("start %s@%s: %w", g.artifact, g.version, err)
	}
	if _, err := g.back.Heartbeat(ctx, tokenOf(token)); err != nil {
		return fmt.Errorf("start %s@%s: %w", g.artifact, g.version, err)
	}
	g.token, g.since = token, time.Now()
	g.beginTook = g.since.Sub(begin)
	return nil
}

// ownWithin bounds the telling of a started process which epoch it was given; its next lease grant tells it, too.
const ownWithin = 500 * time.Millisecond

// own makes a process that was started before its epoch was claimed the owner of that epoch.
func (g *generation) own(ctx context.Context, token components.Token) {
	g.token = token
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ownWithin)
	defer cancel()
	_, _ = g.back.Heartbeat(ctx, tokenOf(token)) // a process that does not answer is found out by its heartbeats
}

// serve puts a started process behind the held gate and lets the calls in, unless the instance is frozen: then it stays so.
func (i *instance) serve(ctx context.Context, g *generation, eff *components.Effective) error {
	m := i.mem()
	m.SetDurable(waits(g, eff))
	g.back.SetCommitted(g.mark)
	if err := m.Switch(g.back, tokenOf(g.token)); err != nil {
		return err
	}
	m.SetVersion(g.version)
	if st, _ := m.State(); st == membrane.Frozen {
		return g.back.Quiesce(ctx, reasonFreeze)
	}
	return m.Release()
}

// save starts the goroutine that makes its state durable. have are those who keep its root; nil: those whom the register names.
func (i *instance) save(g *generation, reg arbiter.Register, eff *components.Effective, have []peer.ID) {
	ctx, cancel := context.WithCancel(i.sup.ctx)
	if have == nil {
		have = g.saved.Holders
	}
	if !g.saved.Root.IsZero() && i.sup.cfg.Blobs.Complete(g.saved.Root) {
		have = append([]peer.ID{i.sup.cfg.Self}, have...)
	}
	head := g.head
	if head != nil && head.meta.GetSchema() != g.desc.GetState().GetWritesSchema() {
		head = nil // a chain has one schema: the next checkpoint is a base
	}
	g.nonce, g.endSaver = reg.Nonce, cancel
	token := tokenIn(reg)
	g.saver = newSaver(saverConfig{
		self: i.sup.cfg.Self, key: reg.Key, instance: i.name, digest: g.digest, version: g.version, schema: g.desc.GetState().GetWritesSchema(),
		incarnation: reg.Incarnation, epoch: reg.Epoch, nonce: reg.Nonce, mode: mode(g, eff), interval: interval(g, eff), incremental: g.has(componentv1.FeatureIncremental),
		component: g.comp, store: i.sup.cfg.Blobs, ledger: i.sup.cfg.Arbiter, holders: i.holders, alive: i.sup.isAlive, apart: i.sup.apart, named: i.named,
		wanted:    func() int { return i.sup.wantedOf(reg.Key) },
		committed: g.back.SetCommitted, log: i.sup.cfg.Log, cut: i.sup.cutFor(eff),
		branched: func(head *chainHead, before Saved) error { return i.branched(g, head, before) }, local: i.sup.branch(i.name, g.token) != nil,
		history:  func(ctx context.Context, s *saver) { i.hist.keep(ctx, s, token) },
		answered: g.back.Answered, counted: g.back.CountSaved,
		faulty: func(why error) { i.faulty(g, why) },
	}, head, g.saved, have)
	i.mu.Lock()
	i.sv, i.back = g.saver, g.back
	i.mu.Unlock()
	sv := g.saver
	if !i.sup.spawn(func() {
		sv.run(ctx)
		i.poke()
	}) {
		sv.finish(errStopping)
	}
}

// named says who the register names as holders of a checkpoint.
func (i *instance) named(seq uint64) (holders []peer.ID, known bool) {
	reg, ok := i.sup.register(i.key)
	return reg.Holders, ok && reg.Seq == seq
}

// faulty tells that the process gives what is no state, or nothing. The checkpoint before stands.
func (i *instance) faulty(g *generation, why error) {
	i.poke()
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "bad-state", Trigger: "crash", Cause: why.Error(),
		Message: fmt.Sprintf("%s: what %s@%s gives as its state is not saved; its last checkpoint stands", i.name, g.artifact, g.version),
		Fields:  map[string]string{"version": g.version, "epoch": fmt.Sprint(g.token.Epoch)},
	})
}

// cutFor says when checkpoints of a component go on without the arbiter; nil: never.
func (s *Supervisor) cutFor(eff *components.Effective) func() bool {
	if !eff.Keeps() {
		return nil
	}
	return s.CutOff
}

// holders names the nodes that keep this instance's checkpoints.
func (i *instance) holders() ([]peer.ID, int) { return i.sup.holdersOf(i.key) }

// holdersOf names the nodes that keep an instance's checkpoints, as many as its manifest says, and how many of them a commit waits for: this one, then its successors, then those closest to its key. Where all of
// these are in this node's zone and another zone has a node, the last of them gives way to that: the loss of a zone must not take all copies.
func (s *Supervisor) holdersOf(key string) ([]peer.ID, int) {
	k, body := s.keepingOf(key)
	copies := s.copiesOf(k)
	to := []peer.ID{s.cfg.Self}
	add := func(id peer.ID) {
		if m, ok := s.cfg.Members.Member(id); ok && m.State == members.Alive && !m.NoHolder && len(to) < copies && !slices.Contains(to, id) {
			to = append(to, id)
		}
	}
	for _, id := range body.GetSuccessors() {
		if p, err := peer.Decode(id); err == nil {
			add(p)
		}
	}
	for _, m := range s.cfg.Members.Closest(key, 2*copies, func(m members.Member) bool { return m.State == members.Alive && !m.NoHolder }) {
		add(m.ID)
	}
	if len(to) == copies {
		s.spread(key, to)
	}
	if k.least > 0 {
		return to, k.least // whether so many are there or not: below it nothing is acknowledged
	}
	return to, max(len(to)/2+1, min(s.cfg.CopyAcks, len(to)))
}

// spread has one of the holders be in another zone than this node, which is the first of them.
func (s *Supervisor) spread(key string, to []peer.ID) {
	self, ok := s.cfg.Members.Member(s.cfg.Self)
	if !ok || self.Zone == "" || len(to) < 2 {
		return
	}
	elsewhere := func(m members.Member) bool { return m.Zone != "" && m.Zone != self.Zone }
	for _, id := range to[1:] {
		if m, ok := s.cfg.Members.Member(id); ok && elsewhere(m) {
			return
		}
	}
	for _, m := range s.cfg.Members.Closest(key, 1, func(m members.Member) bool { return m.State == members.Alive && !m.NoHolder && elsewhere(m) }) {
		to[len(to)-1] = m.ID
	}
}

func (s *Supervisor) isAlive(id peer.ID) bool {
	m, ok := s.cfg.Members.Member(id)
	return id == s.cfg.Self || (ok && m.State == members.Alive)
}

// end stops a process for good: gently with a grace, at once without.
func (s *Supervisor) end(sh Shell, g *generation, grace time.Duration) {
	if g == nil {
		return
	}
	g.stopSaver()
	if g.proc == nil {
		return
	}
	if grace <= 0 {
		if sh != nil {
			sh.Forbid(g.credential)
		}
		if err := g.proc.Kill(); err != nil {
			s.cfg.Log.Warn("process could not be killed", "instance", g.instance, "pid", g.proc.Ident().Pid, "error", err)
		}
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace+stopGrace)
	defer cancel()
	if err := g.proc.Stop(ctx, grace); err != nil {
		s.cfg.Log.Warn("process did not stop", "instance", g.instance, "pid", g.proc.Ident().Pid, "error", err)
	}
}

// runDir is short, for unix socket paths are: eight hex digits name the instance.
func (s *Supervisor) runDir(name string) string {
	sum := sha256.Sum256([]byte(name))
	return filepath.Join(s.cfg.RunDir, hex.EncodeToString(sum[:4]))
}

func fileName(instance string) string { return strings.ReplaceAll(instance, "/", "_") }

// bytes is what a restore of the generation's last committed state reads.
func (g *generation) bytes() uint64 {
	if g.head == nil {
		return 0
	}
	return g.head.link.Bytes
}
