package load

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	kvv1 "github.com/coppice-project/coppice/plugins/kv/v1"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

// maxExamples of what is wrong are told.
const maxExamples = 10

// Report compares what the components hold with the ledger.
type Report struct {
	Answered int      `json:"answered"` // writes that were answered
	Found    int      `json:"found"`    // of those, how many are there
	Missing  int      `json:"missing"`
	Doubled  int      `json:"doubled"` // there more than once, or there though nobody was to write it
	Doubt    int      `json:"doubt"`   // not answered before the deadline
	Refused  int      `json:"refused"`
	Examples []string `json:"examples"` // of what is missing or doubled
	Orders   uint64   `json:"orders"`   // the shop's own count
}

// Good says that nothing is missing and nothing doubled.
func (r *Report) Good() bool { return r.Missing == 0 && r.Doubled == 0 && r.Found == r.Answered }

func (r *Report) missing(format string, args ...any) {
	r.Missing++
	r.example("missing: "+format, args...)
}

func (r *Report) doubled(n int, format string, args ...any) {
	r.Doubled += n
	r.example("doubled: "+format, args...)
}

func (r *Report) example(format string, args ...any) {
	if len(r.Examples) < maxExamples {
		r.Examples = append(r.Examples, fmt.Sprintf(format, args...))
	}
}

// Verify reads back everything that the ledger is about. The clients must be paused.
func (r *Runner) Verify(ctx context.Context) (*Report, error) {
	if err := r.ledger.flush(); err != nil {
		return nil, err
	}
	entries, err := ReadLedger(r.cfg.Ledger)
	if err != nil {
		return nil, err
	}
	rep := &Report{}
	carts, puts := map[string]map[string]*bought{}, map[string]*written{}
	for _, e := range entries {
		rep.count(e)
		switch e.Kind {
		case opAdd, opOrder:
			if carts[e.Cart] == nil {
				carts[e.Cart] = map[string]*bought{}
			}
			carts[e.Cart][e.ISBN] = carts[e.Cart][e.ISBN].with(e)
		case opPut:
			puts[e.Name] = puts[e.Name].with(e)
		}
	}
	if len(carts) > 0 {
		if err := r.verifyShop(ctx, carts, rep); err != nil {
			return nil, err
		}
	}
	if len(puts) > 0 {
		if err := r.verifyKV(ctx, puts, rep); err != nil {
			return nil, err
		}
	}
	return rep, nil
}

func (r *Report) count(e Entry) {
	switch e.Outcome {
	case Answered:
		r.Answered++
	case Doubt:
		r.Doubt++
	default:
		r.Refused++
	}
}

// bought is what the ledger says of one book in one cart: it was added once, and perhaps ordered.
type bought struct {
	add, order *Entry
}

func (b *bought) with(e Entry) *bought {
	if b == nil {
		b = &bought{}
	}
	if e.Kind == opAdd {
		b.add = &e
	} else {
		b.order = &e
	}
	return b
}

func outcomeOf(e *Entry) string {
	if e == nil {
		return Refused // it was not asked for: not there
	}
	return e.Outcome
}

func (r *Runner) verifyShop(ctx context.Context, carts map[string]map[string]*bought, rep *Report) error {
	a := newAPIAsker(r.cfg.Gateways, r.cfg.Store)
	ask := func(method string, cart string, out proto.Message) error {
		return r.read(ctx, func(ctx context.Context, gw int) error {
			_, err := a.call(ctx, gw, "shop.v1.Store/"+method, &shopv1.CartRequest{Cart: cart}, out, "", r.cfg.Attempt)
			return err
		})
	}
	for _, name := range slices.Sorted(maps.Keys(carts)) {
		orders, cart := &shopv1.OrderList{}, &shopv1.Cart{}
		if err := errors.Join(ask("ListOrders", name, orders), ask("GetCart", name, cart)); err != nil {
			return fmt.Errorf("read back cart %s: %w", name, err)
		}
		checkCart(name, carts[name], orders.GetOrders(), cart.GetLines(), rep)
	}
	return r.verifySums(ctx, a, rep)
}

// verifySums checks the store's own invariant and count: what is not in any cart of ours would show here.
func (r *Runner) verifySums(ctx context.Context, a *apiAsker, rep *Report) error {
	sums := &shopv1.LedgerReply{}
	err := r.read(ctx, func(ctx context.Context, gw int) error {
		_, err := a.call(ctx, gw, "shop.v1.Store/Ledger", &shopv1.LedgerRequest{}, sums, "", r.cfg.Attempt)
		return err
	})
	if err != nil {
		return fmt.Errorf("read back the shop's sums: %w", err)
	}
	rep.Orders = sums.GetOrders()
	if sums.GetSold()+sums.GetInStock() != sums.GetDelivered() {
		rep.doubled(1, "the shop sold %d and has %d left of %d delivered", sums.GetSold(), sums.GetInStock(), sums.GetDelivered())
	}
	return nil
}

// checkCart compares one cart with what the ledger says of it.
func checkCart(name string, want map[string]*bought, orders []*shopv1.Order, lines []*shopv1.Line, rep *Report) {
	ordered, inCart := map[string][]*shopv1.Order{}, map[string]uint32{}
	for _, o := range orders {
		for _, l := range o.GetLines() {
			ordered[l.GetIsbn()] = append(ordered[l.GetIsbn()], o)
		}
	}
	for _, l := range lines {
		inCart[l.GetIsbn()] = l.GetQuantity()
	}
	for isbn, b := range want {
		checkBook(name+" "+isbn, b, isbn, ordered[isbn], inCart[isbn], rep)
		delete(ordered, isbn)
		delete(inCart, isbn)
	}
	for isbn := range ordered {
		rep.doubled(1, "%s %s was ordered though nobody asked for it", name, isbn)
	}
	for isbn := range inCart {
		rep.doubled(1, "%s %s is in the cart though nobody put it there", name, isbn)
	}
}

func checkBook(what string, b *bought, isbn string, orders []*shopv1.Order, inCart uint32, rep *Report) {
	if n := len(orders); n > 1 {
		rep.doubled(n-1, "%s was ordered %d times, orders %d and %d among them", what, n, orders[0].GetNumber(), orders[1].GetNumber())
		return
	}
	copies := inCart
	if len(orders) == 1 {
		for _, l := range orders[0].GetLines() {
			if l.GetIsbn() == isbn {
				copies += l.GetQuantity()
			}
		}
	}
	wanted := uint32(0)
	if b.add != nil {
		wanted = b.add.Quantity
	}
	switch add := outcomeOf(b.add); {
	case copies > wanted:
		rep.doubled(1, "%s: %d copies were asked for, there are %d", what, wanted, copies)
	case copies < wanted && (add == Answered || copies > 0):
		rep.missing("%s: %d copies were put into the cart, there are %d (key %s)", what, wanted, copies, b.add.Key)
	case add == Answered:
		rep.Found++
	}
	switch {
	case outcomeOf(b.order) == Answered && len(orders) == 0:
		rep.missing("%s: order %d was answered and is not there (key %s)", what, b.order.Number, b.order.Key)
	case outcomeOf(b.order) == Answered && orders[0].GetNumber() != b.order.Number:
		rep.missing("%s: order %d was answered, there is order %d (key %s)", what, b.order.Number, orders[0].GetNumber(), b.order.Key)
	case outcomeOf(b.order) == Answered:
		rep.Found++
	case outcomeOf(b.order) == Refused && len(orders) == 1:
		rep.doubled(1, "%s: order %d is there though none was accepted", what, orders[0].GetNumber())
	}
}

// written is what the ledger says of one key.
type written struct {
	answered, doubt int
	values          map[string]bool // that may be the last
	last            *Entry          // answered
}

func (w *written) with(e Entry) *written {
	if w == nil {
		w = &written{values: map[string]bool{}}
	}
	switch e.Outcome {
	case Answered:
		w.answered++
		w.last = &e
		w.values = map[string]bool{e.Value: true}
	case Doubt:
		w.doubt++
		w.values[e.Value] = true
	}
	return w
}

func (r *Runner) verifyKV(ctx context.Context, puts map[string]*written, rep *Report) error {
	a := newAPIAsker(r.cfg.Gateways, r.cfg.KV)
	after := ""
	for {
		page := &kvv1.ScanReply{}
		err := r.read(ctx, func(ctx context.Context, gw int) error {
			_, err := a.call(ctx, gw, "kv.v1.KV/Scan", &kvv1.ScanRequest{Prefix: r.cfg.Run + ".", After: after, Limit: 1000}, page, "", r.cfg.Attempt)
			return err
		})
		if err != nil {
			return fmt.Errorf("read back the keys: %w", err)
		}
		for _, p := range page.GetPairs() {
			after = p.GetKey()
			checkKey(p, puts[p.GetKey()], rep)
			delete(puts, p.GetKey())
		}
		if !page.GetMore() {
			break
		}
	}
	for name, w := range puts {
		for range w.answered {
			rep.missing("key %s is not there (key %s)", name, w.last.Key)
		}
	}
	return nil
}

// checkKey: a key's version counts its writes.
func checkKey(p *kvv1.Pair, w *written, rep *Report) {
	if w == nil {
		rep.doubled(1, "key %s is there though nobody wrote it", p.GetKey())
		return
	}
	v := int(p.GetVersion())
	rep.Found += min(v, w.answered)
	switch {
	case v < w.answered:
		rep.Missing += w.answered - v - 1
		rep.missing("key %s: %d writes were answered, it is at version %d", p.GetKey(), w.answered, v)
	case v > w.answered+w.doubt:
		rep.doubled(v-w.answered-w.doubt, "key %s: %d writes were answered and %d are in doubt, it is at version %d", p.GetKey(), w.answered, w.doubt, v)
	case !w.values[p.GetValue()]:
		rep.missing("key %s has another value than the last that was written", p.GetKey())
	}
}
