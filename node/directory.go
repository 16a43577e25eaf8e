package node

import (
	"context"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/membrane"
)

// directory tells the router where targets are served, from the registers that this node sees. No call waits for it.
type directory struct {
	n *Node

	mu      sync.Mutex // guards the maps
	changed map[string]chan struct{}
	methods map[string]*membrane.Methods // by digest
	loading map[string]bool
}

func newDirectory(n *Node) *directory {
	return &directory{n: n, changed: map[string]chan struct{}{}, methods: map[string]*membrane.Methods{}, loading: map[string]bool{}}
}

// Resolve implements membrane.Directory.
func (d *directory) Resolve(target, shardKey string) (membrane.Route, error) {
	t, err := components.ParseTarget(target)
	if err != nil {
		return membrane.Route{}, fmt.Errorf("%w: %w", membrane.ErrUnknownTarget, err)
	}
	name := t.Instance()
	if name == "" {
		if name, err = d.pick(t, shardKey); err != nil {
			return membrane.Route{}, err
		}
	}
	reg, ok := d.n.sup.Register(components.InstanceRegister(name))
	if !ok {
		if _, ok := d.n.application(t.Application); !ok {
			return membrane.Route{}, fmt.Errorf("%w: there is no application %s", membrane.ErrUnknownTarget, t.Application)
		}
		return membrane.Route{}, fmt.Errorf("%s: %w", name, membrane.ErrNoOwner)
	}
	if reg.Owner == "" {
		return membrane.Route{}, fmt.Errorf("%s: %w", name, membrane.ErrNoOwner)
	}
	return membrane.Route{
		Instance: name, Node: reg.Owner.String(), Token: membrane.Token{Incarnation: reg.Incarnation, Epoch: reg.Epoch}, Methods: d.methodsOf(reg),
	}, nil
}

// pick chooses the instance of a component. One: that. Several: by the shard key where there is one; without, one on this node for a
// stateless component, else another that lives.
func (d *directory) pick(t components.Target, shardKey string) (string, error) {
	regs := d.n.arbiter.List(components.InstancePrefix + t.Key())
	var names []string
	var here, alive []string
	for _, reg := range regs {
		name := components.InstanceOfKey(reg.Key)
		if componentOf(name) != t.Key() {
			continue
		}
		names = append(names, name)
		if reg.Owner == d.n.id {
			here = append(here, name)
		}
		if reg.Owner != "" && d.n.isAlive(reg.Owner) {
			alive = append(alive, name)
		}
	}
	switch {
	case len(names) == 0:
		if _, ok := d.n.application(t.Application); !ok {
			return "", fmt.Errorf("%w: there is no application %s", membrane.ErrUnknownTarget, t.Application)
		}
		return "", fmt.Errorf("%s: %w", t.Key(), membrane.ErrNoOwner)
	case len(names) == 1:
		return names[0], nil
	case shardKey != "":
		slices.SortFunc(names, func(a, b string) int { return strings.Compare(a, b) })
		h := fnv.New64a()
		if _, err := h.Write([]byte(shardKey)); err != nil {
			return "", err
		}
		return names[h.Sum64()%uint64(len(names))], nil
	case d.stateful(t):
		return "", fmt.Errorf("%w: %s has %d instances with state of their own: name one of %s, or send x-shard-key", membrane.ErrNeedsShard, t.Key(), len(names), strings.Join(names, ", "))
	case len(here) > 0:
		return here[0], nil
	case len(alive) > 0:
		return alive[int(d.n.nonce()%uint64(len(alive)))], nil
	}
	return names[0], nil
}

func (d *directory) stateful(t components.Target) bool {
	a, ok := d.n.application(t.Application)
	if !ok {
		return false
	}
	eff, err := components.EffectiveOf(a.Application, t.Component)
	return err == nil && eff != nil && eff.Durable != componentsv1.Durability_DURABILITY_NONE
}

// methodsOf returns what is known of the calls of an instance. It is loaded in the background the first time.
func (d *directory) methodsOf(reg arbiter.Register) *membrane.Methods {
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		return nil
	}
	digest := body.GetDigest()
	d.mu.Lock()
	defer d.mu.Unlock()
	if m, ok := d.methods[digest]; ok || d.loading[digest] || strings.HasPrefix(digest, "builtin:") {
		return m
	}
	d.loading[digest] = true
	go d.load(digest)
	return nil
}

func (d *directory) load(digest string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := d.loaded(ctx, digest)
	d.n.faults.set("description of "+digest, err)
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.loading, digest)
}

// loaded returns the calls of an artifact; they are worked out once.
func (d *directory) loaded(ctx context.Context, digest string) (*membrane.Methods, error) {
	d.mu.Lock()
	m := d.methods[digest]
	d.mu.Unlock()
	if m != nil {
		return m, nil
	}
	desc, err := d.n.artifacts().Description(ctx, digest)
	if err != nil {
		return nil, err
	}
	m = membrane.NewMethods(desc)
	if desc == nil { // a program says nothing of itself
		return m, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.methods[digest] = m
	return m, nil
}

// Changed implements membrane.Directory.
func (d *directory) Changed(target string) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	key := componentOf(target)
	ch := d.changed[key]
	if ch == nil {
		ch = make(chan struct{})
		d.changed[key] = ch
	}
	return ch
}

// tell wakes those who wait for another route of a component.
func (d *directory) tell(component string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ch := d.changed[component]; ch != nil {
		close(ch)
		delete(d.changed, component)
	}
}
