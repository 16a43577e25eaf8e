package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/Masterminds/semver/v3"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	// MaxFile is the largest file of an artifact in bytes.
	MaxFile = 2 << 30
	// MaxFiles of one artifact, one per platform.
	MaxFiles = 16
	// Replicas is how many nodes keep an artifact's pages besides those that run it.
	Replicas = 3

	artifactFormat = 1
	kindArtifact   = "artifact"
	// KindComponent speaks component.v1, KindProgram is any other executable.
	KindComponent = "component"
	KindProgram   = components.KindProgram
	anyPlatform   = components.AnyPlatform
)

// Describer runs a file in the sandbox and asks it what it is. It returns ErrNoHandshake for an executable that is no component.
type Describer func(ctx context.Context, file *os.File) (*componentv1.Description, error)

// ErrNoHandshake says that an executable does not speak our contract: it is kept as a program.
var ErrNoHandshake = errors.New("no component handshake")

// Registers is what the registry needs of the arbiter.
type Registers interface {
	Get(key string) (arbiter.Register, bool)
	List(prefix string) []arbiter.Register
	Txn(ctx context.Context, r arbiter.TxnRequest) (arbiter.TxnResult, error)
}

// Config of a node's registry. Every field is needed.
type Config struct {
	Self     peer.ID
	Cache    string // folder of executables that were verified
	Drop     string // the drop folder
	Blobs    *blobs.Store
	Arbiter  Registers
	Holders  func(key string, n int) []peer.ID // the alive nodes that should keep a key, closest first
	Alive    func() []peer.ID                  // whom to ask for pages when the holders do not have them
	Describe Describer
	Nonce    func() uint64
	Notify   func(Notice) // every step worth an event; must not block
	Log      *slog.Logger
}

// Notice is one thing that happened to an artifact.
type Notice struct {
	Type     string // pushed | refused | incomplete | corrupt | fetched
	Artifact string // name@version, or the file's name while that is not known
	Digest   string
	Reason   string
	Took     time.Duration
	Holders  int
}

// Registry of one node. Safe for concurrent use.
type Registry struct {
	cfg Config

	describing sync.Mutex // one sandbox at a time

	mu       sync.Mutex // guards the maps
	verified map[string]fileStamp
	fetching map[string]*fetching
	drops    map[string]*Dropped
	descs    map[string]*componentv1.Description
}

// New makes the folders.
func New(cfg Config) (*Registry, error) {
	for _, dir := range []string{cfg.Cache, cfg.Drop} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("registry folder: %w", err)
		}
	}
	left, err := filepath.Glob(filepath.Join(cfg.Cache, incoming+"*"))
	if err != nil {
		return nil, fmt.Errorf("registry folder: %w", err)
	}
	for _, f := range left { // of a fetch that was cut off by the end of the node
		if err := os.Remove(f); err != nil {
			return nil, fmt.Errorf("registry folder: %w", err)
		}
	}
	return &Registry{
		cfg: cfg, verified: map[string]fileStamp{}, fetching: map[string]*fetching{}, drops: map[string]*Dropped{},
		descs: map[string]*componentv1.Description{},
	}, nil
}

// PushError is a push that was refused for what was pushed.
type PushError struct{ Artifact, Why, Try string }

func (e *PushError) Error() string { return fmt.Sprintf("push %s: %s", e.Artifact, e.Why) }

// PushRequest names the files of one artifact. Name and Version are taken from Describe where they are empty.
type PushRequest struct {
	Name, Version string
	Files         []*os.File // open for reading; one per platform
}

// Push makes files an artifact of the cluster: described, verified, on Replicas nodes, committed. existed says that the same bytes
// were there under the same name already. It fails with *PushError where the files are at fault.
func (r *Registry) Push(ctx context.Context, req PushRequest) (art *componentsv1.Artifact, existed bool, err error) {
	start := time.Now()
	if len(req.Files) == 0 || len(req.Files) > MaxFiles {
		return nil, false, &PushError{Artifact: req.Name, Why: fmt.Sprintf("%d files; an artifact has 1 to %d, one per platform", len(req.Files), MaxFiles)}
	}
	art = &componentsv1.Artifact{Format: artifactFormat, Name: req.Name, Version: req.Version, PushedBy: r.cfg.Self.String(), PushedUnixMs: uint64(time.Now().UnixMilli())}
	local := -1
	for i, f := range req.Files {
		p, err := r.inspect(f)
		if err != nil {
			return nil, false, err
		}
		for _, other := range art.Platforms {
			if other.GetOsArch() == p.GetOsArch() {
				return nil, false, &PushError{Artifact: filepath.Base(f.Name()), Why: "two files for " + p.GetOsArch()}
			}
		}
		if runnable(p.GetOsArch()) {
			local = i
		}
		art.Platforms = append(art.Platforms, p)
		art.Bytes += p.GetBytes()
	}
	art.Digest = digestOf(art.Platforms)
	if known, ok := r.Artifact(art.Digest); ok {
		if (req.Name == "" || req.Name == known.GetName()) && (req.Version == "" || req.Version == known.GetVersion()) {
			return known, true, nil
		}
		return nil, false, taken(first(req.Name, filepath.Base(req.Files[0].Name())), known)
	}
	if err := r.describe(ctx, art, req.Files, local); err != nil {
		return nil, false, err
	}
	if err := r.publish(ctx, art, req.Files); err != nil {
		return nil, false, err
	}
	r.cfg.Notify(Notice{Type: "pushed", Artifact: art.GetName() + "@" + art.GetVersion(), Digest: art.GetDigest(), Took: time.Since(start), Holders: Replicas})
	return art, false, nil
}

// taken: an artifact's digest has one name and version.
func taken(what string, known *componentsv1.Artifact) *PushError {
	name := known.GetName() + "@" + known.GetVersion()
	return &PushError{Artifact: what, Why: "the same bytes are in the registry as " + name, Try: "use " + name + ", or build it anew with the other version in it"}
}

// inspect reads what the file itself says: platform, size, digest.
func (r *Registry) inspect(f *os.File) (*componentsv1.Platform, error) {
	name := filepath.Base(f.Name())
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("push %s: %w", name, err)
	}
	if !st.Mode().IsRegular() {
		return nil, &PushError{Artifact: name, Why: "not a regular file"}
	}
	if st.Size() > MaxFile {
		return nil, &PushError{Artifact: name, Why: fmt.Sprintf("%d bytes; the most is %d", st.Size(), int64(MaxFile))}
	}
	osArch, err := Platform(f, st.Size())
	if err != nil {
		return nil, &PushError{Artifact: name, Why: err.Error(), Try: "push a whole executable, built for this platform: " + native()}
	}
	sum, err := hashFile(f)
	if err != nil {
		return nil, fmt.Errorf("push %s: %w", name, err)
	}
	return &componentsv1.Platform{OsArch: osArch, Digest: sum, Bytes: uint64(st.Size())}, nil
}

// describe fills kind, name, version and description by asking the file that runs here.
func (r *Registry) describe(ctx context.Context, art *componentsv1.Artifact, files []*os.File, local int) error {
	base := filepath.Base(files[0].Name())
	if local < 0 {
		return &PushError{
			Artifact: base, Why: fmt.Sprintf("built for %s; this node is %s and cannot ask it what it is", platformNames(art.Platforms), native()),
			Try: "coppice registry push with the " + native() + " build beside it, or push it on a node of that platform",
		}
	}
	r.describing.Lock()
	desc, err := r.cfg.Describe(ctx, files[local])
	r.describing.Unlock()
	switch {
	case errors.Is(err, ErrNoHandshake):
		art.Kind = KindProgram
		name, version := splitName(base)
		art.Name, art.Version = first(art.Name, name), first(art.Version, version, "0.0.0")
	case err != nil:
		return &PushError{Artifact: base, Why: err.Error(), Try: "run it with --describe, or see coppice events /registry"}
	default:
		art.Kind = KindComponent
		art.Name, art.Version = first(art.Name, desc.GetType()), first(art.Version, desc.GetVersion())
		if art.Description, err = (proto.MarshalOptions{Deterministic: true}).Marshal(desc); err != nil {
			return fmt.Errorf("push %s: %w", base, err)
		}
	}
	if err := components.CheckArtifactName(art.Name); err != nil {
		return &PushError{Artifact: base, Why: err.Error(), Try: "--name N"}
	}
	if _, err := semver.StrictNewVersion(art.Version); err != nil {
		return &PushError{Artifact: art.Name, Why: fmt.Sprintf("version %q is no semantic version: %v", art.Version, err), Try: "--version 1.0.0"}
	}
	return nil
}

// publish stores the pages, has them copied and commits the record under its name. A name and version are given to one digest only.
func (r *Registry) publish(ctx context.Context, art *componentsv1.Artifact, files []*os.File) error {
	node := blobs.Node{Kind: kindArtifact}
	for i, f := range files {
		sum := sha256.New()
		link, err := r.cfg.Blobs.WriteStream(ctx, io.TeeReader(io.NewSectionReader(f, 0, int64(art.Platforms[i].GetBytes())), sum))
		if err != nil {
			return fmt.Errorf("push %s: store the pages: %w", art.GetName(), err)
		}
		if hexDigest(sum) != art.Platforms[i].GetDigest() {
			return &PushError{Artifact: filepath.Base(f.Name()), Why: "it was changed while it was pushed", Try: "push it once it is complete"}
		}
		art.Platforms[i].Root = link.Hash[:]
		node.Links = append(node.Links, link)
	}
	var err error
	if node.Data, err = (proto.MarshalOptions{Deterministic: true}).Marshal(art); err != nil {
		return fmt.Errorf("push %s: %w", art.GetName(), err)
	}
	root, err := r.cfg.Blobs.Put(node)
	if err != nil {
		return fmt.Errorf("push %s: store the record: %w", art.GetName(), err)
	}
	art.Root = root.Hash[:]
	to := r.cfg.Holders(components.ArtifactRegister(art.GetDigest()), Replicas)
	if !slices.Contains(to, r.cfg.Self) {
		to = append(to, r.cfg.Self)
	}
	w := min(len(to), Replicas)/2 + 1
	if _, err := r.cfg.Blobs.Push(ctx, root.Hash, to, w); err != nil {
		return fmt.Errorf("push %s: copy to %d holders: %w", art.GetName(), len(to), err)
	}
	return r.commit(ctx, art)
}

func (r *Registry) commit(ctx context.Context, art *componentsv1.Artifact) error {
	record := proto.Clone(art).(*componentsv1.Artifact)
	record.Description = nil // it lies in the artifact's node; the committed record stays small
	body, err := proto.Marshal(record)
	if err != nil {
		return fmt.Errorf("push %s: %w", art.GetName(), err)
	}
	nameKey, key := components.ArtifactNameRegister(art.GetName(), art.GetVersion()), components.ArtifactRegister(art.GetDigest())
	res, err := r.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce:    r.cfg.Nonce(),
		Compares: []arbiter.Compare{{Key: nameKey, Field: "exists", Equal: 0}, {Key: key, Field: "exists", Equal: 0}},
		Then:     []arbiter.Op{{Put: &arbiter.PutOp{Key: key, Body: body}}, {Put: &arbiter.PutOp{Key: nameKey, Body: []byte(art.GetDigest())}}},
	})
	if err != nil {
		return fmt.Errorf("push %s: commit its record: %w", art.GetName(), err)
	}
	if res.Succeeded {
		return nil
	}
	// What is there instead: the answer tells, the local view may not know yet.
	for _, reg := range res.Registers {
		var there componentsv1.Artifact
		switch {
		case reg.Key == nameKey && string(reg.Body) == art.GetDigest():
			return nil // somebody pushed the same at the same time
		case reg.Key == nameKey:
			return &PushError{
				Artifact: art.GetName() + "@" + art.GetVersion(), Why: "this version exists with other bytes; a version never changes",
				Try: "raise the version, or coppice registry show " + art.GetName(),
			}
		case reg.Key == key && proto.Unmarshal(reg.Body, &there) == nil:
			return taken(art.GetName()+"@"+art.GetVersion(), &there)
		}
	}
	return fmt.Errorf("push %s: its record was not committed, and nothing says why; try again", art.GetName())
}

// Artifact returns a committed record by digest, without its description.
func (r *Registry) Artifact(digest string) (*componentsv1.Artifact, bool) {
	reg, ok := r.cfg.Arbiter.Get(components.ArtifactRegister(digest))
	if !ok {
		return nil, false
	}
	var art componentsv1.Artifact
	if err := proto.Unmarshal(reg.Body, &art); err != nil {
		r.cfg.Log.Error("artifact record is damaged", "digest", digest, "error", err)
		return nil, false
	}
	return &art, true
}

// List returns every committed record, by name and then version, oldest first.
func (r *Registry) List() []*componentsv1.Artifact {
	var out []*componentsv1.Artifact
	for _, reg := range r.cfg.Arbiter.List(components.ArtifactPrefix) {
		var art componentsv1.Artifact
		if err := proto.Unmarshal(reg.Body, &art); err != nil {
			r.cfg.Log.Error("artifact record is damaged", "key", reg.Key, "error", err)
			continue
		}
		out = append(out, &art)
	}
	slices.SortFunc(out, func(a, b *componentsv1.Artifact) int {
		if c := strings.Compare(a.GetName(), b.GetName()); c != 0 {
			return c
		}
		va, errA := semver.NewVersion(a.GetVersion())
		vb, errB := semver.NewVersion(b.GetVersion())
		if errA != nil || errB != nil {
			return strings.Compare(a.GetVersion(), b.GetVersion())
		}
		return va.Compare(vb)
	})
	return out
}

// Roots lists the roots of every artifact that is committed and lies here: garbage collection keeps them.
func (r *Registry) Roots() []blobs.Hash {
	var out []blobs.Hash
	for _, art := range r.List() {
		if len(art.GetRoot()) == len(blobs.Hash{}) {
			out = append(out, blobs.Hash(art.GetRoot()))
		}
	}
	return out
}

// Description returns what the artifact said about itself; nil for a program. The artifact's node is fetched when it is not here.
func (r *Registry) Description(ctx context.Context, digest string) (*componentv1.Description, error) {
	r.mu.Lock()
	desc, ok := r.descs[digest]
	r.mu.Unlock()
	if ok {
		return desc, nil
	}
	art, ok := r.Artifact(digest)
	if !ok {
		return nil, fmt.Errorf("artifact %s: not in the registry", digest)
	}
	if art.GetKind() == KindProgram {
		return nil, nil
	}
	root, err := blobs.ParseHash(art.GetRoot())
	if err != nil {
		return nil, fmt.Errorf("artifact %s: its record names no pages: %w", digest, err)
	}
	if err := r.fetch(ctx, root, art); err != nil {
		return nil, err
	}
	node, err := r.cfg.Blobs.Get(root)
	if err != nil {
		return nil, fmt.Errorf("artifact %s: %w", digest, err)
	}
	var full componentsv1.Artifact
	if err := proto.Unmarshal(node.Data, &full); err != nil {
		return nil, fmt.Errorf("artifact %s: %w", digest, err)
	}
	desc = &componentv1.Description{}
	if err := proto.Unmarshal(full.GetDescription(), desc); err != nil {
		return nil, fmt.Errorf("artifact %s: its description: %w", digest, err)
	}
	r.mu.Lock()
	r.descs[digest] = desc
	r.mu.Unlock()
	return desc, nil
}

func native() string { return runtime.GOOS + "/" + runtime.GOARCH }

func runnable(osArch string) bool { return osArch == native() || osArch == anyPlatform }

func platformNames(ps []*componentsv1.Platform) string {
	names := make([]string, len(ps))
	for i, p := range ps {
		names[i] = p.GetOsArch()
	}
	return strings.Join(names, ", ")
}

// digestOf names an artifact: the file's own digest when there is one file, else the digest over the sorted platforms'.
func digestOf(ps []*componentsv1.Platform) string {
	if len(ps) == 1 {
		return ps[0].GetDigest()
	}
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.GetOsArch() + " " + p.GetDigest() + "\n"
	}
	slices.Sort(lines)
	sum := sha256.New()
	for _, l := range lines {
		io.WriteString(sum, l) //nolint:errcheck // a hash takes everything
	}
	return hexDigest(sum)
}

func hexDigest(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

func hashFile(f *os.File) (string, error) {
	h := sha256.New()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, st.Size())); err != nil {
		return "", err
	}
	return hexDigest(h), nil
}

// splitName reads "kv-1.0.2" as kv and 1.0.2, "kv" as kv and "".
func splitName(file string) (name, version string) {
	file = strings.TrimSuffix(file, filepath.Ext(file)[:extLen(file)])
	for i := len(file) - 1; i > 0; i-- {
		if (file[i] == '-' || file[i] == '_') && i+1 < len(file) && file[i+1] >= '0' && file[i+1] <= '9' {
			if v, err := semver.NewVersion(file[i+1:]); err == nil {
				return file[:i], v.String()
			}
		}
	}
	return file, ""
}

// extLen is the length of a file name's ending that says nothing about it (.bin, .sh), 0 where the dot belongs to a version.
func extLen(file string) int {
	switch ext := filepath.Ext(file); ext {
	case ".bin", ".sh", ".py", ".js":
		return len(ext)
	}
	return 0
}

func first(ss ...string) string {
	for _, s := range ss {
		if s != "" {
			return s
		}
	}
	return ""
}
