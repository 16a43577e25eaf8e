package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/backup"
	"github.com/coppice-project/coppice/dht/blobs"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// importWithin bounds the taking in of a file, from when the node is up; importReach of that, the wait for the arbiter.
const (
	importWithin = 10 * time.Minute
	importReach  = 30 * time.Second
)

// readExported reads a whole file, once; each of its nodes goes to f.
func readExported(ctx context.Context, open func() (io.ReadCloser, error), f func(enc []byte) error) (*exported, error) {
	in, err := open()
	if err != nil {
		return nil, err
	}
	x := &exported{}
	_, err = backup.ReadComponent(in, backup.Handler{
		Header:   func(h *wirev1.BackupHeader) error { x.head = h; return nil },
		Register: x.take,
		Node: func(enc []byte) error {
			if err := ctx.Err(); err != nil || f == nil {
				return err
			}
			return f(enc)
		},
	})
	err = errors.Join(err, in.Close())
	if err == nil {
		err = x.whole()
	}
	return x, err
}

// CheckImport reads a file that coppice fork --export wrote, and returns the component that it holds. The error wraps one of package backup's where the file
// is at fault.
func CheckImport(ctx context.Context, open func() (io.ReadCloser, error)) (component string, err error) {
	x, err := readExported(ctx, open, nil)
	if err != nil {
		return "", err
	}
	return x.body.GetComponent(), nil
}

// takeIn makes the component of a file one of this cluster. Nothing is changed unless the whole file was read and found good.
func (n *Node) takeIn(ctx context.Context, open func() (io.ReadCloser, error)) error {
	ctx, cancel := context.WithTimeout(ctx, importWithin)
	defer cancel()
	x, err := readExported(ctx, open, nil)
	if err != nil {
		return err
	}
	what := "import " + x.body.GetComponent()
	rctx, rcancel := context.WithTimeout(ctx, importReach)
	err = n.arbiter.Sync(rctx)
	rcancel()
	if err != nil {
		return err
	}
	if err := n.free(ctx, what, x.app.GetName(), x.name); err != nil {
		return err
	}
	ops, compares, err := n.newArtifact(x)
	if err != nil {
		return err
	}
	pin := "import/" + rand.Text()
	if err := n.takePages(ctx, pin, open, x); err != nil {
		return err
	}
	b := &beginning{n: n, what: what, next: x.app, name: x.name, root: x.root, cause: x.body.GetCause(), ops: ops, compares: compares}
	if n.cfg.Role != "voter" {
		b.at = n.id // its pages are here; placement moves it if it should be elsewhere
	}
	if old, ok := n.application(x.app.GetName()); ok { // it joins what is there
		next := old.Application
		next.Version++
		next.Manifest.Components = append(next.Manifest.Components, x.app.GetManifest().GetComponents()...)
		next.Pinned = append(next.Pinned, x.app.GetPinned()...)
		b.next, b.revision = next, old.revision
	}
	if _, err := b.commit(ctx); err != nil {
		return err
	}
	n.log.Info("imported", "component", x.body.GetComponent(), "what", x.body.GetCause())
	return nil
}

// newArtifact is what a transaction has to add so that the registry has the file's artifact.
func (n *Node) newArtifact(x *exported) (ops []arbiter.Op, compares []arbiter.Compare, err error) {
	for _, reg := range x.regs {
		have, ok := n.arbiter.Get(reg.Key)
		switch {
		case ok && reg.Key == components.ArtifactNameRegister(x.art.GetName(), x.art.GetVersion()) && string(have.Body) != x.art.GetDigest():
			return nil, nil, fmt.Errorf("the registry here has another %s@%s, %s; the file's is %s", x.art.GetName(), x.art.GetVersion(), have.Body, x.art.GetDigest())
		case ok:
			continue
		}
		ops = append(ops, arbiter.Op{Put: &arbiter.PutOp{Key: reg.Key, Body: reg.Body}})
		compares = append(compares, arbiter.Compare{Key: reg.Key, Field: "exists", Equal: 0})
	}
	return ops, compares, nil
}

// takePages keeps the file's nodes here, and gives the artifact's to those who should hold them.
func (n *Node) takePages(ctx context.Context, pin string, open func() (io.ReadCloser, error), x *exported) error {
	var roots []blobs.Hash
	for _, raw := range x.head.GetRoots() {
		h, err := blobs.ParseHash(raw)
		if err != nil {
			return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
		}
		roots = append(roots, h)
	}
	n.blobs.Pin(pin, importWithin, roots...)
	in := n.blobs.Import()
	if _, err := readExported(ctx, open, in.Add); err != nil {
		return errors.Join(err, in.Close())
	}
	if err := in.Close(); err != nil {
		return err
	}
	art, err := blobs.ParseHash(x.art.GetRoot())
	if err != nil {
		return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
	}
	for _, h := range append(slices.Clone(roots), x.root, art) {
		if !n.blobs.Complete(h) {
			return fmt.Errorf("%w: it lacks pages below %s", backup.ErrDamaged, h.Short())
		}
	}
	n.blobs.Pin(pin, importWithin, roots...)
	_, err = n.blobs.Push(ctx, art, []peer.ID{n.id}, 1) // others make their copies of what the registry names
	return err
}
