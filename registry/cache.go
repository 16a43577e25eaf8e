package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
)

// fileStamp recognises a cached file that was verified before: same inode, size and change time. The change time moves with every
// write and every chmod, and cannot be set back by a component's user.
type fileStamp struct {
	inode, size uint64
	ctimeNs     int64
}

func stampOf(f *os.File) (fileStamp, error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return fileStamp{}, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	return fileStamp{inode: st.Ino, size: uint64(st.Size), ctimeNs: st.Ctim.Nano()}, nil
}

// Open returns the artifact's executable for this platform, open for reading and verified: execute this file, by descriptor. It is
// fetched from its holders when it is not here. The caller closes it.
func (r *Registry) Open(ctx context.Context, digest string) (*os.File, *componentsv1.Artifact, error) {
	art, ok := r.Artifact(digest)
	if !ok {
		return nil, nil, fmt.Errorf("artifact %s: not in the registry; try coppice registry list", digest)
	}
	plat := platformHere(art)
	if plat == nil {
		return nil, nil, fmt.Errorf("artifact %s@%s: built for %s, this node is %s", art.GetName(), art.GetVersion(), platformNames(art.GetPlatforms()), native())
	}
	if f, err := r.cached(plat.GetDigest()); err == nil {
		return f, art, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		r.cfg.Log.Warn("cached executable is not what it should be; it is fetched again", "artifact", art.GetName(), "error", err)
		r.cfg.Notify(Notice{Type: "corrupt", Artifact: art.GetName() + "@" + art.GetVersion(), Digest: plat.GetDigest(), Reason: err.Error()})
	}
	if err := r.once(ctx, plat.GetDigest(), func() error { return r.fill(ctx, art, plat) }); err != nil {
		return nil, nil, err
	}
	f, err := r.cached(plat.GetDigest())
	if err != nil {
		return nil, nil, fmt.Errorf("artifact %s@%s: %w", art.GetName(), art.GetVersion(), err)
	}
	return f, art, nil
}

// Cached says whether the artifact can start here without fetching anything.
func (r *Registry) Cached(digest string) bool {
	art, ok := r.Artifact(digest)
	if !ok {
		return false
	}
	r.mu.Lock()
	_, described := r.descs[digest]
	r.mu.Unlock()
	plat := platformHere(art)
	if plat == nil {
		return false
	}
	_, err := os.Stat(r.path(plat.GetDigest()))
	return err == nil && (described || art.GetKind() == KindProgram)
}

// platformHere is the file of an artifact that runs on this machine: the one built for it, else one for any; nil when there is none.
func platformHere(art *componentsv1.Artifact) (plat *componentsv1.Platform) {
	for _, p := range art.GetPlatforms() {
		if p.GetOsArch() == native() || plat == nil && runnable(p.GetOsArch()) {
			plat = p
		}
	}
	return plat
}

// Warm brings an artifact and its description here before they are needed.
func (r *Registry) Warm(ctx context.Context, digest string) error {
	f, _, err := r.Open(ctx, digest)
	if err != nil {
		return err
	}
	_, err = r.Description(ctx, digest)
	return errors.Join(err, f.Close())
}

func (r *Registry) path(digest string) string {
	return filepath.Join(r.cfg.Cache, strings.TrimPrefix(digest, "sha256:"))
}

// cached opens a verified file of the cache. A file whose bytes are not its name is removed and reported.
func (r *Registry) cached(digest string) (*os.File, error) {
	f, err := os.Open(r.path(digest))
	if err != nil {
		return nil, err
	}
	stamp, err := stampOf(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r.mu.Lock()
	known := r.verified[digest]
	r.mu.Unlock()
	if known == stamp {
		return f, nil
	}
	sum, err := hashFile(f)
	if err == nil && sum != digest {
		err = fmt.Errorf("its bytes are %s, not %s", sum, digest)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(r.path(digest)))
	}
	r.mu.Lock()
	r.verified[digest] = stamp
	r.mu.Unlock()
	return f, nil
}

// fetching is a fetch under way.
type fetching struct {
	done chan struct{}
	err  error // valid once done is closed
}

// once runs fill for one digest at a time; those who wait share how it went, unless it failed because its own caller gave up.
func (r *Registry) once(ctx context.Context, digest string, fill func() error) error {
	for {
		r.mu.Lock()
		f := r.fetching[digest]
		if f == nil {
			f = &fetching{done: make(chan struct{})}
			r.fetching[digest] = f
			r.mu.Unlock()
			f.err = fill()
			r.mu.Lock()
			delete(r.fetching, digest)
			r.mu.Unlock()
			close(f.done)
			return f.err
		}
		r.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return fmt.Errorf("fetch %s: %w", digest, ctx.Err())
		}
		if !errors.Is(f.err, context.Canceled) && !errors.Is(f.err, context.DeadlineExceeded) {
			return f.err
		}
	}
}

// incoming begins the names of files that are being written.
const incoming = ".incoming-"

// fill writes the executable from its pages into the cache: to a temporary file, verified, then renamed.
func (r *Registry) fill(ctx context.Context, art *componentsv1.Artifact, plat *componentsv1.Platform) error {
	name := art.GetName() + "@" + art.GetVersion()
	root, err := blobs.ParseHash(plat.GetRoot())
	if err != nil {
		return fmt.Errorf("artifact %s: its record names no pages: %w", name, err)
	}
	if err := r.fetch(ctx, root, art); err != nil {
		return err
	}
	src, err := r.cfg.Blobs.OpenStream(root)
	if err != nil {
		return fmt.Errorf("artifact %s: %w", name, err)
	}
	defer src.Close()
	tmp, err := os.CreateTemp(r.cfg.Cache, incoming+"*")
	if err != nil {
		return fmt.Errorf("artifact %s: %w", name, err)
	}
	err = writeVerified(tmp, src, plat.GetDigest())
	if err := errors.Join(err, tmp.Close()); err != nil {
		return errors.Join(fmt.Errorf("artifact %s: %w", name, err), os.Remove(tmp.Name()))
	}
	if err := os.Rename(tmp.Name(), r.path(plat.GetDigest())); err != nil {
		return errors.Join(fmt.Errorf("artifact %s: %w", name, err), os.Remove(tmp.Name()))
	}
	return nil
}

func writeVerified(dst *os.File, src io.Reader, digest string) error {
	if _, err := io.Copy(dst, src); err != nil {
		return fmt.Errorf("write the executable: %w", err)
	}
	if err := dst.Chmod(0o500); err != nil {
		return fmt.Errorf("write the executable: %w", err)
	}
	if err := dst.Sync(); err != nil {
		return fmt.Errorf("write the executable: %w", err)
	}
	sum, err := hashFile(dst)
	if err != nil {
		return fmt.Errorf("verify the executable: %w", err)
	}
	if sum != digest {
		return fmt.Errorf("the pages make %s, not %s: refused", sum, digest)
	}
	return nil
}

// fetch makes a root complete here, from its holders first and from anyone alive after.
func (r *Registry) fetch(ctx context.Context, root blobs.Hash, art *componentsv1.Artifact) error {
	if r.cfg.Blobs.Complete(root) {
		return nil
	}
	from := r.cfg.Holders(components.ArtifactRegister(art.GetDigest()), Replicas)
	if by, err := peer.Decode(art.GetPushedBy()); err == nil {
		from = append(from, by)
	}
	seen := map[peer.ID]bool{r.cfg.Self: true}
	var ask []peer.ID
	for _, id := range append(from, r.cfg.Alive()...) {
		if !seen[id] {
			seen[id] = true
			ask = append(ask, id)
		}
	}
	if err := r.cfg.Blobs.Fetch(ctx, root, ask); err != nil {
		return fmt.Errorf("fetch artifact %s@%s: %w", art.GetName(), art.GetVersion(), err)
	}
	r.cfg.Notify(Notice{Type: "fetched", Artifact: art.GetName() + "@" + art.GetVersion(), Digest: art.GetDigest()})
	return nil
}
