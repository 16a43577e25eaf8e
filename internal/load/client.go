package load

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"strings"
	"time"
)

// ordersPerCart: each has another book, so that they are told apart; a list of orders shows at most 100.
const ordersPerCart = 40

// client is one sequential caller.
type client struct {
	r     *Runner
	id    int
	name  string
	comp  string // whose statistics its calls count in
	asker asker
	rand  *rand.Rand // what it does
	times *rand.Rand // when
	gw    int        // index of the gateway it uses until that fails it
	n     uint64
	script
}

// script is what a client does next.
type script struct {
	shop    bool
	batch   int            // of carts
	inCart  int            // orders of the cart so far
	pending *op            // what is in the cart and not ordered
	puts    int            // writes to keys
	last    string         // last key that was written, for reads
	written map[string]int // writes of a key, answered and in doubt
}

func newClient(r *Runner, id int, name, comp string, a asker, shop bool) *client {
	h := fnv.New64a()
	h.Write([]byte(name)) // a hash never returns an error
	c := &client{r: r, id: id, name: name, comp: comp, asker: a, rand: rand.New(rand.NewPCG(r.cfg.Seed, h.Sum64()))}
	c.times = rand.New(rand.NewPCG(r.cfg.Seed, ^h.Sum64()))
	c.gw = id % len(r.cfg.Gateways)
	c.script = script{shop: shop, written: map[string]int{}}
	return c
}

// run sends at the runner's rate until ctx ends.
func (c *client) run(ctx context.Context) {
	var next time.Time
	for ctx.Err() == nil {
		interval, changed := c.r.pace()
		if interval == 0 {
			next = time.Time{}
			select {
			case <-ctx.Done():
			case <-changed:
			}
			continue
		}
		if next.IsZero() {
			next = time.Now().Add(time.Duration(c.times.Float64() * float64(interval)))
		} else {
			next = next.Add(time.Duration((0.5 + c.times.Float64()) * float64(interval)))
		}
		if wait := time.Until(next); wait > 0 {
			t := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				t.Stop()
				return
			case <-changed:
				t.Stop()
				continue
			case <-t.C:
			}
		}
		c.step(ctx, next)
	}
}

func (c *client) step(ctx context.Context, intended time.Time) {
	o := c.choose()
	what := call{intended: intended.UnixNano(), comp: c.comp, write: o.write()}
	c.r.stats.begin(c.id, what)
	res := c.execute(ctx, o)
	c.r.stats.end(c.id, what, res)
	if o.write() {
		c.r.ledger.append(c.entry(o, intended, res))
	}
	c.after(o, res)
}

// choose picks the next operation from the seed's numbers.
func (c *client) choose() op {
	read := c.rand.Float64() < c.r.cfg.Reads
	if !c.shop {
		return c.chooseKV(read)
	}
	isbn := c.r.books[c.rand.IntN(len(c.r.books))]
	switch {
	case read:
		return op{kind: opBook, isbn: isbn}
	case c.pending != nil:
		o := *c.pending
		o.kind = opOrder
		return o
	}
	// Each order of a cart has a book of its own: stepping through the catalogue from a place that the client's name gives.
	start := (c.id*7919 + c.batch*ordersPerCart) % len(c.r.books)
	isbn = c.r.books[(start+c.inCart)%len(c.r.books)]
	return op{kind: opAdd, cart: fmt.Sprintf("%s.%d", c.name, c.batch), isbn: isbn, quantity: 1 + c.rand.Uint32N(2)}
}

func (c *client) chooseKV(read bool) op {
	if read && c.last != "" {
		return op{kind: opGet, name: c.last}
	}
	k := c.puts
	if c.r.cfg.KVKeys > 0 {
		k %= c.r.cfg.KVKeys
	}
	value := fmt.Sprintf("%s.%d.", c.name, c.puts)
	if pad := c.r.cfg.ValueBytes - len(value); pad > 0 {
		value += strings.Repeat("x", pad)
	}
	return op{kind: opPut, name: fmt.Sprintf("%s.%06d", c.name, k), value: value}
}

// after follows the script on.
func (c *client) after(o op, res result) {
	switch {
	case o.kind == opPut:
		c.puts++
		c.last = o.name
	case o.kind == opAdd && res.outcome == answered:
		c.pending = &o
	case o.kind == opOrder && res.outcome == answered && c.inCart+1 < ordersPerCart:
		c.pending = nil
		c.inCart++
	case o.kind == opAdd || o.kind == opOrder: // the cart is full, or what is in it is not certain: a new one
		c.pending = nil
		c.inCart = 0
		c.batch++
	}
}

// result is what came of a call over all its attempts.
type result struct {
	reply
	outcome  uint8
	done     time.Time
	attempts int
	via      string
	key      string
	why      string
}

// execute repeats a call with the same key, at the next gateway each time, until it is answered or its deadline has passed.
func (c *client) execute(ctx context.Context, o op) result {
	req := request{op: o, timeout: c.r.cfg.Attempt}
	if o.write() {
		c.n++
		req.key, req.low = fmt.Sprintf("%s/%d", c.name, c.n), c.n
	}
	res := result{key: req.key}
	begin := time.Now()
	for {
		res.attempts++
		res.via = c.r.cfg.Gateways[c.gw].Name
		actx, cancel := context.WithTimeout(ctx, c.r.cfg.Attempt)
		rep, err := c.asker.ask(actx, c.gw, req)
		cancel()
		res.done = time.Now()
		var final *finalError
		switch {
		case err == nil:
			res.reply, res.outcome, res.why = rep, answered, ""
			return res
		case errors.As(err, &final):
			res.outcome, res.why = refused, final.why
			return res
		}
		res.why = err.Error()
		c.gw = (c.gw + 1) % len(c.r.cfg.Gateways)
		if ctx.Err() != nil || res.done.Sub(begin) > c.r.cfg.Deadline {
			res.outcome = doubt
			return res
		}
		// A pause once every gateway has been tried; a little before, so that a refusing cluster is not hammered.
		pause := 2 * time.Millisecond
		if res.attempts%len(c.r.cfg.Gateways) == 0 {
			pause = 20 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

func (c *client) entry(o op, intended time.Time, res result) Entry {
	return Entry{
		Time: res.done, Client: c.name, Key: res.key, Kind: o.kind, Cart: o.cart, ISBN: o.isbn, Quantity: o.quantity, Name: o.name, Value: o.value,
		Outcome: outcomeNames[res.outcome], Number: res.number, Node: res.node, Via: res.via, Attempts: res.attempts,
		MS: float64(res.done.Sub(intended).Microseconds()) / 1000, Why: res.why,
	}
}
