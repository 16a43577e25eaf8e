package membrane

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Binding is a required interface and where it leads.
type Binding struct {
	Name     string
	Service  string
	Kind     componentv1.Kind
	Optional bool
	Many     bool
	Declared bool     // the component's description requires it
	Targets  []string // app/name or app/name-0; empty: not bound
	Revision uint64   // +1 with each change
}

// declare takes the required interfaces of a description into the table. Targets that are bound already stay.
func (m *Membrane) declare(d *componentv1.Description) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := map[string]*Binding{}
	for name, b := range m.bindings {
		if len(b.Targets) > 0 {
			c := *b
			c.Declared = false
			next[name] = &c
		}
	}
	for _, r := range d.GetRequires() {
		b := &Binding{Name: r.GetName()}
		if old := m.bindings[r.GetName()]; old != nil {
			b.Targets, b.Revision = old.Targets, old.Revision
		}
		b.Service, b.Kind, b.Optional, b.Many, b.Declared = r.GetService(), r.GetKind(), r.GetOptional(), r.GetMany(), true
		next[r.GetName()] = b
	}
	m.bindings = next
}

// unbound lists the mandatory interfaces of a description that lead nowhere. Events come from channels, not from targets.
func (m *Membrane) unbound(d *componentv1.Description) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, r := range d.GetRequires() {
		if r.GetOptional() || r.GetKind() == componentv1.Kind_KIND_EVENT {
			continue
		}
		if b := m.bindings[r.GetName()]; b == nil || len(b.Targets) == 0 {
			out = append(out, r.GetName())
		}
	}
	return out
}

func (b *Binding) state() *componentv1.BindingState {
	return &componentv1.BindingState{Name: b.Name, Service: b.Service, Bound: len(b.Targets) > 0, Epoch: b.Revision, Targets: slices.Clone(b.Targets)}
}

func (m *Membrane) bindingStates() []*componentv1.BindingState {
	var out []*componentv1.BindingState
	for _, b := range m.Bindings() {
		out = append(out, b.state())
	}
	return out
}

// Bindings lists the required interfaces by name.
func (m *Membrane) Bindings() []Binding {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]Binding, 0, len(m.bindings))
	for _, b := range m.bindings {
		c := *b
		c.Targets = slices.Clone(b.Targets)
		out = append(out, c)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// Lookup returns where a required interface leads.
func (m *Membrane) Lookup(name string) (Binding, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.bindings[name]
	if b == nil {
		return Binding{}, false
	}
	return *b, true // Targets is replaced, never changed
}

// Bind leads a required interface to its targets. Before Start any name may be bound; afterwards only what the component requires. The
// running component is told; when that fails the binding holds all the same and the error says so.
func (m *Membrane) Bind(ctx context.Context, name string, targets ...string) error {
	if len(targets) == 0 {
		return fmt.Errorf("bind %s of %s: no target", name, m.cfg.Instance)
	}
	return m.rebind(ctx, name, targets)
}

// Unbind leads a required interface nowhere. A mandatory one of a running component cannot be unbound.
func (m *Membrane) Unbind(ctx context.Context, name string) error {
	return m.rebind(ctx, name, nil)
}

func (m *Membrane) rebind(ctx context.Context, name string, targets []string) error {
	m.mu.Lock()
	old := m.bindings[name]
	live := m.state == Running || m.state == Frozen
	if err := m.mayRebind(old, name, targets, live); err != nil {
		m.mu.Unlock()
		return err
	}
	b := &Binding{Name: name}
	if old != nil {
		*b = *old
	}
	if slices.Equal(b.Targets, targets) {
		m.mu.Unlock()
		return nil
	}
	b.Targets = slices.Clone(targets)
	b.Revision++
	m.bindings[name] = b
	st := b.state()
	m.mu.Unlock()
	back := m.Backend()
	if !live || back == nil || back.dead() {
		return nil
	}
	if _, err := back.client.BindingChanged(ctx, st); err != nil && !errors.Is(optional(err), errUnimplemented) {
		return fmt.Errorf("binding %s of %s is changed, but the component was not told: %w", name, m.cfg.Instance, err)
	}
	return nil
}

// mayRebind is called with the lock held.
func (m *Membrane) mayRebind(old *Binding, name string, targets []string, live bool) error {
	switch {
	case live && (old == nil || !old.Declared):
		var names []string
		for n, b := range m.bindings {
			if b.Declared {
				names = append(names, n)
			}
		}
		sort.Strings(names)
		return fmt.Errorf("bind %s of %s: the component requires no such interface; it requires %v", name, m.cfg.Instance, names)
	case old != nil && old.Declared && !old.Many && len(targets) > 1:
		return fmt.Errorf("bind %s of %s: it takes one target, %d were given", name, m.cfg.Instance, len(targets))
	case live && len(targets) == 0 && !old.Optional:
		return fmt.Errorf("unbind %s of %s: it is mandatory and the component runs; bind it elsewhere or stop the component", name, m.cfg.Instance)
	}
	return nil
}
