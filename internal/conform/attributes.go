package conform

import (
	"bytes"
	"context"
	"fmt"

	"google.golang.org/grpc/codes"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func attributes() []check {
	return []check{
		{"attributes", "each has its default after a start without any", defaults},
		{"attributes", "what is set is read, with a higher revision; a dry run changes nothing", setAndRead},
		{"attributes", "an unknown name, a value of another type, a stale revision and a read-only one are refused, and nothing is set", refusedSets},
	}
}

// attributed starts a process and reads its attributes.
func (r *rig) attributed(ctx context.Context) (*process, *componentv1.Attributes, error) {
	if len(r.desc.GetAttributes()) == 0 {
		return nil, nil, skip("no attributes")
	}
	p, err := r.start(ctx)
	if err != nil {
		return nil, nil, err
	}
	have, err := p.control.GetAttributes(ctx, &componentv1.AttributeNames{})
	return p, have, err
}

func defaults(ctx context.Context, r *rig) error {
	_, have, err := r.attributed(ctx)
	if err != nil {
		return err
	}
	for _, a := range r.desc.GetAttributes() {
		got, ok := have.GetJson()[a.GetName()]
		if !ok {
			return fmt.Errorf("GetAttributes does not answer %q", a.GetName())
		}
		if len(a.GetDefaultJson()) > 0 && !a.GetReadOnly() && !bytes.Equal(got, a.GetDefaultJson()) {
			return fmt.Errorf("%q is %s after the start, its default is %s", a.GetName(), got, a.GetDefaultJson())
		}
	}
	return nil
}

// settable is an attribute that takes its own default as a value.
func (r *rig) settable() *componentv1.AttributeSpec {
	for _, a := range r.desc.GetAttributes() {
		if !a.GetReadOnly() && len(a.GetDefaultJson()) > 0 {
			return a
		}
	}
	return nil
}

func setAndRead(ctx context.Context, r *rig) error {
	p, have, err := r.attributed(ctx)
	if err != nil {
		return err
	}
	a := r.settable()
	if a == nil {
		return skip("none that can be set")
	}
	values := map[string][]byte{a.GetName(): a.GetDefaultJson()}
	if _, err := p.control.SetAttributes(ctx, &componentv1.SetAttributesRequest{Json: values, DryRun: true}); err != nil {
		return fmt.Errorf("a dry run of the default of %q: %w", a.GetName(), err)
	}
	again, err := p.control.GetAttributes(ctx, &componentv1.AttributeNames{Names: []string{a.GetName()}})
	if err != nil {
		return err
	}
	if again.GetRevision() != have.GetRevision() || len(again.GetJson()) != 1 {
		return fmt.Errorf("after a dry run: revision %d (before: %d), %d values, want the one that was asked for", again.GetRevision(), have.GetRevision(), len(again.GetJson()))
	}
	set, err := p.control.SetAttributes(ctx, &componentv1.SetAttributesRequest{Json: values, IfRevision: have.GetRevision()})
	if err != nil {
		return err
	}
	if set.GetRevision() <= have.GetRevision() {
		return fmt.Errorf("revision %d after %d: it has to rise", set.GetRevision(), have.GetRevision())
	}
	return nil
}

func refusedSets(ctx context.Context, r *rig) error {
	p, have, err := r.attributed(ctx)
	if err != nil {
		return err
	}
	set := func(what string, req *componentv1.SetAttributesRequest, want ...codes.Code) error {
		_, err := p.control.SetAttributes(ctx, req)
		return refused(what, err, want...)
	}
	if err := set("an unknown name", &componentv1.SetAttributesRequest{Json: map[string][]byte{"no-such-attribute": []byte("1")}}, codes.InvalidArgument, codes.NotFound); err != nil {
		return err
	}
	if a := r.settable(); a != nil {
		for what, req := range map[string]*componentv1.SetAttributesRequest{
			"a value that is no JSON of its type": {Json: map[string][]byte{a.GetName(): []byte(`{"no":["such`)}},
			"an unknown name beside a good one":   {Json: map[string][]byte{a.GetName(): a.GetDefaultJson(), "no-such-attribute": []byte("1")}},
		} {
			if err := set(what, req, codes.InvalidArgument, codes.NotFound); err != nil {
				return err
			}
		}
		stale := &componentv1.SetAttributesRequest{Json: map[string][]byte{a.GetName(): a.GetDefaultJson()}, IfRevision: have.GetRevision() + 7}
		if err := set("a revision that is not the newest", stale, codes.Aborted, codes.FailedPrecondition); err != nil {
			return err
		}
	}
	for _, a := range r.desc.GetAttributes() {
		if a.GetReadOnly() {
			if err := set("a read-only one", &componentv1.SetAttributesRequest{Json: map[string][]byte{a.GetName(): a.GetDefaultJson()}}, codes.FailedPrecondition, codes.InvalidArgument); err != nil {
				return err
			}
		}
	}
	now, err := p.control.GetAttributes(ctx, &componentv1.AttributeNames{})
	if err != nil {
		return err
	}
	if now.GetRevision() != have.GetRevision() {
		return fmt.Errorf("revision %d after sets that were refused, %d before", now.GetRevision(), have.GetRevision())
	}
	return nil
}
