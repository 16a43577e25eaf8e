package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/grpc"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/membrane"
	"github.com/coppice-project/coppice/node/api"
	"github.com/coppice-project/coppice/node/facts"
	"github.com/coppice-project/coppice/node/gateway"
	"github.com/coppice-project/coppice/placement"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
	"github.com/coppice-project/coppice/registry"
)

const (
	// aheadWithin bounds the checkpoints ahead of a stop, while calls go on: they make what is left to save, when calls are held, small. saveWithin bounds the
	// rest: calls held, those under way answered, the last changes committed. Service managers wait longer than both.
	aheadWithin = 2 * time.Second
	saveWithin  = 5 * time.Second
	// goodbyeWithin bounds the parting words of a planned end.
	goodbyeWithin = time.Second
	// httpHeaders bounds how long a peer may take for the headers of a request.
	httpHeaders = 10 * time.Second
)

// openPlatform builds what runs components on top of the overlay.
func (n *Node) openPlatform() (err error) {
	p := n.overlay.Peers()
	n.links = newLinks(p)
	if n.runner, err = n.newRunner(); err != nil {
		return err
	}
	if n.registry, err = registry.New(registry.Config{
		Self: n.id, Cache: filepath.Join(n.cfg.Data, "cache"), Drop: n.cfg.Plugins, Blobs: n.blobs, Arbiter: n.arbiter, Holders: n.holdersOf, Alive: n.aliveIDs,
		Describe: n.describe, Nonce: n.nonce, Notify: n.registryNotice, Log: n.log,
	}); err != nil {
		return err
	}
	if err := privateDir(n.runDir()); err != nil {
		return err
	}
	n.direct = newDirectory(n)
	n.router = membrane.NewRouter(membrane.RouterConfig{
		Self: n.id.String(), Caller: fmt.Sprintf("%s.%016x", n.id, n.boot), Directory: n.direct, Peers: n.links, Log: n.log,
	})
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("own executable: %w", err)
	}
	n.sup = supervisor.New(supervisor.Config{
		Self: n.id, Name: n.cfg.Name, Boot: n.boot, Arbiter: n.arbiter, Members: n.members, Blobs: n.blobs, Artifacts: n.artifacts(), Runner: n.runner, Peers: p, Caller: n.caller,
		Events: n.events, Shell: n.newShell, RunDir: n.runDir(), LogDir: n.logDir(), DataDir: filepath.Join(n.cfg.Data, "components"), Log: n.log,
		Now: n.clusterNow, Profile: n.cfg.Profile, BootTime: n.cfg.BootTime, Touch: n.arbiter.HeardLeader, Changed: n.changedInstances,
		Copies: n.cfg.Copies, CopyAcks: n.cfg.CopyAcks,
		Adopted: func(reg arbiter.Register) {
			if name := components.InstanceOfKey(reg.Key); name != "" {
				n.direct.tell(componentOf(name))
			}
		},
		Builtins: builtins(exe),
	})
	n.blobs.SetOnAcked(n.sup.OnAcked)
	n.blobs.SetLive(n.liveRoots)
	peers.ServeCalls(p, protoMoveAway, func() *componentsv1.MoveAwayRequest { return &componentsv1.MoveAwayRequest{} }, n.moveAway)
	peers.ServeCalls(p, protoSurvey, func() *componentsv1.SurveyRequest { return &componentsv1.SurveyRequest{} }, n.serveSurvey)
	peers.ServeCalls(p, protoReplay, func() *placementv1.ReplayRequest { return &placementv1.ReplayRequest{} }, n.serveReplay)
	c := coordinator{n}
	if n.coord, err = placement.New(placement.Config{Leader: c, Facts: c, Proposer: c, Solver: c, Recorder: c, Interval: facts.PaceOf(n.cfg.Profile).Rounds, FactsLast: facts.PaceOf(n.cfg.Profile).Reports, Log: n.log}); err != nil {
		return err
	}
	return n.registerTables()
}

func (n *Node) newRunner() (runner.Runner, error) {
	if n.cfg.NewRunner != nil {
		return n.cfg.NewRunner()
	}
	return runner.New(runner.Config{Log: n.log})
}

// describer is a runner that can ask a file itself.
type describer interface {
	Describe(ctx context.Context, exec runner.ExecFile, limits runner.Limits) (*componentv1.Description, error)
}

// describe runs a file in the sandbox and asks it what it is.
func (n *Node) describe(ctx context.Context, f *os.File) (*componentv1.Description, error) {
	ask := runner.Describe
	if own, ok := n.runner.(describer); ok {
		ask = own.Describe
	}
	desc, err := ask(ctx, runner.ExecFile{File: f, Path: filepath.Base(f.Name())}, runner.Limits{})
	if errors.Is(err, runner.ErrNoHandshake) {
		return nil, fmt.Errorf("%w: %w", registry.ErrNoHandshake, err)
	}
	return desc, err
}

func (n *Node) registryNotice(x registry.Notice) {
	ev := events.Event{Channel: "/registry/" + n.cfg.Name, Type: x.Type, Cause: x.Reason, Message: x.Artifact + " " + x.Type, Fields: map[string]string{"artifact": x.Artifact, "digest": x.Digest}}
	if x.Took > 0 {
		ev.Fields["took_ms"] = fmt.Sprint(x.Took.Milliseconds())
	}
	n.events.Publish(ev)
}

func (n *Node) holdersOf(key string, count int) []peer.ID {
	var out []peer.ID
	for _, m := range n.members.Closest(key, count, holds) {
		out = append(out, m.ID)
	}
	return out
}

func (n *Node) changedInstances() {
	select {
	case n.instancesChanged <- struct{}{}:
	default:
	}
}

// Ready is what a node says once it serves.
type Ready struct {
	Node, ID, Cluster, API, HTTP string
	New                          bool   // it founded the cluster
	Token                        string // for others, of a new cluster
}

// Run serves until ctx ends or Stop is called, then ends everything. ready is called once, when the node serves.
func (n *Node) Run(ctx context.Context, ready func(Ready) error) error {
	told := ctx
	// The parts go on until shutdown ends them: what runs is saved first, and the others are told, for which they are needed.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	// On a goroutine of its own, as New: the database may end it.
	ended := make(chan error, 1)
	go func() { ended <- n.run(ctx, told, cancel, ready) }()
	select {
	case err := <-ended:
		return err
	case err := <-n.broken:
		return n.abandon(err, cancel)
	}
}

func (n *Node) run(ctx, told context.Context, cancel context.CancelFunc, ready func(Ready) error) error {
	parts := map[string]func(context.Context) error{
		"members": n.members.Run, "arbiter": n.arbiter.Run, "blobs": n.blobs.Run, "records": n.records.Run, "events": n.events.Run,
		"registry": n.registry.Run, "artifact copies": n.registry.Repair, "supervisor": n.sup.Run, "placement": n.coord.Run, "coordinator": n.followOffice, "reports": n.report, "checkpoint index": n.indexCheckpoints, "mirrors": n.keepMirrors,
	}
	defer n.watch()()
	failed := make(chan error, len(parts))
	for name, run := range parts {
		n.goes.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				failed <- fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	err := n.serve(ctx, told, ready)
	if err == nil {
		select {
		case <-told.Done():
			n.Stop(whyTold)
		case <-n.stopped:
		case err = <-failed:
			if errors.Is(err, arbiter.ErrRolledBack) {
				err = n.renew(ctx, err)
			}
			n.log.Error("a part of the node failed: the node ends", "error", err)
		}
	}
	return errors.Join(err, n.shutdown(cancel))
}

// abandonWithin bounds the end of a node whose database failed. Others take over what it ran as soon as its connections are gone.
const abandonWithin = 2 * time.Second

// abandon ends a node whose database failed. Whatever waits for the database waits for ever, so it is not waited for: the process is to end.
func (n *Node) abandon(why error, cancel context.CancelFunc) error {
	n.log.Error("the node ends", "error", why)
	cancel()
	ended := make(chan error, 1)
	go func() { ended <- n.overlay.Close() }() // first of all: the others see it gone
	select {
	case err := <-ended:
		return errors.Join(why, err)
	case <-time.After(abandonWithin):
		return why
	}
}

// serve opens the doors and says that they are open. It gives up when the node is told to stop.
func (n *Node) serve(ctx, told context.Context, ready func(Ready) error) error {
	founds := n.fresh && n.cfg.Join == "" || n.state.Restored
	if founds {
		fctx, cancel := context.WithTimeout(told, 30*time.Second)
		err := n.found(fctx)
		cancel()
		if err != nil {
			return fmt.Errorf("found the cluster: %w", err)
		}
	}
	n.unpause(ctx)
	n.announceRenewal(ctx)
	n.servePeers()
	r := Ready{Node: n.cfg.Name, ID: n.id.String(), Cluster: n.state.Cluster, New: founds}
	var err error
	if r.API, err = n.serveAPI(ctx); err != nil {
		return err
	}
	if n.cfg.HTTP != "" {
		if r.HTTP, err = n.serveHTTP(ctx); err != nil {
			return err
		}
	}
	if n.cfg.Import != nil {
		ictx, stop := context.WithCancel(ctx)
		defer context.AfterFunc(told, stop)()
		if err := n.takeIn(ictx, n.cfg.Import); err != nil {
			return fmt.Errorf("import: %w", err)
		}
	}
	if r.New {
		if r.Token, _, err = n.newToken(ctx, 0, 0); err != nil {
			return err
		}
	}
	n.events.Publish(events.Event{Channel: "/nodes/" + n.cfg.Name, Type: "up", Message: n.cfg.Name + " is up"})
	n.log.Info("ready", "node", r.Node, "id", r.ID, "cluster", r.Cluster)
	if ready != nil {
		return ready(r)
	}
	return nil
}

// unpause resumes a cluster that was put down as a whole: the start of a node says that it is wanted again. What is committed later
// stays.
func (n *Node) unpause(ctx context.Context) {
	n.goes.Go(func() {
		var err error
		seen := n.waitFor(ctx, 5*time.Minute, func() bool {
			sctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			err = n.arbiter.Sync(sctx)
			return err == nil
		})
		if !seen || !n.paused() {
			return
		}
		tctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		_, err = n.arbiter.Txn(tctx, arbiter.TxnRequest{Nonce: n.nonce(), Then: []arbiter.Op{{Delete: pausedKey}}})
		n.faults.set("resume the cluster", err)
	})
}

// servePeers opens what other nodes call: gates, http interfaces, forwarded commands.
func (n *Node) servePeers() {
	p := n.overlay.Peers()
	gs := membrane.NewServer(n.router.PeerHandler())
	n.background("calls of other nodes", func() error { return gs.Serve(peers.Listener(p, protoCall)) }, func() { gs.Stop() }, grpc.ErrServerStopped)
	web := &http.Server{Handler: n.router.PeerHTTP(), ReadHeaderTimeout: httpHeaders}
	n.background("http of other nodes", func() error { return web.Serve(peers.Listener(p, protoHTTP)) }, func() { web.Close() }, http.ErrServerClosed)
	ctl := &http.Server{
		ReadHeaderTimeout: httpHeaders,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, c.RemoteAddr())
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			addr, _ := r.Context().Value(peerKey{}).(net.Addr)
			id, ok := peers.PeerOf(addr)
			if !ok {
				http.Error(w, "who are you?", http.StatusForbidden)
				return
			}
			n.api.PeerHandler(id.String()).ServeHTTP(w, r)
		}),
	}
	n.background("commands of other nodes", func() error { return ctl.Serve(peers.Listener(p, protoAPI)) }, func() { ctl.Close() }, http.ErrServerClosed)
}

type peerKey struct{}

// background runs a server until the node stops. over is what it returns then.
func (n *Node) background(what string, serve func() error, stop func(), over error) {
	n.goes.Go(func() {
		if err := serve(); err != nil && !errors.Is(err, over) && !errors.Is(err, net.ErrClosed) {
			select {
			case <-n.stopped:
			default:
				n.faults.set(what, err)
			}
		}
	})
	n.stops = append(n.stops, stop)
}

func (n *Node) serveAPI(ctx context.Context) (string, error) {
	ln, addr, err := n.listenAPI()
	if err != nil {
		return "", err
	}
	n.goes.Go(func() {
		if err := api.Serve(ctx, ln, n.api.Handler(), n.log); err != nil && ctx.Err() == nil {
			n.faults.set("control api", err)
		}
	})
	return addr, nil
}

func (n *Node) listenAPI() (net.Listener, string, error) {
	if n.cfg.Door == nil {
		return api.Listen(n.cfg.Data, n.cfg.API)
	}
	path := filepath.Join(n.cfg.Data, api.SocketFile)
	ln, err := n.cfg.Door(path)
	return ln, "unix://" + path, err
}

func (n *Node) serveHTTP(ctx context.Context) (string, error) {
	h, err := gateway.New(gateway.Config{Apps: webApps{n}, API: n.api.Handler(), Metrics: n.metrics(), Health: n.healthy, Log: n.log})
	if err != nil {
		return "", err
	}
	ln, err := net.Listen("tcp", n.cfg.HTTP)
	if err != nil {
		return "", fmt.Errorf("http %s: %w; try another --http address", n.cfg.HTTP, err)
	}
	n.goes.Go(func() {
		if err := api.Serve(ctx, ln, h, n.log); err != nil && ctx.Err() == nil {
			n.faults.set("http", err)
		}
	})
	return "http://" + ln.Addr().String(), nil
}

// healthy says whether the node is of use: nil yes.
func (n *Node) healthy(context.Context) error {
	if age := n.arbiter.HeardLeader(); age < 0 || age > 10*time.Second {
		return errors.New("the arbiter is out of reach")
	}
	return nil
}

// watch connects the parts that follow each other's changes.
func (n *Node) watch() (stop func()) {
	a := n.arbiter.Watch(func(old, now *arbiter.Register) {
		reg := now
		if reg == nil {
			reg = old
		}
		switch {
		case strings.HasPrefix(reg.Key, memberPrefix) && now != nil:
			n.memberChanged(now)
		case strings.HasPrefix(reg.Key, components.InstancePrefix):
			name := components.InstanceOfKey(reg.Key)
			n.direct.tell(componentOf(name))
			if ownershipChanged(old, now) {
				n.coord.Trigger()
			}
		case strings.HasPrefix(reg.Key, components.ApplicationPrefix):
			n.coord.Trigger()
		}
	})
	for _, reg := range n.arbiter.List(memberPrefix) {
		n.memberChanged(&reg)
	}
	m := n.members.Subscribe(func(c members.Change) {
		n.links.memberChanged(c)
		if c.New.State.Running() {
			n.include(c.New.ID)
		} else {
			n.overlay.Kad().Evict(c.New.ID)
			n.blobs.PeerDown(c.New.ID)
		}
		if c.Old.State != c.New.State || c.Old.Draining != c.New.Draining || c.Old.Boot != c.New.Boot {
			n.coord.Trigger()
			n.memberEvent(c)
		}
	})
	return func() { a(); m() }
}

func ownershipChanged(old, now *arbiter.Register) bool {
	return old == nil || now == nil || old.Epoch != now.Epoch || old.Revision != now.Revision
}

// memberEvent tells what this node saw happen to another, unless many see it: the closest alive node speaks.
func (n *Node) memberEvent(c members.Change) {
	if c.Old.State == c.New.State && c.Old.Boot == c.New.Boot || c.New.ID == n.id {
		return
	}
	if c.Old.ID == "" && !c.New.State.Running() {
		return // remembered from an earlier run of this node, not seen to die
	}
	first := n.members.Closest("/nodes/"+c.New.ID.String(), 1, func(m members.Member) bool { return m.State == members.Alive && m.ID != c.New.ID })
	if len(first) == 0 || first[0].ID != n.id {
		return
	}
	n.events.Publish(events.Event{
		Channel: "/nodes/" + c.New.Name, Type: c.New.State.String(), Cause: c.New.Evidence, Trigger: "neighbour", Message: c.New.Name + " is " + c.New.State.String(),
	})
}

// privateDir makes a folder that only this user can enter, and refuses one that somebody else made.
func privateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("runtime folder: %w", err)
	}
	for at := dir; at != filepath.Dir(runBase()) && len(at) > 1; at = filepath.Dir(at) {
		st, err := os.Lstat(at)
		if err != nil {
			return fmt.Errorf("runtime folder: %w", err)
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !st.IsDir() || (ok && int(sys.Uid) != os.Getuid()) || st.Mode().Perm()&0o022 != 0 {
			return fmt.Errorf("runtime folder %s belongs to somebody else or others may write there; remove it, or set XDG_RUNTIME_DIR", at)
		}
	}
	return nil
}
