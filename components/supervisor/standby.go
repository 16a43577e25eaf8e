package supervisor

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// A standby (manifest: state.standby). warm: each successor of an instance has its artifact and its pages. hot: the first of them has, besides, what the target
// of a move has before the pause: a process that has been given the state and was not started. It is given what the owner commits, as it does. When the owner
// dies this node claims as any successor does, and only once it owns the instance the process is given the rest, started and put behind the gate: a standby has
// no token, and its gate is closed. Whatever is wrong with it, the instance is started as if there were none.
//
// The node that keeps a standby decides by the registers alone whether it should, so nothing has to be told when the owner dies.

const (
	protoFollow protocol.ID = "/coppice/standby-follow/1"
	// followHold is how long an owner lets a standby wait for another checkpoint; followWithin bounds one question.
	followHold   = 2 * time.Second
	followWithin = followHold + 3*time.Second
	// followPace is the least time from one restore of what was committed to the next: commits that come faster share one.
	followPace = 20 * time.Millisecond
	// followSlow is how long after its last question a standby is taken for gone.
	followSlow = followWithin + followHold
	// standbyAgain is the pause before a standby that ended is built again, doubled each time, up to maxBackoff.
	standbyAgain = time.Second
	// warmEvery is how often a successor looks whether it has the pages.
	warmEvery = time.Second
)

// standing is what a standby is made for: it is built anew when that changes.
type standing struct {
	digest string            // of the artifact
	spec   [sha256.Size]byte // of what the manifest and commands say of the component
}

// standby is one that this node keeps, or is about to.
type standby struct {
	want   standing
	cancel context.CancelFunc
}

// follower is who keeps a standby of an instance of this node, as it told.
type follower struct {
	id  peer.ID
	seq uint64 // of the checkpoint that it has
	at  time.Time
}

// errBusy: a move to this node is being prepared, or what ran here before is not ended yet.
var errBusy = errors.New("this node is busy with the instance otherwise")

// inLine returns the body of a register that names this node as a successor of its owner; nil: it does not.
func (s *Supervisor) inLine(reg arbiter.Register) *componentsv1.InstanceBody {
	var body componentsv1.InstanceBody
	if reg.Owner == s.cfg.Self || reg.Owner == "" || proto.Unmarshal(reg.Body, &body) != nil || !slices.Contains(body.GetSuccessors(), s.cfg.Self.String()) {
		return nil
	}
	return &body
}

// standsBy says whether this node should keep a hot standby of an instance, and what for.
func (s *Supervisor) standsBy(reg arbiter.Register, body *componentsv1.InstanceBody) (standing, bool) {
	if body.GetEachNode() != "" || body.GetQuarantined() || s.paused() || s.retiring.Load() || s.keeping(body.GetComponent()).standby != components.StandbyHot {
		return standing{}, false
	}
	if rank, ok := s.rank(reg.Key, body, reg.Owner); !ok || rank != 0 {
		return standing{}, false
	}
	eff, err := s.effective(body.GetComponent())
	if err != nil || surplus(eff, body) || eff.Stopped {
		return standing{}, false
	}
	return standingOf(body, eff)
}

func standingOf(body *componentsv1.InstanceBody, eff *components.Effective) (standing, bool) {
	spec, err := proto.MarshalOptions{Deterministic: true}.Marshal(eff.Spec)
	return standing{body.GetDigest(), sha256.Sum256(spec)}, err == nil
}

// stand begins the standbys that this node should keep, and ends those that it should not. wanted is by instance.
func (s *Supervisor) stand(wanted map[string]standing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, st := range s.standbys {
		if want, ok := wanted[name]; !ok || want != st.want {
			st.cancel()
		}
	}
	for name, want := range wanted {
		if s.standbys[name] != nil || s.closed {
			continue
		}
		ctx, cancel := context.WithCancel(s.ctx)
		st := &standby{want, cancel}
		s.standbys[name] = st
		s.goes.Go(func() {
			s.keepStandby(ctx, name)
			cancel()
			s.mu.Lock()
			delete(s.standbys, name)
			s.mu.Unlock()
			s.Wake()
		})
	}
}

// keepStandby has one standby until ctx ends.
func (s *Supervisor) keepStandby(ctx context.Context, name string) {
	for wait := standbyAgain; ; wait = min(2*wait, maxBackoff) {
		begin := time.Now()
		err := s.standOnce(ctx, name)
		if ctx.Err() != nil {
			return
		}
		if time.Since(begin) > healthyAfter {
			wait = standbyAgain
		}
		if errors.Is(err, errBusy) || peers.CodeOf(err) == wirev1.Failure_REFUSED { // the owner is starting it, for example
			wait = standbyAgain
		} else {
			s.cfg.Log.Warn("a standby ended; it is built again", "instance", name, "in", wait, "error", err)
		}
		if pause(ctx, wait) != nil {
			return
		}
	}
}

// standOnce has one process stand by, until ctx ends or something is wrong with it.
func (s *Supervisor) standOnce(ctx context.Context, name string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &prepared{standby: true, stop: cancel, done: make(chan struct{}), over: make(chan struct{})}
	if !s.reserve(name, p) {
		return errBusy
	}
	err := s.attend(ctx, name, p)
	close(p.done)
	if reg, ok := s.register(components.InstanceRegister(name)); ok && reg.Owner == s.cfg.Self && p.ready && !p.torn && s.ctx.Err() == nil {
		return err // the instance's actor takes it, or ends it
	}
	s.dispose(name, p)
	return err
}

// reserve makes p the one that waits here for an instance, where nothing else of it is here.
func (s *Supervisor) reserve(name string, p *prepared) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.moves[name] != nil || s.preparing[name] > 0 || s.actors[name] != nil {
		return false
	}
	s.moves[name] = p
	return true
}

// attend prepares the process of a standby and gives it what the owner commits.
func (s *Supervisor) attend(ctx context.Context, name string, p *prepared) error {
	key := components.InstanceRegister(name)
	news, err := s.askNews(ctx, key, p)
	if err != nil {
		return err
	}
	if err := s.buildStandby(ctx, name, p, news); err != nil {
		return fmt.Errorf("prepare a standby: %w", err)
	}
	s.mu.Lock()
	p.ready = true
	s.mu.Unlock()
	s.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + name, Type: "standby", Message: fmt.Sprintf("%s keeps a standby of %s, ready from checkpoint %d", s.cfg.Name, name, p.seq),
		Fields: map[string]string{"seq": fmt.Sprint(p.seq), "bytes": fmt.Sprint(p.gen.bytes())},
	})
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-p.gen.proc.Done():
			cancel(fmt.Errorf("its process ended (%s)", p.gen.proc.Exit()))
		case <-ctx.Done():
		}
	}()
	for {
		news, err := s.askNews(ctx, key, p)
		wait := followPace
		if err == nil {
			err = s.catchUp(ctx, key, p, news)
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case p.torn:
			return err
		case err != nil: // it has what it has; who owns the instance is looked up again
			s.cfg.Log.Debug("a standby does not hear of its owner", "instance", name, "error", err)
			wait = standbyAgain / 4
		}
		if pause(ctx, wait) != nil {
			return context.Cause(ctx)
		}
	}
}

// askNews asks the owner, as this node knows it, for what is newer than the standby.
func (s *Supervisor) askNews(ctx context.Context, key string, p *prepared) (*componentsv1.FollowReply, error) {
	reg, ok := s.register(key)
	if !ok || reg.Owner == "" || reg.Owner == s.cfg.Self {
		return nil, errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, followWithin)
	defer cancel()
	reply := &componentsv1.FollowReply{}
	err := s.cfg.Caller.Call(ctx, reg.Owner, protoFollow, &componentsv1.FollowRequest{
		Instance: instanceOf(key), Root: rootBytes(p.root), Seq: p.seq, Ready: p.ready,
	}, reply)
	return reply, err
}

// buildStandby starts the process and gives it the state. Its gate is closed: callers who come here are sent to look again.
func (s *Supervisor) buildStandby(ctx context.Context, name string, p *prepared, news *componentsv1.FollowReply) error {
	reg, ok := s.register(components.InstanceRegister(name))
	body := s.inLine(reg)
	if !ok || body == nil {
		return errBusy
	}
	eff, err := s.effective(body.GetComponent())
	if err != nil || eff == nil {
		return errors.Join(errBusy, err)
	}
	if p.want, ok = standingOf(body, eff); !ok {
		return errBusy
	}
	sh, err := s.cfg.Shell(name, eff, s.hooks(name, eff))
	if err != nil {
		return err
	}
	sh.Membrane().Close("this node keeps a standby of it", nil)
	p.shell = sh
	if err := sh.Bind(eff); err != nil {
		return err
	}
	root := hashFrom(news.GetRoot())
	if err := s.fetch(ctx, root, reg.Key, idsFrom(news.GetHolders())); err != nil {
		return err
	}
	if p.gen, err = s.launch(ctx, name, body.GetDigest(), eff, sh, func(components.State) {}); err != nil {
		return err
	}
	p.token, p.seq = components.Token{Incarnation: news.GetIncarnation(), Epoch: news.GetEpoch()}, news.GetSeq()
	if root.IsZero() {
		return nil
	}
	if err := s.restore(ctx, p.gen, root, blobs.Hash{}); err != nil {
		return err
	}
	p.root = root
	return nil
}

// catchUp gives a standby what the owner told of.
func (s *Supervisor) catchUp(ctx context.Context, key string, p *prepared, news *componentsv1.FollowReply) error {
	t := components.Token{Incarnation: news.GetIncarnation(), Epoch: news.GetEpoch()}
	root := hashFrom(news.GetRoot())
	if root.IsZero() || t.Compare(p.token) < 0 { // of an owner that is none any more
		return nil
	}
	if root != p.root {
		if err := s.fetch(ctx, root, key, idsFrom(news.GetHolders())); err != nil {
			return err
		}
		// Who takes the standby over waits for this: it is not torn in the middle.
		if err := s.raise(s.ctx, p, root, t == p.token); err != nil {
			return err
		}
	}
	p.token, p.seq = t, news.GetSeq()
	return nil
}

// raise brings the process of a standby to a root whose pages are here. same says that the root was made in the ownership in which its present one was, by
// the one line of processes that goes on from that: then a newer base tells it nothing new where it begins no later than it stands.
func (s *Supervisor) raise(ctx context.Context, p *prepared, root blobs.Hash, same bool) error {
	if root == p.root {
		return nil
	}
	steps, head, err := chainSteps(s.cfg.Blobs, root, p.root)
	if err != nil {
		return err
	}
	if same && !p.root.IsZero() && p.gen.has(componentv1.FeatureTxnCalls) {
		if steps, err = s.unknownTo(p, steps); err != nil {
			return err
		}
	}
	p.torn = true
	if len(steps) > 0 {
		if err := s.replay(ctx, p.gen, steps, head); err != nil {
			return err
		}
	}
	if p.gen.has(componentv1.FeatureTxnCalls) && p.gen.mark != head.meta.GetMark() {
		return fmt.Errorf("the standby of %s is at mark %d, the checkpoint at %d", p.gen.instance, p.gen.mark, head.meta.GetMark())
	}
	p.torn = false
	p.gen.head, p.root = head, root
	return nil
}

// unknownTo leaves out of a chain that begins with a new base what a process knows already: journal marks count up within one ownership, and an entry that a
// process has been given is skipped by it.
func (s *Supervisor) unknownTo(p *prepared, steps []blobs.Hash) ([]blobs.Hash, error) {
	for n, step := range steps {
		head, node, err := readHead(s.cfg.Blobs, step)
		if err != nil {
			return nil, err
		}
		if n == 0 && (node.Kind != kindBase || head.meta.GetEpoch() != p.token.Epoch) || head.meta.GetMark() > p.gen.mark {
			return steps[n:], nil
		}
	}
	return nil, nil
}

// takeStandby hands what stands by for an instance to its actor, which owns it now; nil: nothing that could be used.
func (s *Supervisor) takeStandby(name string) *prepared {
	s.mu.Lock()
	p := s.moves[name]
	if p == nil || !p.standby || p.ending {
		s.mu.Unlock()
		return nil
	}
	delete(s.moves, name)
	p.taken = true
	s.mu.Unlock()
	p.stop()
	<-p.done
	if !p.ready || p.torn || p.gen.dead() {
		s.discard(p)
		return nil
	}
	return p
}

// dropStandby ends what stands by for an instance that this node owns and does not start with it.
func (s *Supervisor) dropStandby(name string) {
	s.mu.Lock()
	p := s.moves[name]
	s.mu.Unlock()
	if p != nil && p.standby {
		s.dispose(name, p)
	}
}

// openStandby has calls wait for a standby that is about to be started: this node owns the instance.
func (s *Supervisor) openStandby(name string) {
	s.mu.Lock()
	p := s.moves[name]
	ready := p != nil && p.standby && p.ready && !p.ending
	s.mu.Unlock()
	if ready {
		p.shell.Membrane().Reopen("it is taken over")
	}
}

// promote makes a standby the process of an epoch that this node owns: it is given what it lacks, is started with the epoch's token, and serves.
func (i *instance) promote(ctx context.Context, p *prepared, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) error {
	want, ok := standingOf(body, eff)
	switch {
	case !ok, want != p.want:
		return errors.New("it was made for another version, or other attributes")
	case i.shell != nil, i.sup.branch(i.name, tokenIn(reg)) != nil:
		return errors.New("the instance has run here meanwhile")
	}
	root := blobs.Hash{}
	if reg.Seq > 0 {
		root = hashFrom(reg.Root)
	}
	if root.IsZero() && !p.root.IsZero() {
		return errors.New("it has a state, and the instance has none")
	}
	if err := i.sup.fetch(ctx, root, reg.Key, reg.Holders); err != nil {
		return err
	}
	if !root.IsZero() {
		// An epoch begins with what was committed in the one before, unless its claim says otherwise, which a claim for the same version from a dead owner does not.
		next := reg.Incarnation == p.token.Incarnation && reg.Epoch == p.token.Epoch+1
		if err := i.sup.raise(ctx, p, root, next); err != nil {
			return err
		}
	}
	if err := p.shell.Bind(eff); err != nil {
		return err
	}
	p.shell.Membrane().Reopen("it is taken over")
	p.gen.saved = Saved{Seq: reg.Seq, Root: root, Mark: p.gen.mark, Bytes: p.gen.bytes(), Holders: reg.Holders, At: time.Now()}
	return i.install(ctx, p, reg, eff)
}

// serveFollow answers a node that keeps a standby of an instance of this one.
func (s *Supervisor) serveFollow(ctx context.Context, from peer.ID, req *componentsv1.FollowRequest) (*componentsv1.FollowReply, error) {
	i, err := s.get(req.GetInstance())
	if err != nil {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%v", err)
	}
	end := time.NewTimer(followHold)
	defer end.Stop()
	for first := true; ; first = false {
		sv := i.saver()
		if sv == nil {
			return nil, peers.Fail(wirev1.Failure_REFUSED, "%s does not run on %s now", i.name, s.cfg.Name)
		}
		if _, over := sv.over(); over {
			return nil, peers.Fail(wirev1.Failure_REFUSED, "%s does not run on %s now", i.name, s.cfg.Name)
		}
		saved, news, ok := sv.acknowledged()
		if !ok {
			return nil, peers.Fail(wirev1.Failure_REFUSED, "%s goes on without the arbiter", i.name)
		}
		if first && req.GetReady() {
			i.followed(from, req.GetSeq())
		}
		if turn, ok := sv.turnFor(req.GetSeq()); ok && req.GetReady() {
			saved = turn
		}
		reply := &componentsv1.FollowReply{
			Root: rootBytes(saved.Root), Seq: saved.Seq, Holders: idStrings(saved.Holders), Incarnation: sv.cfg.incarnation, Epoch: sv.cfg.epoch,
		}
		if !req.GetReady() || hashFrom(req.GetRoot()) != saved.Root {
			return reply, nil
		}
		select {
		case <-news:
		case <-sv.done:
		case <-end.C:
			return reply, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// followed notes who keeps a standby, and how far that is.
func (i *instance) followed(by peer.ID, seq uint64) {
	i.mu.Lock()
	news := i.follower.id != by || time.Since(i.follower.at) > followSlow
	i.follower = follower{by, seq, time.Now()}
	i.mu.Unlock()
	if news && i.sup.cfg.Changed != nil {
		i.sup.cfg.Changed()
	}
}

// keepWarm brings the pages of instances here whose manifests want them on each of their successors, whether this node is one of their holders or not.
func (s *Supervisor) keepWarm(ctx context.Context) {
	tick := time.NewTicker(warmEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, reg := range s.registers() {
			body := s.inLine(reg)
			if body == nil || !s.warms(body) || !s.inTouch() {
				continue
			}
			if err := s.fetch(ctx, hashFrom(reg.Root), reg.Key, reg.Holders); err != nil && ctx.Err() == nil {
				s.cfg.Log.Debug("pages could not be fetched ahead; it is tried again", "instance", instanceOf(reg.Key), "error", err)
			}
		}
	}
}

// warms says whether all successors are to have the artifact and the pages of an instance.
func (s *Supervisor) warms(body *componentsv1.InstanceBody) bool {
	k := s.keeping(body.GetComponent()).standby
	return k == components.StandbyWarm || k == components.StandbyHot
}
