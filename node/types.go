package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/node/api"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Bindings are checked before anything is committed: what is bound has to be required, and the target has to provide it. A target that no application has is let
// pass, for another deploy may bring it, and shown when it lasts.

// wiring is the desired state as a command would leave it.
type wiring struct {
	n        *Node
	effs     map[string]*components.Effective // by component
	affected func(component string) bool      // by the command
}

// wiringWith is desired state with these applications in place of their former selves.
func (n *Node) wiringWith(next ...*componentsv1.Application) (*wiring, error) {
	w := &wiring{n: n, effs: map[string]*components.Effective{}}
	apps := map[string]*componentsv1.Application{}
	for _, a := range n.applications() {
		apps[a.GetName()] = a.Application
	}
	for _, a := range next {
		apps[a.GetName()] = a
	}
	for _, a := range apps {
		effs, err := components.Effectives(a)
		if err != nil {
			return nil, err
		}
		for _, e := range effs {
			w.effs[e.Key()] = e
		}
	}
	w.affected = func(component string) bool {
		t, err := components.ParseTarget(component)
		return err == nil && slices.ContainsFunc(next, func(a *componentsv1.Application) bool { return a.GetName() == t.Application })
	}
	return w, nil
}

// check fails with the first binding that leads to what does not fit, of those that the command has to do with.
func (w *wiring) check(ctx context.Context, what string) error {
	for _, key := range slices.Sorted(maps.Keys(w.effs)) {
		e := w.effs[key]
		for _, name := range slices.Sorted(maps.Keys(e.Spec.GetBindings())) {
			if err := w.binding(ctx, what, e, name, e.Spec.GetBindings()[name]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *wiring) binding(ctx context.Context, what string, e *components.Effective, name, target string) error {
	t, err := components.ParseTargetIn(e.Application, target)
	if err != nil {
		return fail(what, err)
	}
	to := w.effs[t.Key()]
	if !w.affected(e.Key()) && (to == nil || !w.affected(to.Key())) {
		return nil
	}
	desc, err := w.describe(ctx, what, e)
	if err != nil || desc == nil {
		return err
	}
	i := slices.IndexFunc(desc.GetRequires(), func(r *componentv1.Interface) bool { return r.GetName() == name })
	if i < 0 {
		if !w.affected(e.Key()) {
			return nil
		}
		return api.Fail(connect.CodeInvalidArgument, what, fmt.Sprintf("bindings.%s of %s: %s@%s requires no interface of this name; it requires %s",
			name, e.Key(), e.ArtifactName, e.Version, listed(requiredBy(desc))), "coppice registry show "+e.ArtifactName)
	}
	if to == nil {
		return nil
	}
	provider, err := w.describe(ctx, what, to)
	if err != nil || provider == nil {
		return err
	}
	if err := components.Provides(provider, desc.GetRequires()[i]); err != nil {
		return api.Fail(connect.CodeFailedPrecondition, what, fmt.Sprintf("interface %s of %s is bound to %s (%s@%s), which does not fit: %s",
			name, e.Key(), to.Key(), to.ArtifactName, to.Version, err), "coppice registry show "+to.ArtifactName)
	}
	return nil
}

// describe is what a component's artifact says of itself. Of one that the command does not change nothing is said when it cannot be had now.
func (w *wiring) describe(ctx context.Context, what string, e *components.Effective) (*componentv1.Description, error) {
	if e.Digest == "" {
		return nil, nil
	}
	desc, err := w.n.artifacts().Description(ctx, e.Digest)
	if err != nil && w.affected(e.Key()) {
		return nil, fail(what, err)
	}
	if err != nil {
		w.n.log.Debug("bindings are not checked", "component", e.Key(), "error", err)
		return nil, nil
	}
	return desc, nil
}

func requiredBy(d *componentv1.Description) []string {
	var out []string
	for _, i := range d.GetRequires() {
		out = append(out, i.GetName())
	}
	return out
}

// unfit lists what callers of the running version would miss or misread at the next one.
func (n *Node) unfit(ctx context.Context, from, to string) []string {
	if from == "" || from == to {
		return nil
	}
	old, err := n.artifacts().Description(ctx, from)
	if err != nil || old == nil {
		return nil // what it was is not known here any more
	}
	next, err := n.artifacts().Description(ctx, to)
	if err != nil || next == nil {
		return nil // a program; or its own check has said so
	}
	return components.Substitutes(old, next)
}

// changedTypes are warnings of a deploy: what callers of a component that gets another version would miss.
func (n *Node) changedTypes(ctx context.Context, apps []*desired) []string {
	var out []string
	for _, d := range apps {
		if !d.have {
			continue
		}
		effs, err := components.Effectives(d.next)
		if err != nil {
			continue // the deploy itself says so
		}
		for _, e := range effs {
			was, err := components.EffectiveOf(d.old.Application, e.Name)
			if err != nil || was == nil {
				continue
			}
			if lost := n.unfit(ctx, was.Digest, e.Digest); len(lost) > 0 {
				out = append(out, fmt.Sprintf("%s: callers of %s will miss in %s: %s", e.Key(), was.Version, e.Version, strings.Join(lost, "; ")))
			}
		}
	}
	return out
}
