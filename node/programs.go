package node

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/node/api"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	exec "github.com/coppice-project/coppice/plugins/exec/component"
	"github.com/coppice-project/coppice/registry"
)

// artifacts is the registry as the supervisor sees it: what runs a program can be described, too.
type artifacts struct {
	*registry.Registry
	version string // of this node's binary
}

// Description implements supervisor.Artifacts.
func (a artifacts) Description(ctx context.Context, digest string) (*componentv1.Description, error) {
	if digest == components.ExecDigest {
		return exec.Describe(a.version, true), nil
	}
	d, err := a.Registry.Description(ctx, digest)
	if d == nil && err == nil { // a program of the registry
		return exec.Describe(a.version, true), nil
	}
	return d, err
}

func (n *Node) artifacts() artifacts { return artifacts{n.registry, n.cfg.Version} }

// builtins are the components that this binary brings along.
func builtins(exe string) map[string]supervisor.Builtin {
	of := func(name string) supervisor.Builtin {
		return supervisor.Builtin{Exec: runner.ExecFile{Path: exe}, Args: []string{"__component", name}}
	}
	return map[string]supervisor.Builtin{builtinPlacement: of("placement"), components.ExecDigest: of(components.ExecName)}
}

// pinInstalled is pin for a program that is installed on the nodes.
func (n *Node) pinInstalled(what string, spec *componentsv1.ComponentSpec) (*componentsv1.Pinned, error) {
	durable, err := components.ResolveDurability(spec, exec.Describe(n.cfg.Version, spec.GetRun().GetStateDir() != ""))
	if err != nil {
		return nil, fail(what, err)
	}
	return &componentsv1.Pinned{Component: spec.GetName(), Digest: components.ExecDigest, Name: components.ExecName, Version: n.cfg.Version, Durable: durable}, nil
}

// pinProgram says what is known of the artifact that a component with a run is to have, and of one that needs a run and has none.
func (n *Node) pinProgram(what string, spec *componentsv1.ComponentSpec, art *componentsv1.Artifact) (*componentv1.Description, error) {
	switch isProgram := art.GetKind() == registry.KindProgram; {
	case isProgram && spec.GetRun() == nil:
		return nil, api.Fail(connect.CodeFailedPrecondition, what, art.GetName()+" is a program: it says nothing of how it is run",
			"add run: {} to the component, or run: {port: 8080, state_dir: data} (docs/programs.md)")
	case !isProgram && spec.GetRun() != nil:
		return nil, api.Fail(connect.CodeFailedPrecondition, what, fmt.Sprintf("%s is a component, not a program: it is not started by a run", art.GetName()),
			"take run out, or name a program")
	case isProgram:
		return exec.Describe(n.cfg.Version, spec.GetRun().GetStateDir() != ""), nil
	}
	return nil, nil
}
