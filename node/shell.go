package node

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/membrane"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// bindWithin bounds the telling of a component that a binding has changed.
const bindWithin = 5 * time.Second

// shell is the membrane of one instance of this node with its node socket, registered with the router.
type shell struct {
	n      *Node
	m      *membrane.Membrane
	socket *membrane.NodeSocket
	path   string
}

// newShell implements supervisor.ShellFactory.
func (n *Node) newShell(instance string, eff *components.Effective, hooks supervisor.Hooks) (supervisor.Shell, error) {
	cfg := membrane.Config{
		Instance: instance, Log: n.log, Serving: hooks.Serving,
		OnStale: func(membrane.Token) { hooks.Stale() },
		OnHung:  hooks.Hung,
	}
	if h := eff.Spec.GetHealth(); h != nil {
		cfg.HeartbeatEvery, cfg.HeartbeatTimeout, cfg.HeartbeatMisses = duration(h.GetEvery()), duration(h.GetTimeout()), int(h.GetMisses())
	}
	m := membrane.New(cfg)
	sum := sha256.Sum256([]byte(instance))
	s := &shell{n: n, m: m, path: filepath.Join(n.runDir(), hex.EncodeToString(sum[:4]), "n.sock")}
	var err error
	if s.socket, err = n.router.ServeNode(m, membrane.NodeSocketConfig{Path: s.path, Open: n.cfg.Door, Services: n.services(), Lease: hooks.Lease}); err != nil {
		return nil, err
	}
	n.router.Add(m)
	return s, nil
}

// duration reads a manifest's duration, which was checked when it was parsed.
func duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0
	}
	return d
}

func (s *shell) Membrane() *membrane.Membrane { return s.m }
func (s *shell) NodeSocket() string           { return s.path }

// Credential returns a new credential for the next process.
func (s *shell) Credential() string {
	b := make([]byte, 24)
	rand.Read(b) // never fails: crypto/rand ends the process instead
	c := hex.EncodeToString(b)
	s.socket.Allow(c)
	return c
}

// Forbid ends what Credential began.
func (s *shell) Forbid(credential string) { s.socket.Forbid(credential) }

// Bind sets the bindings of the manifest and, where it says nothing, those whose names agree with a component of the application.
func (s *shell) Bind(eff *components.Effective) error {
	ctx, cancel := context.WithTimeout(context.Background(), bindWithin)
	defer cancel()
	want, err := s.n.targets(ctx, eff)
	if err != nil {
		return err
	}
	for _, b := range s.m.Bindings() {
		if _, ok := want[b.Name]; !ok && len(b.Targets) > 0 {
			if err := s.m.Unbind(ctx, b.Name); err != nil {
				return err
			}
		}
	}
	for name, target := range want {
		if err := s.m.Bind(ctx, name, target); err != nil {
			return err
		}
	}
	return nil
}

// targets works out where the required interfaces of a component lead.
func (n *Node) targets(ctx context.Context, eff *components.Effective) (map[string]string, error) {
	want := map[string]string{}
	for name, target := range eff.Spec.GetBindings() {
		t, err := components.ParseTargetIn(eff.Application, target)
		if err != nil {
			return nil, fmt.Errorf("binding %s of %s: %w", name, eff.Key(), err)
		}
		want[name] = t.String()
	}
	if strings.HasPrefix(eff.Digest, supervisor.BuiltinPrefix) {
		return want, nil
	}
	desc, err := n.registry.Description(ctx, eff.Digest)
	if err != nil {
		return nil, err
	}
	app, ok := n.application(eff.Application)
	if !ok {
		return want, nil
	}
	for _, r := range desc.GetRequires() {
		unbound := app.GetOverlays()[eff.Name].GetBindings()
		if v, said := unbound[r.GetName()]; said && v == "" {
			continue
		}
		if _, ok := want[r.GetName()]; ok || r.GetKind() == componentv1.Kind_KIND_EVENT {
			continue
		}
		for _, c := range app.GetManifest().GetComponents() {
			if c.GetName() == r.GetName() {
				want[r.GetName()] = components.ComponentKey(eff.Application, c.GetName())
			}
		}
	}
	return want, nil
}

func (s *shell) Close() {
	s.n.router.Remove(s.m)
	if err := s.socket.Close(); err != nil {
		s.n.log.Warn("node socket", "instance", s.m.Instance(), "error", err)
	}
}

// services is what the node does for its components, within the rights of their application.
func (n *Node) services() membrane.NodeServices {
	return membrane.NodeServices{
		Publish: func(_ context.Context, instance string, ev *componentv1.Event) error {
			app, _, _ := strings.Cut(instance, "/")
			channel := ev.GetChannel()
			if !strings.HasPrefix(channel, "/") {
				channel = "/apps/" + instance + "/" + channel
			}
			if !strings.HasPrefix(channel, "/apps/"+app+"/") {
				return status.Errorf(codes.PermissionDenied, "publish to %s: a component of %s publishes below /apps/%s/", channel, app, app)
			}
			n.events.Publish(events.Event{Channel: channel, Type: ev.GetType(), Message: string(ev.GetPayload()), Fields: ev.GetHeaders()})
			return nil
		},
		Query: n.queryFor,
		Checkpoint: func(ctx context.Context, instance string, _ *componentv1.CheckpointRequest) (*componentv1.CheckpointReply, error) {
			saved, err := n.sup.Checkpoint(ctx, instance)
			if err != nil {
				return nil, status.Error(codes.FailedPrecondition, err.Error())
			}
			return &componentv1.CheckpointReply{Id: fmt.Sprintf("%d", saved.Seq), Mark: saved.Mark}, nil
		},
		Content: func(_ context.Context, instance string, r *componentv1.ContentRequest) (*componentv1.ContentReply, error) {
			if r.GetList() {
				return &componentv1.ContentReply{}, nil // no component of this version has sub-components
			}
			return nil, status.Errorf(codes.Unimplemented, "%s: this version has no composites", instance)
		},
		Report: func(_ context.Context, instance string, t *componentv1.Telemetry) error {
			if l := t.GetLog(); l != nil {
				n.log.Info(l.GetMessage(), "instance", instance, "level", l.GetLevel(), "fields", l.GetFields())
			}
			return nil
		},
	}
}

// runDir is where the sockets of this node's components lie: short, for unix socket paths are.
func (n *Node) runDir() string { return filepath.Join(runBase(), n.id.String()[len(n.id.String())-8:]) }
