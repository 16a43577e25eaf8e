package nemesis

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	clients  = 6
	keys     = 5
	holders  = 8    // accounts
	opening  = 1000 // of each
	patience = 90 * time.Second
	pace     = 20 * time.Millisecond
	// attempt bounds one try of a call; the next goes to another node.
	attempt = 4 * time.Second
)

// What the components themselves refuse with is an answer. A node that does not know a component, or cannot reach it, says something else.
var (
	errAbsent   = errors.New("the key is absent")
	errPoor     = errors.New("the account has too little")
	errNoAnswer = errors.New("no answer")
	refusals    = map[string]error{"no key \"k": errAbsent, "which is less than": errPoor}
)

// clientele calls both components until it is told to stop.
type clientele struct {
	t    *testing.T
	c    *cluster.Cluster
	hist *history
	// drafts is the history of what is saved on demand only.
	drafts *drafts
	stop   chan struct{}
	goes   sync.WaitGroup

	mu        sync.Mutex // guards the rest
	balances  map[string]int64
	transfers uint64
	doubtful  int
	refused   int
	answered  int
	last      time.Time // of the last answer to a write
}

func account(i int) string { return fmt.Sprintf("holder-%d", i) }

// open opens the accounts and starts the clients.
func open(t *testing.T, c *cluster.Cluster, seed uint64) *clientele {
	t.Helper()
	l := &clientele{t: t, c: c, hist: newHistory(), drafts: newDrafts(), stop: make(chan struct{}), balances: map[string]int64{}}
	rng := rand.New(rand.NewPCG(seed, 2))
	for i := range holders {
		if _, err := l.call(rng, "bank/bank", "Open", fmt.Sprintf(`{"name":%q,"balance":"%d"}`, account(i), opening), "open-"+account(i)); err != nil {
			t.Fatal(err)
		}
		l.balances[account(i)] = opening
	}
	for i := range clients {
		rng := rand.New(rand.NewPCG(seed, 100+uint64(i)))
		l.goes.Go(func() { l.client(i, rng) })
	}
	return l
}

func (l *clientele) ended() bool {
	select {
	case <-l.stop:
		return true
	default:
		return false
	}
}

func (l *clientele) client(id int, rng *rand.Rand) {
	for n := 0; !l.ended(); n++ {
		key := fmt.Sprintf("c%d-%d", id, n)
		switch rng.IntN(7) {
		case 0:
			l.put(id, rng, key)
		case 1:
			l.get(id, rng)
		case 2:
			l.transfer(rng, key)
		case 3:
			l.sum(rng)
		case 4:
			l.putDraft(id, rng, key)
		case 5:
			l.getDraft(id, rng)
		case 6:
			if rng.IntN(4) == 0 {
				l.save(id, rng)
			}
		}
		time.Sleep(pace)
	}
}

// call has a call answered by whichever node answers it, within patience.
func (l *clientele) call(rng *rand.Rand, component, method, body, key string) (string, error) {
	out, _, err := l.tried(rng, component, method, body, key)
	return out, err
}

// tried is call, and says how often it was tried.
func (l *clientele) tried(rng *rand.Rand, component, method, body, key string) (out string, tries int, err error) {
	var last error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		alive := l.c.Alive()
		if len(alive) == 0 {
			continue
		}
		n := alive[rng.IntN(len(alive))]
		c, err := n.Client()
		if err != nil {
			last = err
			continue
		}
		ctx, cancel := context.WithTimeout(l.t.Context(), attempt)
		tries++
		res, err := c.Call(ctx, &apiv1.CallRequest{Component: component, Method: method, Json: body, IdempotencyKey: key, TimeoutMs: uint64(attempt.Milliseconds())})
		cancel()
		if err == nil {
			return res.GetJson(), tries, nil
		}
		for says, is := range refusals {
			if strings.Contains(err.Error(), says) {
				return "", tries, is
			}
		}
		last = err
	}
	return "", tries, fmt.Errorf("%w: %s %s: %w", errNoAnswer, component, method, last)
}

func (l *clientele) wrote() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answered++
	l.last = time.Now()
}

func (l *clientele) put(id int, rng *rand.Rand, key string) {
	in := put{fmt.Sprintf("k%d", rng.IntN(keys)), key}
	at := l.hist.now()
	_, err := l.call(rng, "data/kv", "Put", fmt.Sprintf(`{"key":%q,"value":%q}`, in.key, in.value), key)
	if err != nil {
		l.hist.add(id, in, at, nil, inDoubt)
		l.doubt(err)
		return
	}
	l.hist.add(id, in, at, nil, l.hist.now())
	l.wrote()
}

func (l *clientele) get(id int, rng *rand.Rand) {
	in := get{fmt.Sprintf("k%d", rng.IntN(keys))}
	at := l.hist.now()
	out, err := l.call(rng, "data/kv", "Get", fmt.Sprintf(`{"key":%q}`, in.key), "")
	var pair struct {
		Value string `json:"value"`
	}
	switch {
	case errors.Is(err, errAbsent):
	case err != nil:
		return // a read that was not answered says nothing
	default:
		if err := json.Unmarshal([]byte(out), &pair); err != nil {
			l.t.Errorf("get %s: %v in %q", in.key, err, out)
			return
		}
	}
	l.hist.add(id, in, at, gotten{pair.Value, true}, l.hist.now())
}

func (l *clientele) transfer(rng *rand.Rand, key string) {
	from, to, amount := account(rng.IntN(holders)), account(rng.IntN(holders)), int64(1+rng.IntN(50))
	if from == to {
		return
	}
	_, err := l.call(rng, "bank/bank", "Transfer", fmt.Sprintf(`{"from":%q,"to":%q,"amount":"%d"}`, from, to, amount), key)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case errors.Is(err, errPoor):
		l.refused++
	case err != nil:
		l.doubtful++
		l.t.Logf("in doubt: %v", err)
	default:
		l.balances[from] -= amount
		l.balances[to] += amount
		l.transfers++
		l.answered++
		l.last = time.Now()
	}
}

func (l *clientele) doubt(err error) {
	l.t.Logf("in doubt: %v", err)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.doubtful++
}

// books is what the bank says.
type books struct {
	Accounts []struct {
		Name    string `json:"name"`
		Balance int64  `json:"balance,string"`
	} `json:"accounts"`
	Sum       int64  `json:"sum,string"`
	Transfers uint64 `json:"transfers,string"`
}

func (l *clientele) read(rng *rand.Rand) (books, error) {
	var b books
	out, err := l.call(rng, "bank/bank", "Balances", "{}", "")
	if err != nil {
		return b, err
	}
	return b, json.Unmarshal([]byte(out), &b)
}

func (l *clientele) sum(rng *rand.Rand) {
	b, err := l.read(rng)
	if err == nil && b.Sum != holders*opening {
		l.t.Errorf("the sum of all accounts is %d, want %d: %+v", b.Sum, holders*opening, b)
	}
}

// close stops the clients, waits for their last answers, and compares.
func (l *clientele) close(seed uint64) {
	l.t.Helper()
	close(l.stop)
	l.goes.Wait()
	ops, doubtful := l.hist.linearizable(l.t)
	l.drafts.check(l.t)
	b, err := l.read(rand.New(rand.NewPCG(seed, 3)))
	if err != nil {
		l.t.Fatal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := map[string]int64{}
	for _, a := range b.Accounts {
		now[a.Name] = a.Balance
	}
	switch {
	case b.Sum != holders*opening:
		l.t.Errorf("the sum of all accounts is %d, want %d", b.Sum, holders*opening)
	case l.doubtful == 0 && (b.Transfers != l.transfers || !maps.Equal(now, l.balances)):
		l.t.Errorf("%d transfers were answered, the bank knows %d\nbalances %v\nwant     %v", l.transfers, b.Transfers, now, l.balances)
	case b.Transfers < l.transfers:
		l.t.Errorf("%d transfers were answered, the bank knows %d", l.transfers, b.Transfers)
	}
	l.t.Logf("%d operations on registers, %d of them in doubt for good: linearizable; %d transfers answered, %d refused, %d in doubt: the bank has %d, sum %d",
		ops, doubtful, l.transfers, l.refused, l.doubtful-doubtful, b.Transfers, b.Sum)
}
