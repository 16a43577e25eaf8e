package supervisor

import (
	"context"
	"errors"
	"fmt"
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
	gen     *generation
	shell   Shell
	root    blobs.Hash
	finish  bool // the source is frozen and waits for the claim
	claimed *arbiter.Register
	timer   *time.Timer
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
		return out, fmt.Errorf("move %s to %s: prepare: %w", i.name, out.To, err)
	}
	pauseBegin := time.Now()
	epoch, err := i.handOver(ctx, body, to, name, p)
	if err != nil {
		err = fmt.Errorf("move %s to %s: %w", i.name, out.To, err)
		if errors.Is(err, arbiter.ErrInDoubt) || i.lostOwnership(ctx) {
			i.kill("it may be on another node") // it may serve there already; the register says who owns it
			i.crashed = true
			return out, err
		}
		i.abort(to, name)
		if rerr := i.resume(ctx, g); rerr != nil {
			return out, errors.Join(err, rerr)
		}
		i.release()
		return out, err
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
	i.sup.end(i.gen, 0)
	i.gen = nil
}

// handOver freezes the instance, commits its last state and lets the target claim.
func (i *instance) handOver(ctx context.Context, body *componentsv1.InstanceBody, to peer.ID, name string, p swapPlan) (uint64, error) {
	if err := i.quiesce(ctx, reasonMove); err != nil {
		return 0, err
	}
	if err := i.flush(ctx); err != nil {
		return 0, err
	}
	saved, _ := i.gen.saver.Saved()
	b := proto.CloneOf(body)
	b.Trigger, b.Cause, b.ClaimedUnixMs, b.Settled, b.Fallback = p.trigger, p.cause, uint64(time.Now().UnixMilli()), false, nil
	b.Successors = withoutID(b.GetSuccessors(), to.String())
	b.Successors = append([]string{i.sup.cfg.Self.String()}, b.Successors...)
	data, err := proto.Marshal(b)
	if err != nil {
		return 0, err
	}
	fctx, cancel := context.WithTimeout(ctx, finishDeadline)
	defer cancel()
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

// lostOwnership asks the log whether the target has claimed although its answer did not arrive. Not knowing counts as yes: a second
// owner must not serve.
func (i *instance) lostOwnership(ctx context.Context) bool {
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishDeadline)
	defer cancel()
	now, ok, err := i.sup.cfg.Arbiter.Read(rctx, i.key)
	if err != nil {
		return true
	}
	if ok {
		i.sup.adopt(now)
	}
	return !ok || now.Owner != i.sup.cfg.Self
}

func (i *instance) abort(to peer.ID, name string) {
	ctx, cancel := context.WithTimeout(context.Background(), finishDeadline)
	defer cancel()
	if err := i.sup.cfg.Caller.Call(ctx, to, protoAbort, &componentsv1.AbortMoveRequest{Instance: i.name, Move: name}, &componentsv1.AbortMoveReply{}); err != nil {
		i.sup.cfg.Log.Warn("the target of a move was not told that it is off; it ends what it prepared by itself", "instance", i.name, "error", err)
	}
}

func (s *Supervisor) handleMoves() {
	if s.cfg.Peers == nil {
		return
	}
	peers.ServeCalls(s.cfg.Peers, protoPrepare, func() *componentsv1.PrepareMoveRequest { return &componentsv1.PrepareMoveRequest{} }, s.prepareMove)
	peers.ServeCalls(s.cfg.Peers, protoFinish, func() *componentsv1.FinishMoveRequest { return &componentsv1.FinishMoveRequest{} }, s.finishMove)
	peers.ServeCalls(s.cfg.Peers, protoAbort, func() *componentsv1.AbortMoveRequest { return &componentsv1.AbortMoveRequest{} }, s.abortMove)
}

// prepareMove starts the process here and gives it the state as of the last commit.
func (s *Supervisor) prepareMove(ctx context.Context, from peer.ID, req *componentsv1.PrepareMoveRequest) (*componentsv1.PrepareMoveReply, error) {
	name := req.GetInstance()
	reg, ok := s.register(components.InstanceRegister(name))
	if !ok || reg.Owner != from {
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
	p := &prepared{move: req.GetMove(), from: from, root: hashFrom(req.GetRoot())}
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
	s.mu.Lock()
	old := s.moves[name]
	s.moves[name] = p
	p.timer = time.AfterFunc(preparedFor, func() { s.forgetMove(name, p) })
	s.mu.Unlock()
	if old != nil {
		s.discard(old)
	}
	var n uint64
	if p.gen.head != nil {
		n = p.gen.head.link.Bytes
	}
	return &componentsv1.PrepareMoveReply{Bytes: n}, nil
}

func (s *Supervisor) prepare(ctx context.Context, p *prepared, body *componentsv1.InstanceBody, eff *components.Effective, req *componentsv1.PrepareMoveRequest) error {
	reg := arbiter.Register{Key: components.InstanceRegister(req.GetInstance()), Holders: idsFrom(req.GetHolders())}
	if err := s.fetch(ctx, p.root, reg); err != nil {
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
	if p == nil || p.move != req.GetMove() || p.from != from {
		s.mu.Unlock()
		return &componentsv1.FinishMoveReply{Refused: "nothing is prepared here for this move"}, nil
	}
	p.finish = true
	p.timer.Stop()
	s.mu.Unlock()
	reg, err := s.takeMoved(ctx, p, name, req)
	if err != nil {
		s.forgetMove(name, p)
		return &componentsv1.FinishMoveReply{Refused: err.Error()}, nil
	}
	s.mu.Lock()
	p.claimed = &reg
	s.mu.Unlock()
	s.adopt(reg)
	return &componentsv1.FinishMoveReply{Claimed: true, Epoch: reg.Epoch}, nil
}

func (s *Supervisor) takeMoved(ctx context.Context, p *prepared, name string, req *componentsv1.FinishMoveRequest) (arbiter.Register, error) {
	key := components.InstanceRegister(name)
	reg, ok := s.register(key)
	if !ok || reg.Owner != p.from {
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
	if !root.IsZero() && root != p.root {
		if err := s.fetch(ctx, root, arbiter.Register{Key: key, Holders: idsFrom(req.GetHolders())}); err != nil {
			return arbiter.Register{}, err
		}
		if err := s.restore(ctx, p.gen, root, p.root); err != nil {
			return arbiter.Register{}, err
		}
	}
	token := components.Token{Incarnation: reg.Incarnation, Epoch: reg.Epoch + 1}
	if err := p.gen.start(ctx, p.shell, token, eff, !root.IsZero(), swapStart); err != nil {
		return arbiter.Register{}, err
	}
	claimed, err := s.cfg.Arbiter.Claim(ctx, arbiter.ClaimRequest{
		Key: key, Expect: reg.Epoch, Nonce: s.nonce(), Owner: s.cfg.Self, Boot: s.cfg.Boot, Body: req.GetBody(),
	})
	if err != nil {
		return arbiter.Register{}, fmt.Errorf("claim: %w", err)
	}
	p.gen.saved = Saved{Seq: claimed.Seq, Root: hashFrom(claimed.Root), Mark: p.gen.mark, Holders: claimed.Holders, At: time.Now()}
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
	if p != nil && p.move == req.GetMove() && p.from == from {
		s.forgetMove(req.GetInstance(), p)
	}
	return &componentsv1.AbortMoveReply{}, nil
}

// finishing says that a move to this node is at the point where only its own process may serve the instance.
func (s *Supervisor) finishing(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.moves[name]
	return p != nil && p.finish && p.claimed == nil
}

// takePrepared hands the process of a finished move to the instance's actor.
func (s *Supervisor) takePrepared(name string, epoch uint64) *prepared {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.moves[name]
	if p == nil || p.claimed == nil {
		return nil
	}
	delete(s.moves, name)
	if p.claimed.Epoch != epoch {
		s.goes.Go(func() { s.discard(p) })
		return nil
	}
	return p
}

func (s *Supervisor) forgetMove(name string, p *prepared) {
	s.mu.Lock()
	if s.moves[name] == p {
		delete(s.moves, name)
	}
	s.mu.Unlock()
	s.discard(p)
}

func (s *Supervisor) discard(p *prepared) {
	if p.timer != nil {
		p.timer.Stop()
	}
	s.end(p.gen, 0)
	if p.shell != nil {
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
