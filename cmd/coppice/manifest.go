package main

import (
	"context"
	"encoding/hex"
	"errors"
	"path/filepath"
	"slices"
	"strings"

	"github.com/coppice-project/coppice/components"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// maxManifest bounds what is read of a manifest file.
const maxManifest = components.MaxManifestBytes

// manifest is a file of desired state and the local artifacts that it names.
type manifest struct {
	name  string // for positions in errors
	dir   string // local artifacts are relative to it
	data  []byte
	paths []string // local artifacts as written, each once, in order
}

// readManifest reads a manifest and finds what would have to be pushed. What is wrong in it is reported here, before anything happens.
func (c *cli) readManifest(file string) (*manifest, error) {
	data, err := c.readInput(file, maxManifest)
	if err != nil {
		return nil, err
	}
	m := &manifest{name: file, dir: ".", data: data}
	if file == "-" {
		m.name = "stdin"
	} else {
		m.dir = filepath.Dir(file)
	}
	apps, err := components.ParseManifests(m.name, data)
	if err != nil {
		return nil, badManifest(m.name, err)
	}
	for _, app := range apps {
		for _, comp := range app.Components {
			ref, err := components.ParseArtifactRef(comp.Artifact)
			if err == nil && ref.Kind == components.RefPath && !slices.Contains(m.paths, ref.Path) {
				m.paths = append(m.paths, ref.Path)
			}
		}
	}
	return m, nil
}

// badManifest tells every problem of a manifest: the only one in the line itself, several below it.
func badManifest(file string, err error) error {
	f := &failure{what: "read " + file, why: oneLine(err.Error()), cause: err}
	var me *components.ManifestError
	if !errors.As(err, &me) || len(me.Problems)+me.More < 2 {
		return f
	}
	f.why = plural(len(me.Problems)+me.More, "error", "errors") + " in the manifest, nothing was changed"
	f.details = strings.Split(me.Error(), "\n")
	return f
}

func (m *manifest) resolve(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(m.dir, path)
}

// describe tells a plan about the local artifacts without pushing them.
func (m *manifest) describe() ([]*apiv1.LocalArtifact, error) {
	var out []*apiv1.LocalArtifact
	for _, path := range m.paths {
		f, err := openLocal(m.resolve(path))
		if err != nil {
			return nil, &failure{what: "read artifact " + path, why: err.Error(), cause: err}
		}
		out = append(out, &apiv1.LocalArtifact{Path: path, Digest: "sha256:" + hex.EncodeToString(f.sha256[:]), Platform: platformOf(f), Bytes: f.bytes})
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// push publishes the local artifacts; every one of them is there before the first is sent.
func (c *cli) pushManifest(ctx context.Context, cl apiv1connect.ControlClient, m *manifest) ([]*apiv1.LocalArtifact, error) {
	out, err := m.describe()
	if err != nil {
		return nil, err
	}
	for _, a := range out {
		res, err := c.push(ctx, cl, "", "", []string{m.resolve(a.Path)})
		if err != nil {
			return nil, err
		}
		a.Digest = res.Digest
		c.progress().step("%s", pushedText(res))
	}
	return out, nil
}
