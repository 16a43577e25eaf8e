package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/backup"
	"github.com/coppice-project/coppice/dht/blobs"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Export writes a component into a file: the registers of an application that has only it, of its instance and of its artifact, and the pages of both. Another
// cluster takes it in with coppice up --import.
func (v *verbs) Export(ctx context.Context, r *apiv1.ExportRequest, s *connect.ServerStream[apiv1.ExportChunk]) error {
	n, begin, what := v.n, time.Now(), "export "+r.GetComponent()
	if err := s.Send(&apiv1.ExportChunk{Kind: &apiv1.ExportChunk_State{State: "gathering the pages"}}); err != nil {
		return err
	}
	o, err := v.origin(ctx, "export", r.GetComponent(), r.GetAt())
	if err != nil {
		return err
	}
	if o.art.GetDigest() == components.ExecDigest {
		return api.Fail(connect.CodeFailedPrecondition, what, "its program is installed on the nodes: there is no artifact that the file could hold", "push the program, and deploy it with artifact")
	}
	app, name := o.app.GetName(), o.eff.Name
	if r.GetAs() != "" {
		if app, name, err = forkName(what, app, r.GetAs()); err != nil {
			return err
		}
	}
	e := &exporting{n: n, o: o, stream: s, sum: sha256.New()}
	if err := e.write(ctx, app, name); err != nil {
		return fail(what, err)
	}
	out := &apiv1.ExportSummary{
		Component: components.ComponentKey(app, name), From: o.instance, Id: o.entry.Name, Seq: o.entry.GetSeq(),
		Time: timestamppb.New(time.UnixMilli(int64(o.entry.GetUnixMs()))), Artifact: o.art.GetName(), Version: o.art.GetVersion(), Bytes: e.bytes,
		Sha256: hex.EncodeToString(e.sum.Sum(nil)), TookMs: ms(time.Since(begin)),
	}
	for _, p := range o.art.GetPlatforms() {
		out.Platforms = append(out.Platforms, p.GetOsArch())
	}
	return s.Send(&apiv1.ExportChunk{Kind: &apiv1.ExportChunk_Done{Done: out}})
}

// exporting is one file being written.
type exporting struct {
	n      *Node
	o      *origin
	stream *connect.ServerStream[apiv1.ExportChunk]
	sum    hash.Hash
	bytes  uint64
}

// Write sends the next bytes of the file.
func (e *exporting) Write(p []byte) (int, error) {
	if err := e.stream.Send(&apiv1.ExportChunk{Kind: &apiv1.ExportChunk_Data{Data: p}}); err != nil {
		return 0, err
	}
	e.sum.Write(p)
	e.bytes += uint64(len(p))
	return len(p), nil
}

func (e *exporting) write(ctx context.Context, app, name string) error {
	n, o := e.n, e.o
	roots := []blobs.Hash{blobs.Hash(o.entry.GetRoot())}
	h, err := blobs.ParseHash(o.art.GetRoot())
	if err != nil {
		return err
	}
	roots = append(roots, h)
	n.blobs.Pin(o.pin, forkPin, roots...)
	defer n.blobs.Unpin(o.pin)
	if err := n.blobs.Fetch(ctx, h, n.aliveIDs()); err != nil {
		return fmt.Errorf("the pages of %s@%s: %w", o.art.GetName(), o.art.GetVersion(), err)
	}
	defer n.keepPinned(ctx, o.pin, roots)()
	regs, err := o.registers(app, name)
	if err != nil {
		return err
	}
	head := &wirev1.BackupHeader{Cluster: n.state.Cluster, TakenUnixMs: o.entry.GetUnixMs(), TakenBy: n.cfg.Name, Version: n.cfg.Version}
	for _, r := range roots {
		head.Roots = append(head.Roots, r[:])
	}
	w, err := backup.NewComponentWriter(e, head)
	if err != nil {
		return err
	}
	for _, reg := range regs {
		if err := w.Register(reg); err != nil {
			return err
		}
	}
	if err := n.blobs.Export(ctx, roots, w.Node); err != nil {
		return err
	}
	return w.Close()
}

// registers are those of the file: an application with the component alone, its instance with the state, the artifact.
func (o *origin) registers(app, name string) ([]arbiter.Register, error) {
	next := o.into(nil, app, name)
	eff, err := components.EffectiveOf(next, name)
	if err != nil {
		return nil, err
	}
	instance := components.InstanceName(app, name, 0)
	body := components.FirstBody(components.InstanceSpec{Name: instance, Component: eff}, time.UnixMilli(int64(o.entry.GetUnixMs())))
	body.Trigger, body.Cause = "operator", fmt.Sprintf("imported: %s of %s", o.entry.Name, o.instance)
	art := proto.CloneOf(o.art)
	art.Description = nil
	var out []arbiter.Register
	for key, m := range map[string]proto.Message{
		components.ApplicationRegister(app): next, components.InstanceRegister(instance): body, components.ArtifactRegister(art.GetDigest()): art,
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			return nil, err
		}
		reg := arbiter.Register{Key: key, Body: b}
		if strings.HasPrefix(key, components.InstancePrefix) {
			reg.Seq, reg.Root = o.entry.GetSeq(), o.entry.GetRoot()
		}
		out = append(out, reg)
	}
	out = append(out, arbiter.Register{Key: components.ArtifactNameRegister(art.GetName(), art.GetVersion()), Body: []byte(art.GetDigest())})
	slices.SortFunc(out, func(a, b arbiter.Register) int { return strings.Compare(a.Key, b.Key) })
	return out, nil
}

// keepPinned renews a pin until it is stopped: a client may be slow.
func (n *Node) keepPinned(ctx context.Context, pin string, roots []blobs.Hash) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(forkPin / 10)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				n.blobs.Pin(pin, forkPin, roots...)
			}
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}

// exported is what a file holds.
type exported struct {
	head *wirev1.BackupHeader
	app  *componentsv1.Application
	name string
	body *componentsv1.InstanceBody
	root blobs.Hash
	art  *componentsv1.Artifact
	regs []arbiter.Register // of the artifact
}

// take notes a register of the file.
func (x *exported) take(reg arbiter.Register) error {
	var err error
	switch {
	case strings.HasPrefix(reg.Key, components.ApplicationPrefix):
		x.app = &componentsv1.Application{}
		err = proto.Unmarshal(reg.Body, x.app)
	case strings.HasPrefix(reg.Key, components.InstancePrefix):
		if x.body, err = bodyOf(reg); err == nil {
			x.root, err = blobs.ParseHash(reg.Root)
		}
	case strings.HasPrefix(reg.Key, components.ArtifactPrefix):
		x.art = &componentsv1.Artifact{}
		err = proto.Unmarshal(reg.Body, x.art)
		x.regs = append(x.regs, reg)
	case strings.HasPrefix(reg.Key, components.ArtifactNamePrefix):
		x.regs = append(x.regs, reg)
	}
	if err != nil {
		return fmt.Errorf("%w: register %s: %w", backup.ErrDamaged, reg.Key, err)
	}
	return nil
}

// whole says that everything is there that a component needs, and fits together.
func (x *exported) whole() error {
	list := x.app.GetManifest().GetComponents()
	if len(list) != 1 || len(x.app.GetPinned()) != 1 || x.body == nil || x.art == nil || len(x.regs) != 2 || x.root.IsZero() {
		return fmt.Errorf("%w: it does not hold one component with its state and its artifact", backup.ErrDamaged)
	}
	x.name = list[0].GetName()
	key := components.ComponentKey(x.app.GetName(), x.name)
	if x.body.GetComponent() != key || x.app.GetPinned()[0].GetDigest() != x.art.GetDigest() || x.app.GetName() == components.SystemApplication {
		return fmt.Errorf("%w: its parts are not of one component", backup.ErrDamaged)
	}
	if x.app.GetFormat() > components.ApplicationFormat || x.body.GetFormat() > components.InstanceFormat {
		return fmt.Errorf("%w: format %d of an application, this one knows %d", backup.ErrNewer, x.app.GetFormat(), components.ApplicationFormat)
	}
	if _, err := components.EffectiveOf(x.app, x.name); err != nil {
		return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
	}
	return nil
}
