package arbiter

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// ErrNewer is wrapped where the group has agreed on entries of a format that this build does not know. It cannot take part, nor follow.
var ErrNewer = errors.New("the group is of a newer format than this version knows")

func tooNew(format, most uint32) error {
	return fmt.Errorf("%w: %d, this one knows up to %d; start a newer version of this program", ErrNewer, format, most)
}

// known says whether a build that knows formats up to most may go on with this state.
func (m *machine) known(most uint32) error {
	if m.meta.Format > most {
		return tooNew(m.meta.Format, most)
	}
	return nil
}

// lowestFormat is the highest format that every member knows. The dead count, for they may come back as they were; who left or was expelled does
// not, and is refused when it comes back too old.
func lowestFormat(own uint32, list []Member) uint32 {
	for _, m := range list {
		if !m.Left {
			own = min(own, max(m.Format, 1)) // the first versions said nothing
		}
	}
	return own
}

// raise commits the highest format that all know. What the view says of the servers of the group may be old: they are asked.
func (k *keeper) raise(ctx context.Context) error {
	a := k.a
	format := lowestFormat(a.cfg.Format, a.cfg.Members.List())
	r := a.raft.Load()
	if r == nil {
		return ErrClosed
	}
	voters, learners := a.configuration(r)
	ctx, cancel := context.WithTimeout(ctx, a.t.RPC)
	defer cancel()
	var (
		mu   sync.Mutex // guards errs and format
		errs error
		wg   sync.WaitGroup
	)
	for _, id := range append(voters, learners...) {
		if id == a.cfg.Self {
			continue
		}
		wg.Go(func() {
			knows, err := k.formatOf(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			errs = errors.Join(errs, err)
			format = min(format, knows)
		})
	}
	wg.Wait()
	if errs != nil {
		return fmt.Errorf("ask all which formats they know: %w", errs)
	}
	if st := a.fsm.shown.Load(); st == nil || format <= st.meta.Format {
		return fmt.Errorf("not all know more than format %d: what the view says of some is out of date", format)
	}
	return k.setMeta(ctx, &wirev1.ArbiterSetMeta{Format: format})
}

func (k *keeper) formatOf(ctx context.Context, id peer.ID) (uint32, error) {
	resp := new(wirev1.ArbiterResponse)
	req := k.a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Status{Status: true}})
	if err := k.a.caller.Call(ctx, id, protoCall, req, resp); err != nil {
		return 0, fmt.Errorf("%s: %w", id, err)
	}
	return max(resp.GetLog().GetMaxFormat(), 1), nil
}

// heedFormat ends this node's part when it hears that the group went on to a format that it does not know.
func (a *Arbiter) heedFormat(format uint32) {
	if format <= a.cfg.Format {
		return
	}
	select {
	case a.outdated <- tooNew(format, a.cfg.Format):
	default: // told already
	}
}
