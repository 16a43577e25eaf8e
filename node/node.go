package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	record "github.com/libp2p/go-libp2p-record"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/components/supervisor"
	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/kb"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/coppice-project/coppice/membrane"
	"github.com/coppice-project/coppice/node/api"
	"github.com/coppice-project/coppice/node/facts"
	"github.com/coppice-project/coppice/placement"
	"github.com/coppice-project/coppice/registry"
)

// Node is one member of a cluster: everything that runs in the process of `coppice up`.
type Node struct {
	cfg   Config
	log   *slog.Logger
	id    peer.ID
	key   crypto.PrivKey
	boot  uint64
	state state
	fresh bool // it founded or joined the cluster with this start

	renewed   *renewal // it joins with a new identity; nil: it does not
	otherJoin string   // the token that it was started with, when it has one for that

	store     *store.Store
	overlay   *dht.DHT
	caller    *peers.Caller
	members   *members.Members
	arbiter   *arbiter.Arbiter
	blobs     *blobs.Store
	records   *records.Records
	view      atomic.Pointer[records.View] // the capped one; nil: none
	events    *events.Events
	registry  *registry.Registry
	runner    runner.Runner
	sup       *supervisor.Supervisor
	router    *membrane.Router
	direct    *directory
	coord     *placement.Coordinator
	decisions placement.Ledger // of this node as coordinator
	kb        *kb.Engine
	sensor    *facts.Sensor
	api       *api.Server
	links     *links
	faults    *faults

	unmirrored unmirrored

	instancesChanged chan struct{}
	toldInstances    map[string]string // of report's goroutine only
	toldDrops        string

	goes  sync.WaitGroup
	stops []func()

	toldCorrupt atomic.Int64      // boot time at which a corrupt page was last told of; 0: never
	behind      atomic.Int64      // boot time at which the view was last seen to be behind; 0: never
	office      atomic.Int64      // since when this node is coordinator, in Unix nanoseconds; 0: it is not
	failedMu    sync.Mutex        // guards failed
	failed      map[string]uint64 // by register: the epoch that was told to fail where it is

	randMu sync.Mutex // guards rand
	rand   *rand.Rand

	clock *clusterClock

	stopOnce sync.Once
	stopped  chan struct{}
	why      string
	broken   chan error // the database cannot go on; buffered

	dutyMu    sync.Mutex // guards the rest
	telling   bool       // members are there to be told
	diskIsLow bool
	noVote    string // why the arbiter has stopped here; "": it has not
}

// flapDeaths within two minutes quarantine a node. A person who restarts a node a few times must not reach it.
const flapDeaths = 6

// New builds a node from its data folder, or founds or joins a cluster where the folder is empty. ctx bounds the joining only. What it
// opened it closes again when it fails.
func New(ctx context.Context, cfg Config) (*Node, error) {
	cfg.defaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, log: cfg.Log, stopped: make(chan struct{}), broken: make(chan error, 1), instancesChanged: make(chan struct{}, 1), toldInstances: map[string]string{},
		rand: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())), faults: newFaults(cfg.Log), failed: map[string]uint64{},
	}
	n.boot, n.clock = n.nonce(), newClusterClock(cfg.BootTime)
	// On a goroutine of its own: a database that cannot go on ends the goroutine that uses it.
	built := make(chan error, 1)
	go func() {
		err := n.build(ctx)
		if err != nil {
			err = errors.Join(err, n.close())
		}
		built <- err
	}()
	select {
	case err := <-built:
		if err != nil {
			return nil, err
		}
		return n, nil
	case err := <-n.broken:
		return nil, err
	}
}

// build opens all parts, one after the other.
func (n *Node) build(ctx context.Context) error {
	if err := n.openData(ctx); err != nil {
		return err
	}
	token, err := n.membership()
	if err != nil {
		return err
	}
	original, err := n.elsewhere(ctx)
	if err != nil {
		return err
	}
	for _, open := range []func() error{n.openOverlay, n.openPlatform, n.openControl, n.overlayStart, n.rememberListen} {
		if err := open(); err != nil {
			return err
		}
	}
	if original != "" {
		return n.renew(ctx, fmt.Errorf("%w (it answers at %s)", errCloned, original))
	}
	if err := n.rememberAddrs(); err != nil {
		return err
	}
	n.members.UpdateSelf(func(i *members.Info) { i.Addrs = n.overlay.Addrs() })
	if n.state.Certificate == nil {
		return n.enter(ctx, token)
	}
	return nil
}

func (n *Node) overlayStart() error { return n.overlay.Start() }

// tryDisk is what to do about a disk that failed.
const tryDisk = "free disk space or check the disk, then start the node again"

// openData opens the data folder: identity, database, and what it says about the cluster.
func (n *Node) openData(ctx context.Context) (err error) {
	dir, fs := n.cfg.Data, n.cfg.FS
	if err := store.MkdirAll(fs, dir); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	if err := n.putAside(); err != nil {
		return err
	}
	if n.key, _, err = dht.LoadIdentity(fs, dir); err != nil {
		return err
	}
	if n.id, err = dht.IDOf(n.key); err != nil {
		return err
	}
	if n.store, err = store.Open(fs, filepath.Join(dir, databaseName), store.Options{
		Log: n.log, OnFatal: func(err error) { n.broken <- fmt.Errorf("the database failed: %w; %s", err, tryDisk) },
		Disk: store.Disk{OnLow: n.diskLow},
	}); err != nil {
		return err
	}
	if n.state, _, err = loadState(fs, n.statePath()); err != nil {
		return err
	}
	if n.sensor, err = facts.New(ctx, dir); err != nil {
		n.log.Warn("the machine cannot be measured completely", "error", err)
	}
	return nil
}

func (n *Node) statePath() string { return filepath.Join(n.cfg.Data, stateName) }

// membership says which cluster this start is about. The token is set when it is to be joined.
func (n *Node) membership() (dht.Token, error) {
	if n.state.Cluster != "" {
		if n.state.Name != n.cfg.Name && n.cfg.Name != "" {
			n.log.Warn("the node has a new name", "was", n.state.Name, "now", n.cfg.Name)
		}
		return dht.Token{}, n.joinsItsOwn()
	}
	if n.cfg.Join == "" {
		n.state.Cluster = fmt.Sprintf("%016x", n.nonce())
		return dht.Token{}, nil
	}
	tok, err := dht.DecodeToken(n.cfg.Join)
	if err != nil {
		return dht.Token{}, err
	}
	n.state.Cluster = tok.ClusterID
	return tok, nil
}

// joinsItsOwn refuses a token of another cluster than the one that the data folder belongs to: a node does not change sides.
func (n *Node) joinsItsOwn() error {
	if n.cfg.Join == "" {
		return nil
	}
	tok, err := dht.DecodeToken(n.cfg.Join)
	if err != nil || tok.ClusterID == n.state.Cluster {
		return err
	}
	return fmt.Errorf("%s belongs to cluster %s, the token is for cluster %s; leave out --join, or join with another --data folder", n.cfg.Data, n.state.Cluster, tok.ClusterID)
}

// openOverlay builds what joins the node to the others. Nothing listens yet.
func (n *Node) openOverlay() (err error) {
	late := &lateStore{}
	isMember := func(id peer.ID) bool { return n.members != nil && n.members.IsMember(id) }
	validator := records.NewValidator(isMember)
	n.overlay, err = dht.New(dht.Config{
		Cluster: n.state.Cluster, Identity: n.key, Profile: n.cfg.Profile, Listen: n.listenAddrs(), Advertise: n.cfg.Advertise, NewHost: n.cfg.NewHost,
		Datastore: late, Validator: record.NamespacedValidator{"kb": validator},
		Member: isMember, Alive: n.isAlive, Members: n.routed, Addrs: n.addrsOf,
		Certificate: func() []byte { return n.state.Certificate }, Info: func() []byte { return members.EncodeInfo(n.members.Self().Info) },
		Admit: n.admit, OnCertified: n.certified, Log: n.log,
	})
	if err != nil {
		return err
	}
	p := n.overlay.Peers()
	n.caller = peers.NewCaller(p)
	if err := n.openMembers(p); err != nil {
		return err
	}
	n.duties(func() { n.telling, n.diskIsLow = true, n.store.Low() }) // the store has looked at the disk already
	n.arbiter, err = arbiter.New(arbiter.Config{
		Self: n.id, Boot: n.boot, Peers: p, Links: p, Members: arbiter.FromMembers(n.members), FS: n.store.FS(), Dir: filepath.Join(n.cfg.Data, raftName),
		Leased: components.LeasedBody, MaxVoters: n.cfg.MaxVoters,
		Profile: n.cfg.Profile, Rand: n.nonce, Log: n.log, BootTime: n.cfg.BootTime, Mirror: n.mirror, Turned: n.turned,
		Halted: n.votesNoMore, Format: n.cfg.Format, Expelled: n.expelled,
	})
	if err != nil {
		return err
	}
	if n.state.Certificate == nil && n.cfg.Join == "" {
		if _, err := n.arbiter.Bootstrap(n.state.Cluster); err != nil {
			return err
		}
	}
	if n.blobs, err = blobs.Open(blobs.Config{
		Self: n.id, DB: n.store.DB(), Peers: p, Low: n.store.Low, Alive: n.isAlive, Holders: n.aliveIDs, Failed: n.store.Fail, Log: n.log,
		Corrupt: n.corruptPage, Rand: n.nonce,
	}); err != nil {
		return err
	}
	pace := facts.PaceOf(n.cfg.Profile)
	n.records, err = records.Open(records.Config{
		Self: n.id, Key: n.key, Store: n.store.Datastore("kad/", store.NoSync()), Peers: p, Caller: n.caller, Member: isMember,
		View: n.recordsView(), Route: n.route, Everyone: records.FromMembers(n.members).Alive,
		AttemptTimeout: pace.Attempt, SyncEvery: pace.Records, Incarnation: func() uint64 { return n.arbiter.Status().Incarnation }, Low: n.store.Low, Log: n.log,
	})
	if err != nil {
		return err
	}
	late.set(n.records.Datastore())
	return n.openEvents(p)
}

func (n *Node) openMembers(p *peers.Libp2p) error {
	profile, err := members.ProfileOf(n.cfg.Profile)
	if err != nil {
		return err
	}
	st := n.sensor.Static()
	n.members, err = members.New(members.Config{
		Self: members.Info{
			ID: n.id, Name: n.cfg.Name, Zone: n.cfg.Zone, Role: n.cfg.Role, Labels: n.cfg.Labels, Boot: n.boot, StartedUnixMs: time.Now().UnixMilli(),
			CPUMillis: or(n.cfg.Capacity.CPUMillis, uint64(st.CPUs)*1000), MemoryBytes: or(n.cfg.Capacity.MemoryBytes, st.MemoryBytes),
			DiskBytes: or(n.cfg.Capacity.DiskBytes, st.DiskBytes), Version: n.cfg.Version, Platform: runtime.GOOS + "/" + runtime.GOARCH, MaxFormat: n.cfg.Format,
		},
		Profile: profile, Peers: p, Links: p, BootTime: n.cfg.BootTime, Log: n.log,
		Book: members.FileBook(n.cfg.FS, filepath.Join(n.cfg.Data, "members")), Connection: n.connection, FlapDeaths: flapDeaths,
	})
	return err
}

// connection says how this node is connected to another.
func (n *Node) connection(id peer.ID) string {
	switch n.overlay.Host().Network().Connectedness(id) {
	case network.Connected:
		return "direct"
	case network.Limited:
		return "relayed"
	}
	return ""
}

func (n *Node) isAlive(id peer.ID) bool {
	m, ok := n.members.Member(id)
	return ok && (m.State == members.Alive || m.State == members.Suspect)
}

func (n *Node) aliveIDs() []peer.ID {
	var out []peer.ID
	for _, m := range n.members.Alive() {
		out = append(out, m.ID)
	}
	return out
}

func (n *Node) addrsOf(id peer.ID) []ma.Multiaddr {
	m, ok := n.members.Member(id)
	if !ok {
		return nil
	}
	addrs, err := dht.ParseAddrs(m.Addrs)
	if err != nil {
		n.faults.set("addresses of "+m.Name, err)
		return nil
	}
	return addrs
}

// turned tells that this node's arbiter goes on in another incarnation.
func (n *Node) turned(incarnation uint64, file, why string) {
	if n.events == nil {
		return
	}
	ev := events.Event{
		Channel: "/nodes/" + n.cfg.Name, Type: "alone", Cause: why, Message: fmt.Sprintf("%s goes on alone, in incarnation %d", n.cfg.Name, incarnation),
		Fields: map[string]string{"incarnation": fmt.Sprint(incarnation)},
	}
	if file != "" {
		ev.Type, ev.Message, ev.Fields["file"] = "superseded", fmt.Sprintf("%s follows incarnation %d; what it held of a lower one is in %s", n.cfg.Name, incarnation, file), file
	}
	n.events.Publish(ev)
}

// enter makes the node a member: by the token of another, or as the first.
func (n *Node) enter(ctx context.Context, token dht.Token) error {
	n.fresh = true
	if n.cfg.Join == "" {
		cert, err := n.overlay.Certify(dht.Certificate{Member: n.id, Incarnation: 1, Index: 1, Issued: time.Now()})
		if err != nil {
			return err
		}
		return n.settle(cert)
	}
	w, err := n.joinBy(ctx, token)
	if err != nil {
		return err
	}
	n.members.UpdateSelf(func(i *members.Info) { i.Addrs = n.overlay.Addrs() })
	for _, b := range w.Members {
		info, err := members.DecodeInfo(b)
		if err != nil {
			return fmt.Errorf("join: the welcome names a member that cannot be read: %w", err)
		}
		if info.ID != n.id {
			n.members.Admit(info)
		}
	}
	if err := n.settle(w.Certificate); err != nil {
		return err
	}
	n.overlay.Greet()
	return nil
}

// joinBy joins by a token. That of a renewal may have expired: then what the node was started with counts.
func (n *Node) joinBy(ctx context.Context, token dht.Token) (dht.Welcome, error) {
	w, err := n.overlay.Join(ctx, token, members.EncodeInfo(n.members.Self().Info))
	if err == nil || n.renewed == nil {
		return w, err
	}
	if n.otherJoin == "" {
		return w, fmt.Errorf("%w; this node needs a new identity (%s): coppice token on another node, and coppice up --join TOKEN here", err, n.renewed.Why)
	}
	other, derr := dht.DecodeToken(n.otherJoin)
	if derr != nil || other.ClusterID != token.ClusterID {
		return w, errors.Join(err, derr)
	}
	return n.overlay.Join(ctx, other, members.EncodeInfo(n.members.Self().Info))
}

func (n *Node) settle(cert []byte) error {
	n.state.Certificate, n.state.Name = cert, n.cfg.Name
	if n.renewed != nil {
		return n.rejoined()
	}
	return n.state.save(n.cfg.FS, n.cfg.Data, n.statePath())
}

// Stop ends Run. Only the first reason counts.
func (n *Node) Stop(why string) {
	n.stopOnce.Do(func() {
		n.why = why
		close(n.stopped)
	})
}

// ID of the node, Cluster it belongs to.
func (n *Node) ID() peer.ID     { return n.id }
func (n *Node) Cluster() string { return n.state.Cluster }

func (n *Node) nonce() uint64 {
	n.randMu.Lock()
	defer n.randMu.Unlock()
	for {
		if x := n.rand.Uint64(); x != 0 {
			return x
		}
	}
}

func (n *Node) paused() bool {
	_, ok := n.arbiter.Get(pausedKey)
	return ok
}

func or[T comparable](a, b T) T {
	var zero T
	if a != zero {
		return a
	}
	return b
}

// openControl builds the control API.
func (n *Node) openControl() error {
	token, err := api.EnsureToken(n.cfg.Data)
	if err != nil {
		return err
	}
	n.api, err = api.NewServer(api.Config{Control: &verbs{n}, Token: token, Log: n.log})
	return err
}

func (n *Node) openEvents(p peers.Peers) (err error) {
	n.events, err = events.Open(events.Config{
		Self: n.id, Name: n.cfg.Name, Boot: n.boot, DB: n.store.DB(), Peers: p, Caller: n.caller, Alive: n.aliveIDs,
		SyncEvery: facts.PaceOf(n.cfg.Profile).Events, Log: n.log,
	})
	return err
}
