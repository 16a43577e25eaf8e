package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
)

// A planned end gives leases up: once nothing of an exactly-one instance runs here any more the next owner need not wait until its lease has run out.

// giveUpWithin bounds the telling. What is not told runs out.
const giveUpWithin = time.Second

// over says whether every process that was started under the lease has ended.
func (st *leaseState) over() bool {
	for _, p := range st.list() {
		select {
		case <-p.Done():
			st.remove(p)
		default:
			return false
		}
	}
	return true
}

// handBack gives up the lease of an instance whose process was ended for good. It is asked for again when the instance is to run again (yield).
func (i *instance) handBack(ctx context.Context) {
	st := i.leaseState()
	if !st.leased.Load() || st.handing.Load() || i.gen != nil || !st.over() {
		return
	}
	reg, ok := i.sup.register(i.key)
	if !ok || reg.Owner != i.sup.cfg.Self || reg.Boot != i.sup.cfg.Boot {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, giveUpWithin)
	defer cancel()
	if err := i.giveUp(ctx, reg); err != nil && !errors.Is(err, arbiter.ErrClosed) {
		i.sup.cfg.Log.Warn("a lease was not given up: whoever takes the instance over waits for its end", "instance", i.name, "error", err)
	}
}

// Retire brings all instances of this node to rest, at the same time: their calls are held, those under way are answered, what they did is committed, and their
// processes end; leases are given up. Nothing is started here any more. It is for a node that is about to say goodbye: nothing that was answered is lost, whatever
// the durability, and its successors need not wait. It returns by the end of ctx; its error names what could not be saved, of which the last acknowledged checkpoint
// stands.
func (s *Supervisor) Retire(ctx context.Context) error {
	s.retiring.Store(true)
	s.mu.Lock()
	list := make([]*instance, 0, len(s.actors))
	for _, a := range s.actors {
		list = append(list, a)
	}
	s.mu.Unlock()
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for n, i := range list {
		wg.Go(func() {
			err := i.do(ctx, func(ctx context.Context) {
				if i.rest(ctx, components.Stopped, whyRetired); i.gen != nil {
					errs[n] = fmt.Errorf("%s could not be ended in order: %s", i.name, i.Info().Reason)
				}
			})
			if err != nil && !errors.Is(err, ErrNotHere) {
				errs[n] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Relinquish gives up again what Retire gave up: the leader that was told knows it alone, and it may have been this node.
func (s *Supervisor) Relinquish(ctx context.Context) error {
	var keys []arbiter.LeaseKey
	for _, reg := range s.registers() {
		st := &s.service(instanceOf(reg.Key)).lease
		if reg.Owner == s.cfg.Self && reg.Boot == s.cfg.Boot && st.leased.Load() && st.handing.Load() && st.over() {
			keys = append(keys, arbiter.LeaseKey{Key: reg.Key, Epoch: reg.Epoch})
		}
	}
	if len(keys) == 0 {
		return nil
	}
	if _, err := s.cfg.Arbiter.Lease(ctx, arbiter.LeaseRequest{Boot: s.cfg.Boot, Seq: s.session.seq.Add(1), GiveUp: keys}); err != nil {
		return fmt.Errorf("give leases up: %w", err)
	}
	return nil
}

const whyRetired = "its node is stopping"
