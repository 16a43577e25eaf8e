package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/internal/unison"
)

const (
	// historyCopyWithin bounds the making of one entry's copies; historyRetry is the pause before one that failed is tried again.
	historyCopyWithin = time.Minute
	historyRetry      = 30 * time.Second
	// historyVerify is how often holders are asked anew whether they have an entry whole, and given what they lack: one of an earlier version collects what
	// only a history names.
	historyVerify = 10 * time.Minute
)

// custodian looks after the history of an instance: while one process of it is saved, its owner; else who looks after the copies of its checkpoint, and then only
// after the copies.
type custodian struct {
	*historian
	s *saver // nil: nothing of it runs
	t components.Token

	shelf volume // as the local view had it last
	// By number: when an entry's copies are looked at again, and those that could not be made.
	again  map[uint64]time.Time
	failed map[uint64]bool
}

func newCustodian(h *historian, t components.Token) *custodian {
	return &custodian{historian: h, t: t, again: map[uint64]time.Time{}, failed: map[uint64]bool{}}
}

// keep looks after it until ctx or the epoch ends: what is kept by the clock, what is too old, and the copies.
func (h *historian) keep(ctx context.Context, s *saver, t components.Token) {
	c := newCustodian(h, t)
	c.s = s
	tick := unison.New(historyLook, string(s.cfg.self))
	defer tick.Stop()
	told := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Next()
		}
		if s.alone() {
			continue // what is done without the arbiter is a branch
		}
		err := c.tend(ctx)
		switch {
		case ctx.Err() != nil || errors.Is(err, errFenced):
			return
		case err != nil && !told:
			h.sup.cfg.Log.Warn("earlier checkpoints are not kept as they should be; it is tried again", "instance", h.instance, "epoch", t.Epoch, "error", err)
		}
		told = err != nil
	}
}

// look brings the shelf up to the local view.
func (c *custodian) look() error {
	reg, there := c.sup.cfg.Arbiter.Get(c.key)
	if there && c.shelf.History != nil && reg.Revision == c.shelf.revision {
		return nil
	}
	v, err := c.volume(reg, there)
	if err != nil {
		return err
	}
	c.shelf = v
	for n := range c.again {
		if !slices.ContainsFunc(v.GetEntries(), func(e *componentsv1.HistoryEntry) bool { return e.GetNumber() == n }) {
			delete(c.again, n)
			delete(c.failed, n)
		}
	}
	return nil
}

// tend takes one step.
func (c *custodian) tend(ctx context.Context) error {
	if err := c.look(); err != nil {
		return err
	}
	r, now := c.retention(), c.sup.date()
	if r.Age > 0 || len(c.shelf.GetEntries()) > r.Count {
		if components.Forget(proto.CloneOf(c.shelf.History), r, now) {
			return c.change(ctx, c.t.Epoch, func(x *componentsv1.History) bool { return components.Forget(x, r, now) })
		}
	}
	last := components.Newest(c.shelf.History)
	if p, ok := c.s.point(); ok && r.Count > 0 && now >= last.GetUnixMs()+uint64(historyEvery.Milliseconds()) && hashFrom(last.GetRoot()) != p.saved.Root {
		if _, err := c.note(ctx, p, c.t, components.WhyPeriodic); err != nil {
			return err
		}
	}
	_, err := c.keepCopies(ctx)
	return err
}

// keepCopies keeps each entry on as many live holders as the present checkpoint, one entry at a time; did says that there was one to look after.
func (c *custodian) keepCopies(ctx context.Context) (did bool, err error) {
	now := time.Now()
	to, _ := c.sup.holdersOf(components.InstanceRegister(c.instance))
	for _, e := range c.shelf.GetEntries() {
		n := e.GetNumber()
		if c.again[n].IsZero() { // it was acknowledged just now, or by an earlier owner
			c.again[n] = now.Add(historyVerify)
		}
		have := slices.DeleteFunc(idsFrom(e.GetHolders()), func(id peer.ID) bool { return !c.sup.isAlive(id) })
		if now.Before(c.again[n]) && (c.failed[n] || len(lacking(to, have, c.sup.apart)) == 0) {
			continue
		}
		got, err := c.copyEntry(ctx, hashFrom(e.GetRoot()), have, to)
		c.again[n], c.failed[n] = now.Add(historyVerify), err != nil
		if err != nil {
			c.again[n] = now.Add(historyRetry)
		} else if !slices.Equal(got, e.GetHolders()) {
			err = c.holders(ctx, n, got)
		}
		return true, err // the next one at the next look
	}
	return false, nil
}

// copyEntry makes sure that those who have a root have all of it, gives it to those who are missing, and returns who has it now.
func (c *custodian) copyEntry(ctx context.Context, root blobs.Hash, have, to []peer.ID) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, historyCopyWithin)
	defer cancel()
	if err := c.sup.fetch(ctx, root, components.InstanceRegister(c.instance), have); err != nil {
		return nil, fmt.Errorf("an earlier checkpoint of %s: %w", c.instance, err)
	}
	give := slices.Clone(have)
	if !slices.Contains(give, c.sup.cfg.Self) {
		give = append(give, c.sup.cfg.Self)
	}
	give = append(give, lacking(to, give, c.sup.apart)...)
	got, err := c.sup.cfg.Blobs.Push(ctx, root, give, len(give))
	if _, some := errors.AsType[*blobs.PushError](err); err != nil && (!some || len(got) == 0) {
		return nil, fmt.Errorf("copy an earlier checkpoint of %s: %w", c.instance, err)
	}
	return slices.Sorted(slices.Values(idStrings(got))), nil // who did not answer is asked again, or has died
}

// holders records who has an entry.
func (c *custodian) holders(ctx context.Context, number uint64, ids []string) error {
	return c.change(ctx, c.t.Epoch, func(x *componentsv1.History) bool {
		for _, e := range x.GetEntries() {
			if e.GetNumber() == number && !slices.Equal(e.GetHolders(), ids) {
				e.Holders = ids
				return true
			}
		}
		return false
	})
}
