package bench

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	durableNodes = 3
	durableBytes = 256
	durableSpan  = 2 * time.Second // of one sample
	durableWarm  = 500 * time.Millisecond
)

// durableCallers are how many write at the same time.
var durableCallers = []int{1, 64}

// putter writes a value under a key and returns when it is durable. callers have numbers from 0.
type putter func(ctx context.Context, caller int, key, value string) error

// durable writes 256 bytes a call to a component whose every call is answered when its effects are on other disks, from 1 and from 64 callers that each
// wait for their answer; and the same to etcd, in turns.
func durable(ctx context.Context, cfg Config) (_ []Result, err error) {
	s, err := newStand(ctx, cfg, durableNodes)
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	disk, err := s.fsync()
	if err != nil {
		return nil, err
	}
	if err := s.deploy(ctx, "each-call"); err != nil {
		return nil, err
	}
	ours, err := s.componentPut(ctx)
	if err != nil {
		return nil, err
	}
	base, what, end, err := s.durableBaseline(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, end()) }()
	out := []Result{disk}
	for _, callers := range durableCallers {
		for _, p := range []putter{ours, base} { // what is done for the first time is not counted
			if _, err := drive(ctx, callers, min(durableWarm, cmp.Or(cfg.Span, durableSpan)), p); err != nil {
				return nil, err
			}
		}
		var a, b rounds
		for run := range cfg.Runs {
			if err := a.add(ctx, cfg, callers, ours); err != nil {
				return nil, fmt.Errorf("write to the component: %w", err)
			}
			if err := b.add(ctx, cfg, callers, base); err != nil {
				return nil, fmt.Errorf("write to %s: %w", what, err)
			}
			cfg.say("run %d of %d, %d callers: each-call %.2f ms, %.0f/s; %s %.2f ms, %.0f/s", run+1, cfg.Runs, callers,
				summary("", "", a.last).Median, a.rate[run], what, summary("", "", b.last).Median, b.rate[run])
		}
		name := fmt.Sprintf("each-call, %d B, %d callers", durableBytes, callers)
		out = append(out,
			summary(name+": latency", "ms", a.all).against(what, b.all),
			summary(name+": latency, p99 of a run", "ms", a.p99).against(what, b.p99),
			summary(name+": throughput", "calls/s", a.rate).against(what, b.rate))
	}
	return out, nil
}

// rounds are the samples of one side.
type rounds struct {
	all, last, p99, rate []float64 // ms, ms, ms, calls/s
}

func (r *rounds) add(ctx context.Context, cfg Config, callers int, p putter) error {
	span := cmp.Or(cfg.Span, durableSpan)
	begin := time.Now()
	took, err := drive(ctx, callers, span, p)
	if err != nil {
		return err
	}
	r.all, r.last = append(r.all, took...), took
	r.p99 = append(r.p99, summary("", "", took).P99)
	r.rate = append(r.rate, float64(len(took))/time.Since(begin).Seconds())
	return nil
}

// drive has so many callers write for a time, each one after the other, and returns what every call took, in ms.
func drive(ctx context.Context, callers int, span time.Duration, p putter) ([]float64, error) {
	value := strings.Repeat("v", durableBytes)
	end := time.Now().Add(span)
	each := make([][]float64, callers)
	g, ctx := errgroup.WithContext(ctx)
	for i := range callers {
		g.Go(func() error {
			key := fmt.Sprintf("durable/%03d", i)
			for time.Now().Before(end) {
				begin := time.Now()
				if err := p(ctx, i, key, value); err != nil {
					return err
				}
				each[i] = append(each[i], ms(time.Since(begin)))
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var all []float64
	for _, one := range each {
		all = append(all, one...)
	}
	return all, nil
}

// componentPut writes to the component through the control API of the node that it runs on.
func (s *stand) componentPut(ctx context.Context) (putter, error) {
	owner, err := s.owner(ctx)
	if err != nil {
		return nil, err
	}
	c, err := owner.Client()
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, _ int, key, value string) error {
		raw, err := json.Marshal(map[string]string{"key": key, "value": value})
		if err != nil {
			return err
		}
		_, err = c.Call(ctx, &apiv1.CallRequest{Component: component, Method: "kv.v1.KV/Put", Json: string(raw), TimeoutMs: 10_000})
		return err
	}, nil
}

// durableBaseline is what each-call is compared with, its name, and its end: etcd, or, where that is not installed, a write to this disk and over TLS to
// the disks of two others, all synced.
func (s *stand) durableBaseline(ctx context.Context) (putter, string, func() error, error) {
	callers := durableCallers[len(durableCallers)-1]
	e, err := s.startEtcd(ctx, durableNodes)
	if err == nil {
		if err := e.open(callers); err != nil {
			return nil, "", nil, errors.Join(err, e.end())
		}
		what := fmt.Sprintf("etcd put, %d members without TLS, gRPC to the leader, %d callers a connection", durableNodes, etcdShare)
		return e.put, what, e.end, nil
	}
	if !errors.Is(err, errNoEtcd) {
		return nil, "", nil, err
	}
	s.cfg.say("%v: compared with a write that this program syncs here and, over TLS, at two others", err)
	k, err := s.startSinks(ctx, durableNodes-1)
	if err != nil {
		return nil, "", nil, err
	}
	r, err := newReplicated(s.dir, k, callers)
	if err != nil {
		return nil, "", nil, errors.Join(err, k.end())
	}
	return r.put, "no etcd here: write and fsync here and, over TLS, at 2 others", r.end, nil
}

// replicated is a bare log: a write goes to a file here and to two receivers, and is over when all three have synced it.
type replicated struct {
	sinks *sinks
	here  *keeper
	conns [][]net.Conn // by caller
}

func newReplicated(dir string, k *sinks, callers int) (*replicated, error) {
	f, err := os.Create(filepath.Join(dir, "replicated"))
	if err != nil {
		return nil, err
	}
	r := &replicated{sinks: k, here: &keeper{f: f}}
	for range callers {
		conns, err := k.dial()
		r.conns = append(r.conns, conns)
		if err != nil {
			return nil, errors.Join(err, r.end())
		}
	}
	return r, nil
}

func (r *replicated) put(_ context.Context, caller int, key, value string) error {
	data := []byte(key + value)
	var wg sync.WaitGroup
	var local error
	wg.Go(func() { local = r.here.keep(data) })
	_, err := copyTo(r.conns[caller], data)
	wg.Wait()
	return errors.Join(local, err)
}

func (r *replicated) end() error {
	var errs []error
	for _, conns := range r.conns {
		errs = append(errs, closeAll(conns))
	}
	return errors.Join(append(errs, r.here.f.Close(), r.sinks.end())...)
}
