package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
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
)

const (
	protoPrepare protocol.ID = "/coppice/move-prepare/1"
	protoFinish  protocol.ID = "/coppice/move-finish/1"
	protoAbort   protocol.ID = "/coppice/move-abort/1"

	// prepareDeadline bounds the start of the process at the target and the copying of its state while the source serves.
	prepareDeadline = 5 * time.Minute
	// preparedFor is how long a prepared process waits for the source before it is ended.
	preparedFor = time.Minute
	// finishDeadline bounds the pause of a move.
	finishDeadline = 10 * time.Second
)

// prepared is a process that waits here to take an instance over.
type prepared struct {
	move    string
	from    peer.ID
	epoch   uint64 // the source's
	gen     *generation
	shell   Shell
	root    blobs.Hash
	finish  bool // the source is frozen and waits for the claim
	claimed *arbiter.Register
	timer   *time.Timer
	restore sync.Mutex // held while state goes into its process; guards root from when it is prepared
	// Of a standby, which waits for the owner's death instead of a move (standby.go). ready, torn and what it has been given are attend's until done is closed.
	standby     bool
	stop        context.CancelFunc // has attend return
	done        chan struct{}      // closed when it has
	ready       bool               // its process has been given the state
	torn, taken bool               // nobody knows what its process has; the instance's actor has it now
	want        standing
	token       components.Token // in which root was told of
	seq         uint64
	ending      bool          // it is being ended; until that is done the instance gets no other membrane here
	over        chan struct{} // closed when it is ended
}

// move hands the running instance to another node with its state. Until the target's claim any failure leaves this process serving.
func (i *instance) move(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, to peer.ID, p swapPlan) (Replaced, error) {
	begin := time.Now()
	g := i.gen
	out := Replaced{From: i.sup.cfg.Name, To: i.sup.nodeName(to)}
	name := fmt.Sprintf("%016x", i.sup.nonce())
	saved, err := g.saver.Saved()
	if err != nil && saved.Seq == 0 {
		return out, fmt.Errorf("move %s: its state has no checkpoint yet: %w", i.name, err)
	}
	pctx, cancel := context.WithTimeout(ctx, prepareDeadline)
	var ready componentsv1.PrepareMoveReply
	err = i.sup.cfg.Caller.Call(pctx, to, protoPrepare, &componentsv1.PrepareMoveRequest{
		Instance: i.name, Epoch: reg.Epoch, Root: rootBytes(saved.Root), Holders: idStrings(saved.Holders), Move: name,
	}, &ready)
	cancel()
	if err != nil {
		i.abort(to, name) // it may have been prepared all the same
		return out, fmt.Errorf("move %s to %s: prepare: %w", i.name, out.To, err)
	}
	if err := i.advance(ctx, to, name); err != nil {
		i.abort(to, name)
		return out, fmt.Errorf("move %s to %s: bring what changed meanwhile: %w", i.name, out.To, err)
	}
	pauseBegin := time.Now()
	defer i.leaseState().handing.Store(false)
	epoch, err := i.handOver(ctx, reg, body, to, name, p)
	if err != nil {
		err = fmt.Errorf("move %s to %s: %w", i.name, out.To, err)
		if i.lostOwnership(ctx, reg) {
			i.kill("it may be on another node") // it may serve there already; the register says who owns it
			return out, err
		}
		i.abort(to, name)
		return out, i.goOn(ctx, err)
	}
	out.Pause, out.CallsHeld, out.Epoch = time.Since(pauseBegin), i.held(), epoch
	out.Bytes, out.Took = ready.GetBytes(), time.Since(begin)
	i.left(to, reg, epoch)
	return out, nil
}

// left sends callers to the new owner and ends the process here.
func (i *instance) left(to peer.ID, reg arbiter.Register, epoch uint64) {
	reg.Owner, reg.Epoch = to, epoch
	i.shut("it moved", &reg)
	i.sup.end(i.shell, i.gen, 0)
	i.ended()
}

// handOver freezes the instance, commits its last state and lets the target claim.
func (i *instance) handOver(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, to peer.ID, name string, p swapPlan) (uint64, error) {
	pctx, cancel := context.WithTimeout(ctx, pauseLimit)
	defer cancel()
	if err := i.quiesce(pctx, reasonMove); err != nil {
		return 0, err
	}
	if err := i.flush(pctx); err != nil {
		return 0, err
	}
	if err := i.together(); err != nil {
		return 0, err
	}
	saved, _ := i.gen.saver.Saved()
	b := proto.CloneOf(body)
	b.Trigger, b.Cause, b.ClaimedUnixMs, b.Settled = p.trigger, p.cause, i.sup.date(), false
	b.Successors = withoutID(b.GetSuccessors(), to.String())
	b.Successors = append([]string{i.sup.cfg.Self.String()}, b.Successors...)
	data, err := proto.Marshal(b)
	if err != nil {
		return 0, err
	}
	if body.GetLeased() {
		if err := i.giveUp(pctx, reg); err != nil {
			return 0, err
		}
	}
	// From here on the caller's patience does not count: the target may claim.
	fctx, fcancel := context.WithTimeout(context.WithoutCancel(ctx), finishDeadline)
	defer fcancel()
	defer context.AfterFunc(i.sup.ctx, fcancel)()
	var reply componentsv1.FinishMoveReply
	err = i.sup.cfg.Caller.Call(fctx, to, protoFinish, &componentsv1.FinishMoveRequest{
		Instance: i.name, Move: name, Root: rootBytes(saved.Root), Holders: idStrings(saved.Holders), Body: data,
	}, &reply)
	if err != nil {
		return 0, err
	}
	if !reply.GetClaimed() {
		return 0, errors.New(reply.GetRefused())
	}
	return reply.GetEpoch(), nil
}

func (i *instance) abort(to peer.ID, name string) {
	i.sup.spawn(func() { i.sup.callOff(i.name, to, name) })
}

// callOff tells the target of a move that nothing comes of it.
func (s *Supervisor) callOff(instance string, to peer.ID, name string) {
	ctx, cancel := context.WithTimeout(s.ctx, finishDeadline)
	defer cancel()
	if err := s.cfg.Caller.Call(ctx, to, protoAbort, &componentsv1.AbortMoveRequest{Instance: instance, Move: name}, &componentsv1.AbortMoveReply{}); err != nil {
		s.cfg.Log.Warn("the target of a move was not told that it is off; it ends what it prepared by itself", "instance", instance, "error", err)
	}
}

func (s *Supervisor) handleMoves() {
	if s.cfg.Peers == nil {
		return
	}
	peers.ServeCalls(s.cfg.Peers, protoPrepare, func() *componentsv1.PrepareMoveRequest { return &componentsv1.PrepareMoveRequest{} }, s.prepareMove)
	peers.ServeCalls(s.cfg.Peers, protoAdvance, func() *componentsv1.FinishMoveRequest { return &componentsv1.FinishMoveRequest{} }, s.advanceMove)
	peers.ServeCalls(s.cfg.Peers, protoFinish, func() *componentsv1.FinishMoveRequest { return &componentsv1.FinishMoveRequest{} }, s.finishMove)
	peers.ServeCalls(s.cfg.Peers, protoFollow, func() *componentsv1.FollowRequest { return &componentsv1.FollowRequest{} }, s.serveFollow)
	peers.ServeCalls(s.cfg.Peers, protoAbort, func() *componentsv1.AbortMoveRequest { return &componentsv1.AbortMoveRequest{} }, s.abortMove)
}

// prepareMove starts the process here and gives it the state as of the last commit.
func (s *Supervisor) prepareMove(ctx context.Context, from peer.ID, req *componentsv1.PrepareMoveRequest) (*componentsv1.PrepareMoveReply, error) {
	name := req.GetInstance()
	reg, ok := s.register(components.InstanceRegister(name))
	if !ok || reg.Owner != from || reg.Epoch > req.GetEpoch() {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%s is not owned by the node that wants to move it", name)
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		return nil, err
	}
	eff, err := s.effective(body.GetComponent())
	if err != nil {
		return nil, err
	}
	if eff == nil {
		return nil, peers.Fail(wirev1.Failure_NOT_FOUND, "no application has %s", body.GetComponent())
	}
	s.mu.Lock()
	s.preparing[name]++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.preparing[name]--; s.preparing[name] == 0 {
			delete(s.preparing, name)
		}
	}()
	if err := s.cleared(ctx, name); err != nil {
		return nil, err
	}
	p := &prepared{move: req.GetMove(), from: from, epoch: req.GetEpoch(), root: hashFrom(req.GetRoot()), over: make(chan struct{})}
	if p.shell, err = s.cfg.Shell(name, eff, s.hooks(name, eff)); err != nil {
		return nil, err
	}
	if err = p.shell.Bind(eff); err == nil {
		err = s.prepare(ctx, p, &body, eff, req)
	}
	if err != nil {
		s.discard(p)
		return nil, err
	}
	if !s.keepPrepared(name, p) {
		s.discard(p)
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%s is stopping", s.cfg.Name)
	}
	var n uint64
	if p.gen.head != nil {
		n = p.gen.head.link.Bytes
	}
	return &componentsv1.PrepareMoveReply{Bytes: n}, nil
}

// cleared returns once nothing of an earlier ownership of the instance, and of an earlier move, is left here: its membrane has the same name
// and the same socket.
func (s *Supervisor) cleared(ctx context.Context, name string) error {
	s.mu.Lock()
	old := s.moves[name]
	a := s.actors[name]
	s.mu.Unlock()
	if old != nil {
		s.dispose(name, old)
	}
	if a == nil {
		return nil
	}
	a.poke()
	select {
	case <-a.gone:
		return nil
	case <-ctx.Done():
		return peers.Fail(wirev1.Failure_REFUSED, "%s is still being ended on %s", name, s.cfg.Name)
	}
}

// keepPrepared puts a prepared process where finishMove finds it; false: this node is stopping.
func (s *Supervisor) keepPrepared(name string, p *prepared) bool {
	s.mu.Lock()
	old := s.moves[name]
	if !s.closed {
		s.moves[name] = p
		p.timer = time.AfterFunc(preparedFor, func() { s.forgetMove(name, p, false) })
	}
	closed := s.closed
	s.mu.Unlock()
	if old != nil && !closed {
		s.dispose(name, old)
	}
	return !closed
}

func (s *Supervisor) prepare(ctx context.Context, p *prepared, body *componentsv1.InstanceBody, eff *components.Effective, req *componentsv1.PrepareMoveRequest) error {
	if err := s.fetch(ctx, p.root, components.InstanceRegister(req.GetInstance()), idsFrom(req.GetHolders())); err != nil {
		return err
	}
	g, err := s.launch(ctx, req.GetInstance(), body.GetDigest(), eff, p.shell, func(components.State) {})
	if err != nil {
		return err
	}
	p.gen = g
	if p.root.IsZero() {
		return nil
	}
	return s.restore(ctx, g, p.root, blobs.Hash{})
}

// finishMove gives the prepared process the last changes, starts it, claims the instance and lets its actor serve.
func (s *Supervisor) finishMove(ctx context.Context, from peer.ID, req *componentsv1.FinishMoveRequest) (*componentsv1.FinishMoveReply, error) {
	name := req.GetInstance()
	s.mu.Lock()
	p := s.moves[name]
	if p == nil || p.standby || p.move != req.GetMove() || p.from != from || p.ending {
		s.mu.Unlock()
		return &componentsv1.FinishMoveReply{Refused: "nothing is prepared here for this move"}, nil
	}
	p.finish = true
	p.timer.Stop()
	s.mu.Unlock()
	reg, err := s.takeMoved(ctx, p, name, req)
	if err != nil {
		s.forgetMove(name, p, true)
		return &componentsv1.FinishMoveReply{Refused: err.Error()}, nil
	}
	s.adopt(reg) // before the actor may take the process: it has to see that the instance is this node's
	if hashFrom(reg.Root) != hashFrom(req.GetRoot()) {
		s.forgetMove(name, p, true) // it has not the state that was claimed; the actor starts another that does
	} else {
		s.mu.Lock()
		p.claimed = &reg
		s.mu.Unlock()
	}
	if a := s.actor(name); a != nil {
		a.poke()
	}
	return &componentsv1.FinishMoveReply{Claimed: true, Epoch: reg.Epoch}, nil
}

func (s *Supervisor) takeMoved(ctx context.Context, p *prepared, name string, req *componentsv1.FinishMoveRequest) (arbiter.Register, error) {
	key := components.InstanceRegister(name)
	reg, ok := s.register(key)
	if !ok || reg.Epoch > p.epoch {
		return arbiter.Register{}, errors.New("the instance has another owner meanwhile")
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(req.GetBody(), &body); err != nil {
		return arbiter.Register{}, err
	}
	eff, err := s.effective(body.GetComponent())
	if err != nil || eff == nil {
		return arbiter.Register{}, fmt.Errorf("no application has %s (%w)", body.GetComponent(), err)
	}
	root := hashFrom(req.GetRoot())
	if err := s.bringTo(ctx, p, root, key, idsFrom(req.GetHolders())); err != nil {
		return arbiter.Register{}, err
	}
	token := components.Token{Incarnation: reg.Incarnation, Epoch: p.epoch} // the next one is its own once it is claimed
	if !body.GetLeased() {                                                  // else it is started when it has its lease
		if err := p.gen.start(ctx, p.shell, token, eff, !root.IsZero(), swapStart); err != nil {
			return arbiter.Register{}, err
		}
	}
	claimed, err := s.cfg.Arbiter.Claim(ctx, arbiter.ClaimRequest{
		Key: key, Expect: p.epoch, Nonce: s.nonce(), Owner: s.cfg.Self, Boot: s.cfg.Boot, Body: req.GetBody(),
	})
	if err != nil {
		return arbiter.Register{}, fmt.Errorf("claim: %w", err)
	}
	if !p.gen.since.IsZero() {
		p.gen.own(ctx, tokenIn(claimed))
	}
	p.gen.saved = Saved{Seq: claimed.Seq, Root: hashFrom(claimed.Root), Mark: p.gen.mark, Bytes: p.gen.bytes(), Holders: claimed.Holders, At: time.Now()}
	s.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + name, Type: "moved", Trigger: body.GetTrigger(), Cause: body.GetCause(),
		Message: fmt.Sprintf("%s moved from %s to %s in epoch %d", name, s.nodeName(p.from), s.cfg.Name, claimed.Epoch),
		Fields:  map[string]string{"from": s.nodeName(p.from), "to": s.cfg.Name, "epoch": fmt.Sprint(claimed.Epoch)},
	})
	return claimed, nil
}

func (s *Supervisor) abortMove(_ context.Context, from peer.ID, req *componentsv1.AbortMoveRequest) (*componentsv1.AbortMoveReply, error) {
	s.mu.Lock()
	p := s.moves[req.GetInstance()]
	s.mu.Unlock()
	if p != nil && !p.standby && p.move == req.GetMove() && p.from == from {
		s.forgetMove(req.GetInstance(), p, true)
	}
	return &componentsv1.AbortMoveReply{}, nil
}

// finishing says that a move to this node is at the point where only its own process may serve the instance, or that what was prepared for one is being
// ended: its membrane has the instance's name and socket.
func (s *Supervisor) finishing(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.moves[name]
	return p != nil && (p.ending || p.finish && p.claimed == nil)
}

// takePrepared hands the process of a finished move to the instance's actor.
func (s *Supervisor) takePrepared(name string, epoch uint64) *prepared {
	s.mu.Lock()
	p := s.moves[name]
	if p == nil || p.claimed == nil {
		s.mu.Unlock()
		return nil
	}
	if p.claimed.Epoch == epoch && !p.ending {
		delete(s.moves, name)
		s.mu.Unlock()
		return p
	}
	s.mu.Unlock()
	s.dispose(name, p)
	return nil
}

// dropClaimed ends a process whose move was finished and that nobody took: the epoch it was for is over.
func (s *Supervisor) dropClaimed(name string) {
	s.mu.Lock()
	p := s.moves[name]
	s.mu.Unlock()
	if p != nil && p.claimed != nil {
		s.dispose(name, p)
	}
}

// forgetMove ends what was prepared for a move; unless it is asked to in any case, not while the move is being finished.
func (s *Supervisor) forgetMove(name string, p *prepared, always bool) {
	s.mu.Lock()
	late := p.finish && !always
	s.mu.Unlock()
	if !late {
		s.dispose(name, p)
	}
}

// overtaken ends what was prepared for a move when the instance was claimed meanwhile, by another node or, after the source's death, by this one: the source
// may never say so.
func (s *Supervisor) overtaken(reg arbiter.Register) {
	name := instanceOf(reg.Key)
	s.mu.Lock()
	p := s.moves[name]
	if p == nil || p.standby || p.finish || p.claimed != nil || reg.Epoch <= p.epoch || s.closed {
		s.mu.Unlock()
		return
	}
	s.goes.Go(func() { s.dispose(name, p) })
	s.mu.Unlock()
}

// dispose ends what was prepared, once, and returns when that is done. Until then it stays where finishing sees it: a membrane that was opened meanwhile
// would lose its place in the router, and its socket, to the end of this one.
func (s *Supervisor) dispose(name string, p *prepared) {
	s.mu.Lock()
	if p.taken {
		s.mu.Unlock()
		return
	}
	if p.ending {
		s.mu.Unlock()
		<-p.over
		return
	}
	p.ending = true
	s.mu.Unlock()
	s.discard(p)
	s.mu.Lock()
	if s.moves[name] == p {
		delete(s.moves, name)
	}
	s.mu.Unlock()
	close(p.over)
	if a, err := s.get(name); err == nil {
		a.poke()
	}
}

func (s *Supervisor) discard(p *prepared) {
	if p.timer != nil {
		p.timer.Stop()
	}
	if p.standby {
		p.stop()
		<-p.done
	}
	s.end(p.shell, p.gen, 0)
	if p.shell != nil {
		p.shell.Membrane().Close("what was prepared here is ended", nil)
		p.shell.Close()
	}
}

func rootBytes(h blobs.Hash) []byte {
	if h.IsZero() {
		return nil
	}
	return h[:]
}

func hashFrom(b []byte) blobs.Hash {
	if len(b) != len(blobs.Hash{}) {
		return blobs.Hash{}
	}
	return blobs.Hash(b)
}

func idStrings(ids []peer.ID) []string {
	out := make([]string, len(ids))
	for i, id := range ids {
		out[i] = id.String()
	}
	return out
}

// idsFrom leaves out what is no peer id: a holder list is a hint where to ask.
func idsFrom(ss []string) []peer.ID {
	var out []peer.ID
	for _, s := range ss {
		if id, err := peer.Decode(s); err == nil {
			out = append(out, id)
		}
	}
	return out
}

func withoutID(ids []string, id string) []string {
	var out []string
	for _, s := range ids {
		if s != id {
			out = append(out, s)
		}
	}
	return out
}
