package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
)

// The earlier checkpoints of an instance that are kept. They are one register beside the instance's own, history/<instance>, which only the owner changes: each
// change is a transaction that asks for the owner's epoch. What the register names is live for the collector of every node; the owner looks after the copies.

const (
	// historyEvery is how often a checkpoint is kept by the clock, when there is a new one; historyLook is how often the owner looks whether that is due and
	// whether copies are missing.
	historyEvery = time.Minute
	historyLook  = 2 * time.Second
	// historyTries is how often a change of the register is tried anew when the local view was behind.
	historyTries = 4
	// historyWithin bounds one change of the register.
	historyWithin = 10 * time.Second
	// historyPin keeps the pages of what is about to be kept until the view of this node shows it.
	historyPin = 10 * time.Minute
)

// errNewerHistory: a later version has written the register.
var errNewerHistory = errors.New("the history is of a format that this version does not know; upgrade this node")

// historian keeps the earlier checkpoints of one instance. Its turn is taken by whoever changes the register.
type historian struct {
	sup      *Supervisor
	instance string
	key      string // of the register
	turn     chan struct{}
	wanted   atomic.Pointer[components.Retention]
}

func newHistorian(s *Supervisor, instance string) *historian {
	h := &historian{sup: s, instance: instance, key: components.HistoryRegister(instance), turn: make(chan struct{}, 1)}
	h.wanted.Store(&components.Retention{Count: components.DefaultHistory})
	return h
}

// want says which checkpoints are to be kept from now on.
func (h *historian) want(r components.Retention) {
	if *h.wanted.Load() != r {
		h.wanted.Store(&r)
	}
}

func (h *historian) retention() components.Retention { return *h.wanted.Load() }

// point is a checkpoint as its writer knows it.
type point struct {
	saved   Saved
	meta    *componentsv1.CheckpointMeta
	keepers []peer.ID
}

// point is the last acknowledged checkpoint; false: there is none, or it is a branch's, of which the arbiter knows nothing.
func (s *saver) point() (point, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.local || s.saved.Seq == 0 || s.saved.Root.IsZero() {
		return point{}, false
	}
	p := point{saved: s.saved, meta: &componentsv1.CheckpointMeta{Digest: s.cfg.digest, Version: s.cfg.version, Schema: s.cfg.schema, Mark: s.saved.Mark}}
	if s.head != nil && s.head.link.Hash == s.saved.Root {
		p.meta = s.head.meta
	}
	for id := range s.acked {
		p.keepers = append(p.keepers, id)
	}
	return p, true
}

// entry is a point as a history has it.
func (s *Supervisor) entry(p point, t components.Token, why string) *componentsv1.HistoryEntry {
	age := uint64(0)
	if !p.saved.At.IsZero() {
		age = uint64(max(time.Since(p.saved.At).Milliseconds(), 0))
	}
	e := &componentsv1.HistoryEntry{
		Seq: p.saved.Seq, Incarnation: t.Incarnation, Epoch: t.Epoch, Root: p.saved.Root[:], Mark: p.saved.Mark, UnixMs: s.date() - min(s.date(), age),
		Digest: p.meta.GetDigest(), Version: p.meta.GetVersion(), Schema: p.meta.GetSchema(), Bytes: p.saved.Bytes, Why: why,
	}
	slices.Sort(p.keepers)
	for _, id := range p.keepers {
		e.Holders = append(e.Holders, id.String())
	}
	return e
}

// take waits for the turn to change the register; the caller gives it back.
func (h *historian) take(ctx context.Context) error {
	select {
	case h.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the history of %s: waiting for an earlier operation: %w", h.instance, ctx.Err())
	}
}

func (h *historian) give() { <-h.turn }

func (h *historian) pin(root blobs.Hash) {
	h.sup.cfg.Blobs.Pin(h.key+" "+root.String(), historyPin, root)
}

// ReadHistory decodes the body of a history's register.
func ReadHistory(reg arbiter.Register) (*componentsv1.History, error) {
	var out componentsv1.History
	if err := proto.Unmarshal(reg.Body, &out); err != nil {
		return nil, fmt.Errorf("read %s: %w", reg.Key, err)
	}
	if out.GetFormat() > components.HistoryFormat {
		return nil, fmt.Errorf("read %s: %w (%d, this one knows %d)", reg.Key, errNewerHistory, out.GetFormat(), components.HistoryFormat)
	}
	return &out, nil
}

// volume is the register as it was read.
type volume struct {
	*componentsv1.History
	revision uint64
}

func (h *historian) volume(reg arbiter.Register, there bool) (volume, error) {
	if !there {
		return volume{History: &componentsv1.History{}}, nil
	}
	x, err := ReadHistory(reg)
	return volume{x, reg.Revision}, err
}

// read reads it through the log.
func (h *historian) read(ctx context.Context) (volume, error) {
	reg, there, err := h.sup.cfg.Arbiter.Read(ctx, h.key)
	if err != nil {
		return volume{}, err
	}
	return h.volume(reg, there)
}

// glance reads it in the local view.
func (h *historian) glance() (volume, error) { return h.volume(h.sup.cfg.Arbiter.Get(h.key)) }

// put is the part of a transaction that makes v the register.
func (h *historian) put(v volume) (arbiter.Compare, arbiter.Op, error) {
	v.Format, v.Instance = components.HistoryFormat, h.instance
	body, err := proto.Marshal(v.History)
	if err != nil {
		return arbiter.Compare{}, arbiter.Op{}, fmt.Errorf("the history of %s: %w", h.instance, err)
	}
	return arbiter.Compare{Key: h.key, Field: "revision", Equal: v.revision}, arbiter.Op{Put: &arbiter.PutOp{Key: h.key, Body: body}}, nil
}

// errOverHistory: the epoch is over, somebody else keeps the history.
var errOverHistory = fmt.Errorf("its history is not this process's to keep: %w", errFenced)

// change has f change the register in an epoch, until that went through. f is called anew when somebody else was faster; when it says false nothing is changed.
func (h *historian) change(ctx context.Context, epoch uint64, f func(x *componentsv1.History) bool) error {
	ctx, cancel := context.WithTimeout(ctx, historyWithin)
	defer cancel()
	if err := h.take(ctx); err != nil {
		return err
	}
	defer h.give()
	v, err := h.glance()
	owned := arbiter.Compare{Key: components.InstanceRegister(h.instance), Field: "epoch", Equal: epoch}
	for range historyTries {
		if err != nil {
			return err
		}
		if !f(v.History) {
			return nil
		}
		cmp, op, perr := h.put(v)
		if perr != nil {
			return perr
		}
		res, terr := h.sup.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{Nonce: h.sup.nonce(), Compares: []arbiter.Compare{owned, cmp}, Then: []arbiter.Op{op}})
		switch {
		case terr != nil:
			return fmt.Errorf("the history of %s: %w", h.instance, terr)
		case res.Succeeded:
			return nil
		case !slices.ContainsFunc(res.Registers, func(r arbiter.Register) bool { return r.Key == owned.Key && r.Epoch == epoch }):
			return fmt.Errorf("the history of %s: %w", h.instance, errOverHistory)
		}
		v, err = h.read(ctx)
	}
	return fmt.Errorf("the history of %s: it keeps changing; try again", h.instance)
}

// note keeps a point, and returns how; nil: its retention does not keep it.
func (h *historian) note(ctx context.Context, p point, t components.Token, why string) (kept *componentsv1.HistoryEntry, err error) {
	r := h.retention()
	if r.Count == 0 {
		return nil, nil
	}
	h.pin(p.saved.Root)
	err = h.change(ctx, t.Epoch, func(x *componentsv1.History) bool {
		was := proto.CloneOf(x)
		kept = components.Remember(x, h.sup.entry(p, t, why), r)
		return !proto.Equal(was, x)
	})
	return kept, err
}

// before is what a replace leaves, on its way into the history: the turn is held from the beginning of the pause until the claim.
type before struct {
	h      *historian
	v      volume
	why    string
	branch *componentsv1.HistoryEntry // what is gone back to, where that is no entry yet
	kept   *componentsv1.HistoryEntry
}

// open takes the turn and reads the register, for a transaction that is about to be made; the caller closes it. A history that cannot be read is left alone:
// it must not stand in the way of a replace.
func (h *historian) open(ctx context.Context, p swapPlan) (*before, error) {
	b := &before{h: h, why: p.why, branch: p.branch}
	if h.retention().Count == 0 {
		return b, nil
	}
	if err := h.take(ctx); err != nil {
		return nil, err
	}
	v, err := h.read(ctx)
	switch {
	case errors.Is(err, errNewerHistory):
		h.sup.cfg.Log.Warn("what is left is not kept", "instance", h.instance, "error", err)
		h.give()
		return b, nil
	case err != nil:
		h.give()
		return nil, fmt.Errorf("read the history of %s: %w", h.instance, err)
	}
	b.v = v
	return b, nil
}

func (b *before) close() {
	if b.v.History != nil {
		b.v.History = nil
		b.h.give()
	}
}

// with adds to a transaction that p is kept; next is the state that takes its place, zero where it goes on from p.
func (b *before) with(req *arbiter.TxnRequest, p point, t components.Token, next blobs.Hash) error {
	if b.v.History == nil || p.saved.Root.IsZero() {
		return nil
	}
	x := volume{proto.CloneOf(b.v.History), b.v.revision}
	if b.kept = components.Remember(x.History, b.h.sup.entry(p, t, b.why), b.h.retention()); b.kept == nil {
		return nil
	}
	if b.branch != nil {
		x = b.join(x)
	}
	if !next.IsZero() {
		components.Replaced(x.History, b.kept, next[:])
	}
	cmp, op, err := b.h.put(x)
	if err != nil {
		return err
	}
	b.h.pin(p.saved.Root)
	req.Compares, req.Then = append(req.Compares, cmp), append(req.Then, op)
	return nil
}

// join adds the branch that is gone back to, unless there is room for nothing but what is left.
func (b *before) join(x volume) volume {
	also, e := volume{proto.CloneOf(x.History), x.revision}, proto.CloneOf(b.branch)
	e.UnixMs = b.kept.GetUnixMs() // it is the state from now on
	components.Remember(also.History, e, b.h.retention())
	for _, o := range also.GetEntries() {
		if o.GetNumber() == b.kept.GetNumber() {
			b.kept = o
			return also
		}
	}
	return x
}

// id names what was kept; "" nothing was.
func (b *before) id() string {
	if b.kept == nil {
		return ""
	}
	return components.CheckpointID(b.kept.GetNumber())
}

// HistoryRoots are the roots that a history's register names, also one of a newer format.
func HistoryRoots(reg arbiter.Register) ([]blobs.Hash, error) {
	var x componentsv1.History
	if err := proto.Unmarshal(reg.Body, &x); err != nil {
		return nil, fmt.Errorf("read %s: %w", reg.Key, err)
	}
	var out []blobs.Hash
	for _, e := range x.GetEntries() {
		if r := hashFrom(e.GetRoot()); !r.IsZero() {
			out = append(out, r)
		}
	}
	return out, nil
}
