package node

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func (v *verbs) Attr(ctx context.Context, r *apiv1.AttrRequest) (*apiv1.AttrResponse, error) {
	n := v.n
	s, err := n.find("attr", r.GetComponent())
	if err != nil {
		return nil, err
	}
	what := "attr " + s.component
	desc, err := n.artifacts().Description(ctx, s.eff.Digest)
	if err != nil && !systemComponent(s.component) {
		return nil, fail(what, err)
	}
	out := &apiv1.AttrResponse{Component: s.component, DryRun: r.GetDryRun()}
	set := map[string]string{}
	for k, val := range r.GetSet() {
		spec := attributeSpec(desc, k)
		if spec == nil {
			return nil, api.Fail(connect.CodeNotFound, what, fmt.Sprintf("it has no attribute %q; it has %s", k, attributeNames(desc)), "coppice attr "+s.component)
		}
		if spec.GetReadOnly() {
			return nil, api.Fail(connect.CodeFailedPrecondition, what, k+" can only be read", "")
		}
		if !json.Valid([]byte(val)) {
			quoted, err := json.Marshal(val)
			if err != nil {
				return nil, fail(what, err)
			}
			val = string(quoted)
		}
		set[k] = val
		out.RestartNeeded = out.RestartNeeded || spec.GetRestartToApply()
	}
	if len(set) > 0 {
		if err := v.checkAttributes(ctx, what, s, set); err != nil {
			return nil, err
		}
		if !r.GetDryRun() {
			if err := n.layOver(ctx, s, func(o *componentsv1.Overlay) {
				if o.Attributes == nil {
					o.Attributes = map[string]string{}
				}
				maps.Copy(o.Attributes, set)
			}); err != nil {
				return nil, fail(what, err)
			}
			if s, err = n.find("attr", s.component); err != nil {
				return nil, err
			}
		}
	}
	out.Attributes, out.Revision = attributeInfos(desc, s), s.app.revision
	for _, a := range out.GetAttributes() {
		if val, ok := set[a.GetName()]; ok && r.GetDryRun() && !a.GetSecret() {
			a.Value, a.From = val, "command"
		}
	}
	return out, nil
}

func (v *verbs) Bind(ctx context.Context, r *apiv1.BindRequest) (*apiv1.BindResponse, error) {
	n := v.n
	s, err := n.find("bind", r.GetComponent())
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("bind %s %s", s.component, r.GetInterface())
	target, err := n.find("bind to", r.GetTarget())
	if err != nil {
		return nil, err
	}
	desc, err := n.artifacts().Description(ctx, s.eff.Digest)
	if err != nil {
		return nil, fail(what, err)
	}
	i := slices.IndexFunc(desc.GetRequires(), func(i *componentv1.Interface) bool { return i.GetName() == r.GetInterface() })
	if i < 0 {
		return nil, api.Fail(connect.CodeNotFound, what, fmt.Sprintf("it requires no interface of this name; it requires %s", listed(requiredBy(desc))), "coppice inspect "+s.component)
	}
	provider, err := n.artifacts().Description(ctx, target.eff.Digest)
	if err != nil {
		return nil, fail(what, err)
	}
	if err := components.Provides(provider, desc.GetRequires()[i]); err != nil {
		return nil, api.Fail(connect.CodeFailedPrecondition, what, fmt.Sprintf("%s (%s@%s) does not fit: %s", target.component, target.eff.ArtifactName, target.eff.Version, err),
			"coppice registry show "+target.eff.ArtifactName)
	}
	to := target.component
	if len(target.instances) == 1 && strings.HasSuffix(r.GetTarget(), target.instances[0]) {
		to = target.instances[0]
	}
	return v.rebind(ctx, what, s, func(o *componentsv1.Overlay) {
		if o.Bindings == nil {
			o.Bindings = map[string]string{}
		}
		o.Bindings[r.GetInterface()] = to
	})
}

func (v *verbs) Unbind(ctx context.Context, r *apiv1.UnbindRequest) (*apiv1.BindResponse, error) {
	s, err := v.n.find("unbind", r.GetComponent())
	if err != nil {
		return nil, err
	}
	return v.rebind(ctx, "unbind "+s.component, s, func(o *componentsv1.Overlay) {
		if o.Bindings == nil {
			o.Bindings = map[string]string{}
		}
		o.Bindings[r.GetInterface()] = ""
	})
}

func (v *verbs) rebind(ctx context.Context, what string, s subject, change func(*componentsv1.Overlay)) (*apiv1.BindResponse, error) {
	if err := v.n.layOver(ctx, s, change); err != nil {
		return nil, fail(what, err)
	}
	s, err := v.n.find(what, s.component)
	if err != nil {
		return nil, err
	}
	list, err := v.n.bindings(ctx, s)
	if err != nil {
		return nil, fail(what, err)
	}
	return &apiv1.BindResponse{Component: s.component, Bindings: list}, nil
}
