package registry

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
)

const (
	repairEvery = 5 * time.Second
	repairLimit = 10 * time.Minute // for one artifact
)

// Repair keeps every artifact on its holders: a node that has become one of the closest to an artifact, because another died or left,
// fetches its pages. It runs until ctx ends.
func (r *Registry) Repair(ctx context.Context) error {
	tick := time.NewTicker(repairEvery)
	defer tick.Stop()
	told := map[string]bool{} // what could not be fetched, by digest
	for {
		for _, art := range r.List() {
			err := r.hold(ctx, art)
			if err != nil && ctx.Err() == nil && !told[art.GetDigest()] {
				r.cfg.Log.Warn("this node should hold an artifact and could not fetch it; it is tried again", "artifact", art.GetName()+"@"+art.GetVersion(), "error", err)
			}
			told[art.GetDigest()] = err != nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

func (r *Registry) hold(ctx context.Context, art *componentsv1.Artifact) error {
	root, err := blobs.ParseHash(art.GetRoot())
	if err != nil {
		return errors.Join(errors.New("its record names no root"), err)
	}
	if r.cfg.Blobs.Complete(root) || !slices.Contains(r.cfg.Holders(components.ArtifactRegister(art.GetDigest()), Replicas), r.cfg.Self) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, repairLimit)
	defer cancel()
	return r.fetch(ctx, root, art)
}
