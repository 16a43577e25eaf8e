package load

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

// Runner drives the clients of one run.
type Runner struct {
	cfg    Config
	stats  *stats
	ledger *ledger
	books  []string // ISBNs
	cancel context.CancelFunc
	goes   sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	interval time.Duration
	changed  chan struct{}
}

// Start reads the catalogue and lets the clients begin, at cfg.Rate. They go on until Close.
func Start(ctx context.Context, cfg Config) (*Runner, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	r := &Runner{cfg: cfg, stats: newStats(), changed: make(chan struct{})}
	if cfg.Store != "" {
		if err := r.readBooks(ctx); err != nil {
			return nil, err
		}
	}
	var err error
	if r.ledger, err = createLedger(cfg.Ledger); err != nil {
		return nil, err
	}
	r.Rate(cfg.Rate)
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r.cancel = cancel
	web := &webAsker{newHTTPClient(cfg.ShopClients), cfg.Gateways, cfg.Shop}
	var all []*client
	add := func(kind string, n int, comp string, shop bool, a func() asker) {
		for i := range n {
			all = append(all, newClient(r, len(all), fmt.Sprintf("%s.%s%d", cfg.Run, kind, i), comp, a(), shop))
		}
	}
	add("web", cfg.ShopClients, cfg.Store, true, func() asker { return web })
	add("store", cfg.StoreClients, cfg.Store, true, func() asker { return newAPIAsker(cfg.Gateways, cfg.Store) })
	add("kv", cfg.KVClients, cfg.KV, false, func() asker { return newAPIAsker(cfg.Gateways, cfg.KV) })
	for _, c := range all {
		r.goes.Go(func() { c.run(run) })
	}
	r.goes.Go(func() { r.flush(run) })
	return r, nil
}

// flush writes the ledger out. An error stays in the ledger and is told by Verify and Close.
func (r *Runner) flush(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if r.ledger.flush() != nil {
				return
			}
		}
	}
}

// readBooks reads the catalogue's ISBNs from the store.
func (r *Runner) readBooks(ctx context.Context) error {
	a := newAPIAsker(r.cfg.Gateways, r.cfg.Store)
	for {
		list := &shopv1.BookList{}
		err := r.read(ctx, func(ctx context.Context, gw int) error {
			_, err := a.call(ctx, gw, "shop.v1.Store/ListBooks", &shopv1.ListBooksRequest{Offset: uint32(len(r.books)), Limit: 200}, list, "", r.cfg.Attempt)
			return err
		})
		if err != nil {
			return fmt.Errorf("read the catalogue: %w", err)
		}
		for _, b := range list.GetBooks() {
			r.books = append(r.books, b.GetIsbn())
		}
		if len(list.GetBooks()) == 0 || len(r.books) >= int(list.GetTotal()) {
			break
		}
	}
	if len(r.books) < 2*ordersPerCart {
		return fmt.Errorf("the catalogue has %d books only", len(r.books))
	}
	return nil
}

// read does a read at one gateway after the other until it succeeds, is answered with no, or the deadline has passed.
func (r *Runner) read(ctx context.Context, f func(ctx context.Context, gw int) error) error {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Deadline)
	defer cancel()
	for gw := 0; ; gw = (gw + 1) % len(r.cfg.Gateways) {
		actx, cancel := context.WithTimeout(ctx, 2*r.cfg.Attempt)
		err := f(actx, gw)
		cancel()
		var final *finalError
		if err == nil || errors.As(err, &final) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// pace is the time between a client's calls, 0 while paused, and what is closed when it changes.
func (r *Runner) pace() (time.Duration, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.interval, r.changed
}

// Rate sets the calls per second of all clients together. 0 pauses: calls under way go on.
func (r *Runner) Rate(perSecond float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.interval = 0
	if perSecond > 0 {
		r.interval = time.Duration(float64(r.cfg.clients()) / perSecond * float64(time.Second))
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// Pause stops sending and waits until every call has its outcome.
func (r *Runner) Pause(ctx context.Context) error {
	r.Rate(0)
	for {
		// A client may be between its decision to send and the call: idle must hold for a moment.
		if r.stats.idle() {
			time.Sleep(5 * time.Millisecond)
			if r.stats.idle() {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("calls are still under way: %w", ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// Figures tells what a window of time saw.
func (r *Runner) Figures(w Window) Figures { return r.stats.figures(w) }

// First finds the first answer after a time.
func (r *Runner) First(q FirstQuery) First { return r.stats.first(q) }

// Close ends the clients; calls under way are in doubt. The ledger is complete when it returns.
func (r *Runner) Close() error {
	r.cancel()
	r.goes.Wait()
	return r.ledger.close()
}
