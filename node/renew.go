package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"

	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// A data folder that went back in time, or that is a copy of another node's, must not be used under its identity: votes and acknowledgements that were
// given under it could be undone, or given twice. The node gets a new one by itself. While it still is the old member it has another member make a join
// token, and writes down what is to be done (renewalName); its next start puts everything that the folder holds aside, into lost+found, and joins by that
// token. A crash between two steps repeats the rest. What is put aside is never deleted here.

const (
	renewalName   = "renewal.json"
	renewalFormat = 1
	lostFoundName = "lost+found"
	// renewWithin bounds the asking for a token, renewAttempt one member's answer, and renewalTTL how long the token admits.
	renewWithin  = 15 * time.Second
	renewAttempt = 3 * time.Second
	renewalTTL   = time.Hour
	// answersWithin bounds the look for another process with this node's identity. Where its addresses are its own the answer comes at once.
	answersWithin = time.Second
)

// errCloned says that another process goes by the identity that lies in the data folder.
var errCloned = errors.New("another node runs with the identity of this data folder: it is a copy of that node's")

// renewal is what a node that must not go on under its identity leaves for its next start.
type renewal struct {
	Format  int    `json:"format"`
	Cluster string `json:"cluster"`
	Was     string `json:"was"` // peer id
	Why     string `json:"why"`
	Cloned  bool   `json:"cloned"` // the old identity is another node's, and stays a member
	Aside   string `json:"aside"`  // folder, below the data folder
	Join    string `json:"join"`
	At      int64  `json:"at"` // Unix seconds, by this machine's clock: for people
}

// RenewError says that the node must not go on under its identity, and that all is prepared for another one: New with the same configuration joins as a
// new node, with what the data folder held put aside.
type RenewError struct {
	Was   peer.ID
	Aside string // where the old data will lie
	Why   error
}

func (e *RenewError) Error() string {
	return fmt.Sprintf("%v; this node gets a new identity, and what it held as %s is put aside in %s", e.Why, e.Was, e.Aside)
}

// Unwrap returns why.
func (e *RenewError) Unwrap() error { return e.Why }

// renew prepares a new identity. It returns a *RenewError, or an error that says why it could not and what to do.
func (n *Node) renew(ctx context.Context, why error) error {
	cloned := errors.Is(why, errCloned)
	if !cloned {
		at, err := n.elsewhere(ctx)
		if err != nil {
			return errors.Join(why, err)
		}
		if cloned = at != ""; cloned {
			why = fmt.Errorf("%w (it answers at %s); %w", errCloned, at, why)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, renewWithin)
	defer cancel()
	token, err := n.successorToken(ctx)
	if err != nil && n.cfg.Join == "" {
		return fmt.Errorf("%w; nothing was changed: a new identity needs a join token, and no member gave one (%w): try again when another node is up, "+
			"or coppice token there, and coppice up --join TOKEN here", why, err)
	}
	now := time.Now()
	r := renewal{
		Cluster: n.state.Cluster, Was: n.id.String(), Why: why.Error(), Cloned: cloned, Join: token, At: now.Unix(),
		Aside: filepath.Join(lostFoundName, fmt.Sprintf("%s-%s", n.id.String()[max(0, len(n.id.String())-8):], now.UTC().Format("20060102T150405Z"))),
	}
	if err := r.save(n.cfg.FS, n.cfg.Data); err != nil {
		return errors.Join(why, fmt.Errorf("prepare a new identity: %w", err))
	}
	return &RenewError{Was: n.id, Aside: filepath.Join(n.cfg.Data, r.Aside), Why: why}
}

// successorToken has a member make a token for this node's next identity.
func (n *Node) successorToken(ctx context.Context) (string, error) {
	last := errors.New("this node knows no other member")
	for ctx.Err() == nil {
		asked := false
		for _, m := range n.members.All() {
			if m.ID == n.id || m.State == members.Left || !n.members.IsMember(m.ID) {
				continue
			}
			asked = true
			actx, cancel := context.WithTimeout(ctx, renewAttempt)
			res, err := api.NewPeerClient(n, m.ID.String(), 1).Token(actx, &apiv1.TokenRequest{TtlMs: uint64(renewalTTL.Milliseconds()), Uses: 1})
			cancel()
			if err == nil {
				return res.GetToken(), nil
			}
			last = fmt.Errorf("%s: %w", m.Name, err)
		}
		if !asked {
			return "", last
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return "", last
}

// elsewhere returns the address at which another process answers with this node's identity; "": none does.
func (n *Node) elsewhere(ctx context.Context) (string, error) {
	known, err := dht.ParseAddrs(n.state.Addrs)
	if err != nil {
		return "", fmt.Errorf("addresses of this node: %w", err)
	}
	if n.overlay != nil { // this process listens
		own, err := n.overlay.Host().Network().InterfaceListenAddresses()
		if err != nil {
			return "", fmt.Errorf("addresses of this node: %w", err)
		}
		told, err := dht.ParseAddrs(n.overlay.Addrs())
		if err != nil {
			return "", fmt.Errorf("addresses of this node: %w", err)
		}
		own = append(own, told...)
		known = slices.DeleteFunc(known, func(a ma.Multiaddr) bool { return slices.ContainsFunc(own, a.Equal) })
	}
	if len(known) == 0 {
		return "", nil
	}
	ctx, cancel := context.WithTimeout(ctx, answersWithin)
	defer cancel()
	at, err := dht.Answers(ctx, n.id, known)
	if err != nil || at == nil {
		return "", err
	}
	return at.String(), nil
}

// rememberAddrs keeps where others reach this node: a copy of the data folder looks there whether this node runs.
func (n *Node) rememberAddrs() error {
	now := n.overlay.Addrs()
	if n.state.Certificate == nil || slices.Equal(now, n.state.Addrs) {
		n.state.Addrs = now
		return nil // not a member yet: it is saved when it is one
	}
	n.state.Addrs = now
	return n.state.save(n.cfg.FS, n.cfg.Data, n.statePath())
}

// putAside is the first step of a start: a renewal that was prepared is carried out. Repeated after a crash it goes on.
func (n *Node) putAside() error {
	r, err := loadRenewal(n.cfg.FS, n.cfg.Data)
	if err != nil || r == nil {
		return err
	}
	fs, dir := n.cfg.FS, n.cfg.Data
	to := fs.PathJoin(dir, r.Aside)
	if err := store.MkdirAll(fs, to); err != nil {
		return fmt.Errorf("put the old data aside: %w", err)
	}
	names, err := fs.List(dir)
	if err != nil {
		return fmt.Errorf("put the old data aside: %w", err)
	}
	for _, name := range names {
		if !r.aside(fs, dir, name) {
			continue
		}
		if err := fs.Rename(fs.PathJoin(dir, name), fs.PathJoin(to, name)); err != nil {
			return fmt.Errorf("put the old data aside: %w", err)
		}
	}
	if err := errors.Join(store.SyncDir(fs, to), store.SyncDir(fs, dir)); err != nil {
		return fmt.Errorf("put the old data aside: %w", err)
	}
	n.renewed, n.otherJoin = r, n.cfg.Join
	if r.Join != "" {
		n.cfg.Join = r.Join
	}
	n.log.Warn("this node joins with a new identity", "why", r.Why, "was", r.Was, "old_data", to)
	return nil
}

// aside says whether a name of the data folder goes: all but the drop folder and the artifacts, which are no node's. What was made since by a start that was
// cut off stays: it is the new identity's.
func (r *renewal) aside(fs vfs.FS, dir, name string) bool {
	if slices.Contains([]string{lostFoundName, renewalName, renewalName + ".new", "plugins", "cache"}, name) || strings.HasSuffix(name, ".sock") {
		return false
	}
	_, err := fs.Stat(fs.PathJoin(dir, r.Aside, name))
	return errors.Is(err, os.ErrNotExist)
}

// rejoined makes the new identity what the folder is about: the renewal is over.
func (n *Node) rejoined() error {
	r := n.renewed
	n.state.Was, n.state.WasWhy, n.state.Aside, n.state.Expel = r.Was, r.Why, r.Aside, !r.Cloned
	if err := n.state.save(n.cfg.FS, n.cfg.Data, n.statePath()); err != nil {
		return err
	}
	if err := n.cfg.FS.Remove(n.cfg.FS.PathJoin(n.cfg.Data, renewalName)); err != nil {
		return fmt.Errorf("end the renewal of the identity: %w", err)
	}
	return store.SyncDir(n.cfg.FS, n.cfg.Data)
}

// announceRenewal tells what has become of the old identity, and has it expelled: nothing may come back under it.
func (n *Node) announceRenewal(ctx context.Context) {
	if n.renewed != nil {
		n.events.Publish(events.Event{
			Channel: "/nodes/" + n.cfg.Name, Type: "renewed", Cause: n.state.WasWhy,
			Message: fmt.Sprintf("%s has a new identity; what it held as %s is in %s", n.cfg.Name, n.state.Was, n.asideFolder()),
			Fields:  map[string]string{"was": n.state.Was, "id": n.id.String(), "file": n.asideFolder()},
		})
	}
	if !n.state.Expel {
		return
	}
	n.goes.Go(func() {
		for {
			err := n.expelOld(ctx)
			n.faults.set("expel the old identity of this node", err)
			if err == nil {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
	})
}

// expelOld has the old identity be no member any more.
func (n *Node) expelOld(ctx context.Context) error {
	was, err := peer.Decode(n.state.Was)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, renewWithin)
	defer cancel()
	if err := n.expel(ctx, was, "it is "+n.cfg.Name+" now, as "+n.id.String()+": "+n.state.WasWhy); err != nil && !errors.Is(err, errNoRegister) {
		return err
	}
	n.state.Expel = false
	return n.state.save(n.cfg.FS, n.cfg.Data, n.statePath())
}

// asideFolder is where the data of this node's old identity lies.
func (n *Node) asideFolder() string { return filepath.Join(n.cfg.Data, n.state.Aside) }

// renewedWarning tells of an old identity for as long as its data lies aside; "": there is nothing to tell.
func (n *Node) renewedWarning() string {
	if n.state.Aside == "" {
		return ""
	}
	if _, err := n.cfg.FS.Stat(n.asideFolder()); err != nil {
		return ""
	}
	return fmt.Sprintf("this node got a new identity (%s); what it held as %s is in %s: remove that when nothing of it is needed", n.state.WasWhy, n.state.Was, n.asideFolder())
}

func loadRenewal(fs vfs.FS, dir string) (*renewal, error) {
	path := fs.PathJoin(dir, renewalName)
	f, err := fs.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	b, err := io.ReadAll(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	var r renewal
	if err := json.Unmarshal(b, &r); err != nil || r.Format != renewalFormat || r.Aside == "" {
		return nil, fmt.Errorf("%s cannot be used (format %d, %v): put the data folder aside and join with an empty one", path, r.Format, err)
	}
	return &r, nil
}

func (r renewal) save(fs vfs.FS, dir string) error {
	r.Format = renewalFormat
	return writeJSON(fs, dir, fs.PathJoin(dir, renewalName), r)
}
