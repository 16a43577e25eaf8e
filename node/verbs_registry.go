package node

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/registry"
)

func (v *verbs) RegistryPush(ctx context.Context, s *connect.ClientStream[apiv1.RegistryPushRequest]) (*apiv1.RegistryPushResponse, error) {
	begin, n := time.Now(), v.n
	const what = "push"
	files, header, err := n.receive(s)
	defer func() {
		for _, f := range files {
			f.Close() // only read from here on
		}
		if len(files) > 0 {
			if err := os.RemoveAll(filepath.Dir(filepath.Dir(files[0].Name()))); err != nil {
				n.log.Warn("remove pushed files", "error", err)
			}
		}
	}()
	if err != nil {
		return nil, fail(what, err)
	}
	art, existed, err := n.registry.Push(ctx, registry.PushRequest{Name: header.GetName(), Version: header.GetVersion(), Files: files})
	if err != nil {
		var push *registry.PushError
		if errors.As(err, &push) {
			return nil, api.Fail(connect.CodeInvalidArgument, what+" "+push.Artifact, push.Why, push.Try)
		}
		return nil, fail(what, err)
	}
	// The answer comes once this node lists it, so that a deploy that follows finds it.
	n.waitFor(ctx, 5*time.Second, func() bool { _, ok := n.registry.Artifact(art.GetDigest()); return ok })
	a := n.artifact(art)
	return &apiv1.RegistryPushResponse{
		Name: a.GetName(), Version: a.GetVersion(), Digest: a.GetDigest(), Platforms: a.GetPlatforms(), Bytes: a.GetBytes(), Kind: a.GetKind(), Holders: a.GetHolders(),
		Existed: existed, TookMs: ms(time.Since(begin)),
	}, nil
}

// receive writes what a push sends to files of its own and checks the digests the client gave.
func (n *Node) receive(s *connect.ClientStream[apiv1.RegistryPushRequest]) ([]*os.File, *apiv1.RegistryPushHeader, error) {
	if !s.Receive() {
		return nil, nil, errors.Join(errors.New("nothing was sent"), s.Err())
	}
	header := s.Msg().GetHeader()
	if header == nil || len(header.GetFiles()) == 0 || len(header.GetFiles()) > registry.MaxFiles {
		return nil, nil, api.Fail(connect.CodeInvalidArgument, "push", fmt.Sprintf("the first message must name 1 to %d files", registry.MaxFiles), "")
	}
	dir, err := os.MkdirTemp(n.cfg.Data, "push-")
	if err != nil {
		return nil, nil, err
	}
	var files []*os.File
	var sums []hash.Hash
	left := make([]uint64, len(header.GetFiles()))
	for i, f := range header.GetFiles() {
		name := filepath.Base(f.GetName())
		if name == "." || name == "/" || name == "" || f.GetBytes() > registry.MaxFile {
			return files, nil, api.Fail(connect.CodeInvalidArgument, "push "+f.GetName(), fmt.Sprintf("%d bytes; the most is %d", f.GetBytes(), int64(registry.MaxFile)), "")
		}
		sub := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(sub, 0o700); err != nil {
			return files, nil, err
		}
		w, err := os.OpenFile(filepath.Join(sub, name), os.O_CREATE|os.O_RDWR|os.O_EXCL, 0o700)
		if err != nil {
			return files, nil, err
		}
		files, sums, left[i] = append(files, w), append(sums, sha256.New()), f.GetBytes()
	}
	for s.Receive() {
		c := s.Msg().GetChunk()
		i := int(c.GetFile())
		if c == nil || i >= len(files) || uint64(len(c.GetData())) > left[i] {
			return files, nil, api.Fail(connect.CodeInvalidArgument, "push", "more bytes came than the header said", "")
		}
		if _, err := files[i].Write(c.GetData()); err != nil {
			return files, nil, err
		}
		if _, err := sums[i].Write(c.GetData()); err != nil {
			return files, nil, err
		}
		left[i] -= uint64(len(c.GetData()))
	}
	if err := s.Err(); err != nil {
		return files, nil, err
	}
	for i, f := range header.GetFiles() {
		if left[i] > 0 {
			return files, nil, api.Fail(connect.CodeInvalidArgument, "push "+f.GetName(), fmt.Sprintf("%d bytes are missing", left[i]), "push it again")
		}
		if got := hex.EncodeToString(sums[i].Sum(nil)); f.GetSha256() != "" && got != f.GetSha256() {
			return files, nil, api.Fail(connect.CodeInvalidArgument, "push "+f.GetName(), fmt.Sprintf("its bytes are %s on arrival, not %s", got, f.GetSha256()), "push it again")
		}
	}
	return files, header, readOnly(files)
}

// readOnly opens files anew for reading: what is open for writing cannot be executed.
func readOnly(files []*os.File) error {
	for i, w := range files {
		r, err := os.Open(w.Name())
		if err != nil {
			return err
		}
		files[i] = r
		if err := w.Close(); err != nil {
			return err
		}
	}
	return nil
}

func (v *verbs) RegistryList(ctx context.Context, _ *apiv1.RegistryListRequest) (*apiv1.RegistryListResponse, error) {
	n := v.n
	out := &apiv1.RegistryListResponse{}
	for _, art := range n.registry.List() {
		out.Artifacts = append(out.Artifacts, n.artifact(art))
	}
	for node, drops := range n.allDrops(ctx) {
		for _, d := range drops {
			if d.State == "ready" {
				continue
			}
			state := d.State
			if state == "waiting" {
				state = "describing"
			}
			out.Artifacts = append(out.Artifacts, &apiv1.Artifact{State: state, Reason: d.Reason, File: d.File, Node: node})
		}
	}
	slices.SortStableFunc(out.Artifacts, func(a, b *apiv1.Artifact) int {
		return cmp.Or(cmp.Compare(a.GetName(), b.GetName()), cmp.Compare(a.GetFile(), b.GetFile()), cmp.Compare(a.GetNode(), b.GetNode()))
	})
	return out, nil
}

// dropReport is what a node tells about its drop folder, where something in it is not ready.
type dropReport struct {
	File   string `json:"file"`
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
}

func (n *Node) tellDrops(ctx context.Context) error {
	list := []dropReport{}
	for _, d := range n.registry.Drops() {
		if d.State != "ready" && len(list) < 32 {
			list = append(list, dropReport{d.File, d.State, shorten(d.Reason, 300)})
		}
	}
	b, err := json.Marshal(list)
	if err != nil || string(b) == n.toldDrops || (len(list) == 0 && n.toldDrops == "") {
		return err
	}
	if err := n.tell(ctx, factsPrefix+n.id.String()+"/drops", b); err != nil {
		return err
	}
	n.toldDrops = string(b)
	return nil
}

// allDrops lists what lies in the drop folders of all nodes and is not ready, by node.
func (n *Node) allDrops(ctx context.Context) map[string][]dropReport {
	out := map[string][]dropReport{}
	for _, rec := range n.factRecords(ctx) {
		rest := strings.TrimPrefix(rec.Key, factsPrefix)
		id, what, _ := strings.Cut(rest, "/")
		p, err := peer.Decode(id)
		if err != nil || what != "drops" || p == n.id {
			continue
		}
		var list []dropReport
		if err := json.Unmarshal(rec.Value, &list); err == nil {
			out[n.nameOf(p)] = list
		}
	}
	for _, d := range n.registry.Drops() {
		out[n.cfg.Name] = append(out[n.cfg.Name], dropReport{d.File, d.State, d.Reason})
	}
	return out
}

func (v *verbs) RegistryShow(ctx context.Context, r *apiv1.RegistryShowRequest) (*apiv1.RegistryShowResponse, error) {
	n := v.n
	name, version, _ := strings.Cut(r.GetArtifact(), "@")
	out := &apiv1.RegistryShowResponse{}
	for _, art := range n.registry.List() {
		if art.GetDigest() != r.GetArtifact() && (art.GetName() != name || (version != "" && art.GetVersion() != version)) {
			continue
		}
		a := n.artifact(art)
		desc, err := n.registry.Description(ctx, art.GetDigest())
		if err != nil {
			a.Reason = err.Error()
		} else if desc != nil {
			describe(a, desc)
		}
		out.Artifacts = append(out.Artifacts, a)
	}
	if len(out.Artifacts) == 0 {
		return nil, api.Fail(connect.CodeNotFound, "show "+r.GetArtifact(), "there is no such artifact", "coppice registry list")
	}
	slices.Reverse(out.Artifacts)
	return out, nil
}

func describe(a *apiv1.Artifact, desc *componentv1.Description) {
	a.Type, a.Features, a.Stateful = desc.GetType(), desc.GetFeatures(), desc.GetState().GetStateful()
	a.Provides, a.Requires = interfacesOf(desc.GetProvides(), nil), interfacesOf(desc.GetRequires(), nil)
	for _, at := range desc.GetAttributes() {
		a.Attributes = append(a.Attributes, &apiv1.AttributeInfo{
			Name: at.GetName(), Value: string(at.GetDefaultJson()), Type: at.GetMessageType(), ReadOnly: at.GetReadOnly(), RestartToApply: at.GetRestartToApply(),
			Secret: at.GetSecret(), From: "default",
		})
	}
}

// artifact is a committed record for people.
func (n *Node) artifact(art *componentsv1.Artifact) *apiv1.Artifact {
	a := &apiv1.Artifact{
		Name: art.GetName(), Version: art.GetVersion(), Digest: art.GetDigest(), Bytes: art.GetBytes(), Kind: art.GetKind(), State: "ready",
		Pushed: timestamppb.New(time.UnixMilli(int64(art.GetPushedUnixMs()))),
	}
	for _, p := range art.GetPlatforms() {
		a.Platforms = append(a.Platforms, p.GetOsArch())
	}
	if id, err := peer.Decode(art.GetPushedBy()); err == nil {
		a.PushedBy = n.nameOf(id)
	}
	for _, m := range n.members.Closest(components.ArtifactRegister(art.GetDigest()), registry.Replicas, func(m members.Member) bool { return m.State == members.Alive && !m.NoHolder }) {
		a.Holders = append(a.Holders, m.Name)
	}
	for _, app := range n.applications() {
		effs, err := components.Effectives(app.Application)
		if err != nil {
			continue
		}
		for _, e := range effs {
			if e.Digest == art.GetDigest() {
				a.UsedBy = append(a.UsedBy, e.Key())
			}
		}
	}
	return a
}

func shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
