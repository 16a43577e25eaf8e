package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	ds "github.com/ipfs/go-datastore"
	dssync "github.com/ipfs/go-datastore/sync"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/node/facts"
)

const factsPrefix = "/kb/facts/"

// tree is a node's protocol core.
type tree struct {
	id      peer.ID
	end     *peers.Endpoint
	members *members.Members
	arb     *arbiter.Arbiter
	records *records.Records
	caller  *peers.Caller
	pace    facts.Pace
	rng     *rand.Rand // of tell
	cancel  context.CancelFunc
	goes    sync.WaitGroup
}

func scaleKey(n int) (crypto.PrivKey, peer.ID, error) {
	seed := rand.New(rand.NewPCG(uint64(n), 99))
	b := make([]byte, 32)
	for i := range b {
		b[i] = byte(seed.Uint64())
	}
	key, _, err := crypto.GenerateEd25519Key(bytes.NewReader(b))
	if err != nil {
		return nil, "", err
	}
	id, err := peer.IDFromPrivateKey(key)
	return key, id, err
}

// plant adds a node, which joins at one of those that are there.
func (w *forest) plant(ctx context.Context, i int) error {
	key, id, err := scaleKey(i)
	if err != nil {
		return err
	}
	n := &tree{id: id, end: w.net.Join(id), pace: facts.PaceOf(w.profile.Name)}
	boot := w.rng.Uint64()
	n.rng = rand.New(rand.NewPCG(boot, 3))
	info := members.Info{ID: n.id, Name: fmt.Sprintf("n%d", i), Boot: boot, Addrs: []string{fmt.Sprintf("/mem/%d", i)}, Role: "full"}
	if err := n.open(w, key, info); err != nil {
		return err
	}
	by := n
	if len(w.trees) > 0 {
		by = w.trees[w.rng.IntN(len(w.trees))]
		for _, m := range by.members.All() { // what a newcomer is told
			n.members.Admit(m.Info)
		}
	} else if _, err := n.arb.Bootstrap(""); err != nil {
		return err
	}
	n.start(ctx)
	w.trees = append(w.trees, n)
	ctx, done := context.WithTimeout(ctx, scaleWithin)
	defer done()
	_, err = by.arb.Txn(ctx, arbiter.TxnRequest{Nonce: w.rng.Uint64(), Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: memberPrefix + n.id.String(), Body: members.EncodeInfo(info)}}}})
	return err
}

// open makes the parts.
func (n *tree) open(w *forest, key crypto.PrivKey, info members.Info) error {
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	begun := time.Now()
	clock := func() time.Duration { return time.Since(begun) }
	var err error
	if n.members, err = members.New(members.Config{
		Self: info, Profile: w.profile, Peers: n.end, Links: n.end, BootTime: clock, Rand: rand.New(rand.NewPCG(info.Boot, 1)), Log: quiet,
	}); err != nil {
		return err
	}
	var mu sync.Mutex
	nonces := rand.New(rand.NewPCG(info.Boot, 2))
	if n.arb, err = arbiter.New(arbiter.Config{
		Self: n.id, Boot: info.Boot, Peers: n.end, Links: n.end, Members: arbiter.FromMembers(n.members), FS: vfs.NewCrashableMem(), Dir: "raft",
		Profile: w.profile.Name, Log: quiet, BootTime: clock, Rand: func() uint64 { mu.Lock(); defer mu.Unlock(); return nonces.Uint64() },
	}); err != nil {
		return err
	}
	n.caller = peers.NewCaller(n.end)
	n.records, err = records.Open(records.Config{
		Self: n.id, Key: key, Store: dssync.MutexWrap(ds.NewMapDatastore()), Peers: n.end, Caller: n.caller, View: records.FromMembers(n.members),
		Member: n.members.IsMember, AttemptTimeout: n.pace.Attempt, SyncEvery: n.pace.Records, Rand: rand.New(rand.NewPCG(info.Boot, 4)), Log: quiet,
	})
	return err
}

// start has the parts run as they do in a node.
func (n *tree) start(ctx context.Context) {
	unwatch := n.arb.Watch(func(_, now *arbiter.Register) { // who was admitted is a member
		if now == nil || !strings.HasPrefix(now.Key, memberPrefix) {
			return
		}
		if m, err := members.DecodeInfo(now.Body); err == nil {
			n.members.Admit(m)
		}
	})
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	n.cancel = func() { unwatch(); cancel() }
	for _, f := range []func(context.Context) error{n.members.Run, n.arb.Run, n.records.Run, n.tell, n.look} {
		n.goes.Go(func() { f(run) }) //nolint:errcheck // ends with run
	}
}

// tell repeats what the node tells of its machine, as often as one does whose numbers change all the time.
func (n *tree) tell(ctx context.Context) error {
	every := n.pace.Reports / 6
	for wait := time.Duration(n.rng.Int64N(int64(every))); ; wait = every {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		report, err := json.Marshal(n.report())
		if err != nil {
			return err
		}
		put, done := context.WithTimeout(ctx, 2*time.Second)
		// Too few acknowledgements are the next repetition's business, as in a node.
		_, _, _ = n.records.Put(put, factsPrefix+n.id.String()+"/host", report, n.pace.Reports) //nolint:errcheck // see above
		done()
	}
}

// report has the size of a node's own: numbers of five digits under the names of facts.Sensor, and the round trips to ten others.
func (n *tree) report() map[string]any {
	numbers := facts.Facts{"cpus": 2, "memory_mib": 24105, "disk_mib": 98304}
	for _, name := range []string{
		"load1", "load5", "load15", "free_mib", "memory_percent", "free_disk_mib", "cpu_percent", "free_cpu_ghz", "sent_bytes_per_s", "received_bytes_per_s", "node_rss_mib",
		"node_cpu_percent", "cpu_percent_avg1", "cpu_percent_avg5", "cpu_percent_avg15", "free_mib_avg1", "free_mib_avg5", "free_mib_avg15",
	} {
		numbers[name] = float64(10_000+n.rng.IntN(90_000)) / 1000
	}
	trips := map[string]float64{}
	for i := range 10 {
		trips[fmt.Sprintf("%08x", i)] = float64(n.rng.IntN(1000)) / 1000
	}
	return map[string]any{"node": "n", "facts": numbers, "wall_unix_ms": time.Now().UnixMilli(), "rtt_ms": trips}
}

// look reads what all nodes tell, as placement does on the node that leads.
func (n *tree) look(ctx context.Context) error {
	tick := time.NewTicker(n.pace.Rounds)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if n.arb.Status().Role != "leader" {
			continue
		}
		scan, done := context.WithTimeout(ctx, 500*time.Millisecond)
		n.records.Scan(scan, factsPrefix)
		done()
	}
}

// stop ends the node and waits for it.
func (n *tree) stop() error {
	n.cancel()
	n.goes.Wait()
	n.caller.Close()
	return errors.Join(n.records.Close(), n.arb.Close())
}
