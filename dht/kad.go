package dht

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/peers"
	kaddht "github.com/libp2p/go-libp2p-kad-dht"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	kadrecords "github.com/libp2p/go-libp2p-kad-dht/records"
	kbucket "github.com/libp2p/go-libp2p-kbucket"
	record "github.com/libp2p/go-libp2p-record"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/routing"
)

// Kademlia's parameters. A stock client works with any of its own.
const (
	// BucketSize is k: how many members Closest returns at most.
	BucketSize  = 8
	concurrency = 3 // alpha
	// resiliency is beta: how many of the closest must have answered before a lookup ends. kad-dht asks all k in any case, but what those beyond
	// beta name comes too late to count, so with 3 the fourth and fifth are often not the closest ones, and a dead one takes a
	// living one's place. Who holds a record is decided by them.
	resiliency = BucketSize
	// Namespace is the first part of every record's key.
	Namespace = "kb"
	// reconcileEvery is how often the routing table is made to hold the view's members again: kad-dht drops a peer after one failed
	// request and by itself takes it back only when it hears of it.
	reconcileEvery = 15 * time.Second
	refreshQuery   = 2 * time.Second
)

// KadPrefix is the protocol prefix of a cluster's kad-dht; a stock client gives it as dht.ProtocolPrefix.
func KadPrefix(cluster string) protocol.ID { return protocol.ID("/coppice/" + cluster) }

// ErrNoRecord is returned by GetValue when no reachable member has a valid record under the key.
var ErrNoRecord = errors.New("no record under this key")

// Kad is the node's part of the cluster's kad-dht: a server whose routing table holds only members that are alive, and lookups that say
// how they went. It answers who is close to a key and finds records; it is not used for writing (kad-dht's PutValue cannot say whether
// anything was stored).
type Kad struct {
	cfg    *Config
	self   peer.ID
	h      host.Host
	peers  *peers.Libp2p
	kad    *kaddht.IpfsDHT
	send   *sender
	values *kadrecords.ValueStore // reads only: the server writes through its own
	log    *slog.Logger
	done   chan struct{}
	wg     sync.WaitGroup
}

func newKad(cfg *Config, h host.Host, p *peers.Libp2p, d *door) (*Kad, error) {
	k := &Kad{
		cfg: cfg, self: h.ID(), h: h, peers: p, log: cfg.Log, done: make(chan struct{}),
		values: kadrecords.NewValueStore(cfg.Datastore, record.NamespacedValidator{Namespace: cfg.Validator}, 0),
	}
	allowed := func(id peer.ID) bool { return d.known(id) }
	opts := []kaddht.Option{
		kaddht.Mode(kaddht.ModeServer),
		kaddht.ProtocolPrefix(KadPrefix(cfg.Cluster)),
		kaddht.Validator(record.NamespacedValidator{Namespace: cfg.Validator}),
		kaddht.DisableProviders(),
		kaddht.MaxRecordAge(0),
		kaddht.BucketSize(BucketSize), kaddht.Concurrency(concurrency), kaddht.Resiliency(resiliency),
		kaddht.Datastore(cfg.Datastore),
		kaddht.RoutingTableRefreshQueryTimeout(refreshQuery),
		kaddht.QueryFilter(func(_ any, ai peer.AddrInfo) bool { return k.usable(ai.ID) }),
		kaddht.RoutingTableFilter(func(_ any, id peer.ID) bool { return k.usable(id) }),
		kaddht.WithCustomMessageSender(func(_ host.Host, protos []protocol.ID) kadpb.MessageSenderWithDisconnect {
			k.send = newSender(p, protos, cfg.RPCTimeout)
			return k.send
		}),
	}
	if cfg.RefreshPeriod > 0 {
		opts = append(opts, kaddht.RoutingTableRefreshPeriod(cfg.RefreshPeriod))
	} else {
		opts = append(opts, kaddht.DisableAutoRefresh())
	}
	if cfg.AcceptPut != nil {
		opts = append(opts, kaddht.OnRequestHook(k.screen))
	}
	var err error
	k.kad, err = kaddht.New(&kadHost{Host: h, peers: p, allowed: allowed}, opts...)
	if err != nil {
		return nil, fmt.Errorf("build kad-dht: %w", err)
	}
	k.wg.Add(1)
	go k.reconcile()
	return k, nil
}

func (k *Kad) close() error {
	close(k.done)
	k.wg.Wait()
	return k.kad.Close()
}

// usable is the filter of queries and of the routing table.
func (k *Kad) usable(id peer.ID) bool { return id != k.self && k.cfg.Member(id) && k.cfg.Alive(id) }

// screen drops a PUT_VALUE that the configuration does not accept. kad-dht has no hook that refuses; a put without a record fails there.
func (k *Kad) screen(_ context.Context, s network.Stream, m *kadpb.Message) {
	if m.GetType() != kadpb.Message_PUT_VALUE || m.GetRecord() == nil {
		return
	}
	if !k.cfg.AcceptPut(s.Conn().RemotePeer(), string(m.GetKey()), m.GetRecord().GetValue()) {
		m.Record = nil
	}
}

// Closest looks up the members closest to a key, closest first, this node included, at most BucketSize. hops is how many requests one
// after the other led to the closest; 0 when that is this node. Over the same members it agrees with keys.Sort.
func (k *Kad) Closest(ctx context.Context, key string) (ids []peer.ID, hops int, err error) {
	if key == "" {
		return nil, 0, errors.New("closest: the key is empty")
	}
	ctx, t := withTrail(ctx, k.seeds(key))
	found, err := k.kad.GetClosestPeers(ctx, key)
	if err != nil && !errors.Is(err, kbucket.ErrLookupFailure) { // that one says: nobody else here
		return nil, 0, fmt.Errorf("look up %q: %w", key, err)
	}
	ids = keys.Sort(keys.Of(key), append(slices.Clone(found), k.self))
	if len(ids) > BucketSize {
		ids = ids[:BucketSize]
	}
	if ids[0] != k.self {
		hops = t.hops(ids[0])
	}
	return ids, hops, nil
}

// GetValue finds the best valid record under a key by kad-dht's own lookup, over all of the closest members. hops is how many requests
// one after the other led to the nearest copy (0: here), copies how many of those asked hold this very value, this node included.
func (k *Kad) GetValue(ctx context.Context, key string) (value []byte, hops, copies int, err error) {
	ctx, t := withTrail(ctx, k.seeds(key))
	value, err = k.kad.GetValue(ctx, key)
	if errors.Is(err, routing.ErrNotFound) || errors.Is(err, kbucket.ErrLookupFailure) {
		return nil, 0, 0, fmt.Errorf("%w: %s", ErrNoRecord, key)
	}
	if err != nil {
		return nil, 0, 0, fmt.Errorf("get %q: %w", key, err)
	}
	copies, hops = t.copies(value)
	own, err := k.values.Get(ctx, key)
	if err != nil {
		return nil, 0, 0, fmt.Errorf("get %q: own store: %w", key, err)
	}
	if own != nil && bytes.Equal(own.GetValue(), value) {
		copies, hops = copies+1, 0
	}
	return value, hops, copies, nil
}

// seeds returns the peers that a lookup of key starts from.
func (k *Kad) seeds(key string) []peer.ID {
	return k.kad.RoutingTable().NearestPeers(kbucket.ConvertKey(key), BucketSize)
}

// Include puts a member into the routing table: it was admitted, or is alive again. kad-dht itself notices peers only when they are
// identified, which for a newcomer is before it is a member.
func (k *Kad) Include(id peer.ID) {
	if !k.usable(id) {
		return
	}
	if addrs := k.cfg.Addrs(id); len(addrs) > 0 {
		k.h.Peerstore().AddAddrs(id, addrs, peerstore.RecentlyConnectedAddrTTL)
	}
	if k.kad.RoutingTable().Find(id) != "" {
		return
	}
	if _, err := k.kad.RoutingTable().TryAddPeer(id, true, false); err != nil {
		k.log.Debug("routing table did not take a member", "peer", id, "err", err) // its bucket is full of others
	}
}

// Evict drops a member that died or left from the routing table and forgets its streams. Lookups do not come back to it while it is
// not alive and a member.
func (k *Kad) Evict(id peer.ID) {
	k.kad.RoutingTable().RemovePeer(id)
	k.send.OnDisconnect(context.Background(), id)
}

// Known returns the members in the routing table, in no order.
func (k *Kad) Known() []peer.ID { return k.kad.RoutingTable().ListPeers() }

// Refresh looks up this node's own key and a random one in each bucket, which fills the routing table where the view is capped.
func (k *Kad) Refresh(ctx context.Context) error {
	select {
	case err := <-k.kad.RefreshRoutingTable():
		if err != nil {
			return fmt.Errorf("refresh routing table: %w", err)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// reconcile keeps the routing table in step with the view.
func (k *Kad) reconcile() {
	defer k.wg.Done()
	t := time.NewTicker(reconcileEvery)
	defer t.Stop()
	for {
		select {
		case <-k.done:
			return
		case <-t.C:
		}
		for _, id := range k.kad.RoutingTable().ListPeers() {
			if !k.usable(id) {
				k.Evict(id)
			}
		}
		if k.cfg.Members == nil {
			continue
		}
		for _, id := range k.cfg.Members() {
			k.Include(id)
		}
	}
}

// kadHost is the host as kad-dht sees it: its handlers are gated, and its dials know the view's addresses.
type kadHost struct {
	host.Host
	peers   *peers.Libp2p
	allowed func(peer.ID) bool
}

// SetStreamHandler implements host.Host.
func (h *kadHost) SetStreamHandler(p protocol.ID, f network.StreamHandler) {
	h.Host.SetStreamHandler(p, h.peers.Gate(h.allowed, f))
}

// Connect implements host.Host.
func (h *kadHost) Connect(ctx context.Context, pi peer.AddrInfo) error {
	if len(pi.Addrs) > 0 {
		h.Peerstore().AddAddrs(pi.ID, pi.Addrs, peerstore.TempAddrTTL)
	}
	return h.peers.Connect(ctx, pi.ID)
}
