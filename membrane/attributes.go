package membrane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/dynamicpb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// ErrRevision says that the attributes have changed since they were read.
var ErrRevision = errors.New("the attributes have changed since")

// Attribute is one attribute as people see it.
type Attribute struct {
	Name           string
	JSON           []byte // its value; nil when it has none; empty quotes when it is secret
	Type           string // protobuf message type; "" for any JSON
	ReadOnly       bool
	RestartToApply bool
	Secret         bool
	Default        bool // JSON is the description's default
}

// AttributeError is what is wrong with one attribute of a change.
type AttributeError struct {
	Name, Problem string
}

func (e *AttributeError) Error() string { return "attribute " + e.Name + ": " + e.Problem }

// Attributes lists the attributes with their values, and the revision to give to SetAttributes. A component that does not run, or does
// not offer them, shows the defaults and revision 0.
func (m *Membrane) Attributes(ctx context.Context) ([]Attribute, uint64, error) {
	b := m.Backend()
	if b == nil {
		return nil, 0, fmt.Errorf("attributes of %s: no process", m.cfg.Instance)
	}
	var have *componentv1.Attributes
	if s, _ := m.State(); s == Running || s == Frozen {
		var err error
		have, err = b.client.GetAttributes(ctx, &componentv1.AttributeNames{})
		if err != nil && !errors.Is(optional(err), errUnimplemented) {
			return nil, 0, fmt.Errorf("attributes of %s: %w", m.cfg.Instance, err)
		}
	}
	return listAttributes(b.desc, have), have.GetRevision(), nil
}

func listAttributes(d *componentv1.Description, have *componentv1.Attributes) []Attribute {
	var out []Attribute
	for _, s := range d.GetAttributes() {
		a := Attribute{
			Name: s.GetName(), Type: s.GetMessageType(), ReadOnly: s.GetReadOnly(), RestartToApply: s.GetRestartToApply(), Secret: s.GetSecret(),
		}
		v, ok := have.GetJson()[s.GetName()]
		switch {
		case ok:
			a.JSON = v
		case len(s.GetDefaultJson()) > 0:
			a.JSON, a.Default = s.GetDefaultJson(), true
		}
		if a.Secret && a.JSON != nil {
			a.JSON = []byte(`""`)
		}
		out = append(out, a)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// CheckAttributes says everything that is wrong with values before any process sees them: unknown and read-only names, JSON that does
// not parse, JSON that is not of the attribute's message type. Rules inside the messages are the component's to check.
func CheckAttributes(d *componentv1.Description, methods *Methods, values map[string][]byte) error {
	specs := map[string]*componentv1.AttributeSpec{}
	var names []string
	for _, s := range d.GetAttributes() {
		specs[s.GetName()] = s
		names = append(names, s.GetName())
	}
	sort.Strings(names)
	var errs []error
	for _, name := range sortedKeys(values) {
		bad := func(format string, args ...any) {
			errs = append(errs, &AttributeError{name, fmt.Sprintf(format, args...)})
		}
		s := specs[name]
		switch {
		case s == nil && len(names) == 0:
			bad("the component has no attributes")
			continue
		case s == nil:
			bad("there is none of that name; there are %s", strings.Join(names, ", "))
			continue
		case s.GetReadOnly():
			bad("it is read-only")
			continue
		}
		if !json.Valid(values[name]) {
			bad("%.60q is not JSON; text needs quotes", values[name])
			continue
		}
		if md := methods.Message(s.GetMessageType()); md != nil {
			if err := protojson.Unmarshal(values[name], dynamicpb.NewMessage(md)); err != nil {
				bad("%.60s is no %s: %s", values[name], s.GetMessageType(), strings.TrimPrefix(err.Error(), "proto: "))
			}
		}
	}
	return errors.Join(errs...)
}

func sortedKeys(m map[string][]byte) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// SetResult is what a change of attributes came to.
type SetResult struct {
	Attributes []Attribute
	Revision   uint64
	// Restart lists the changed attributes that take effect only when the process is started again.
	Restart []string
}

// SetAttributes changes attributes of the running component. ifRevision 0 changes them whatever they are now; otherwise the error wraps
// ErrRevision when they have changed since. dryRun checks only. The component's own refusal comes back as it put it.
func (m *Membrane) SetAttributes(ctx context.Context, values map[string][]byte, ifRevision uint64, dryRun bool) (*SetResult, error) {
	b := m.Backend()
	if b == nil {
		return nil, fmt.Errorf("set attributes of %s: no process", m.cfg.Instance)
	}
	if err := CheckAttributes(b.desc, b.methods, values); err != nil {
		return nil, fmt.Errorf("set attributes of %s: %w", m.cfg.Instance, err)
	}
	have, err := b.client.SetAttributes(ctx, &componentv1.SetAttributesRequest{Json: values, IfRevision: ifRevision, DryRun: dryRun})
	switch {
	case status.Code(err) == codes.Aborted, ifRevision != 0 && status.Code(err) == codes.FailedPrecondition:
		return nil, fmt.Errorf("set attributes of %s: %w: %s", m.cfg.Instance, ErrRevision, status.Convert(err).Message())
	case err != nil:
		return nil, fmt.Errorf("set attributes of %s: %w", m.cfg.Instance, optional(err))
	}
	res := &SetResult{Attributes: listAttributes(b.desc, have), Revision: have.GetRevision()}
	for _, s := range b.desc.GetAttributes() {
		if _, changed := values[s.GetName()]; changed && s.GetRestartToApply() {
			res.Restart = append(res.Restart, s.GetName())
		}
	}
	return res, nil
}
