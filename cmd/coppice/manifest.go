package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"path/filepath"
	"slices"

	"go.yaml.in/yaml/v3"

	"github.com/coppice-project/coppice/components"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// maxManifest bounds a manifest file; thousands of components fit.
const maxManifest = 4 << 20

// manifest is a file of desired state and the local artifacts that it names.
type manifest struct {
	name  string // for positions in errors; "-" is stdin
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
	if file != "-" {
		m.dir = filepath.Dir(file)
	}
	if err := checkManifest(file, data); err != nil {
		return nil, err
	}
	m.paths, err = localArtifacts(data)
	return m, err
}

// localArtifacts lists the artifacts of a manifest that are paths.
func localArtifacts(data []byte) ([]string, error) {
	var paths []string
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc struct {
			Components []struct {
				Artifact string `yaml:"artifact"`
			} `yaml:"components"`
		}
		if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
			return paths, nil
		} else if err != nil {
			return nil, &failure{what: "read the manifest", why: oneLine(err.Error()), cause: err}
		}
		for _, comp := range doc.Components {
			ref, err := components.ParseArtifactRef(comp.Artifact)
			if err == nil && ref.Kind == components.RefPath && !slices.Contains(paths, ref.Path) {
				paths = append(paths, ref.Path)
			}
		}
	}
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
