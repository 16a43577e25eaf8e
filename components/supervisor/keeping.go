package supervisor

import (
	"cmp"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// keeping is what desired state says of how the state of a component's instances is kept. The zero value: nothing.
type keeping struct {
	replicas, least int // nodes that should keep each checkpoint, and that a commit waits for; 0: not said
	standby         string
}

// keepingAt is a keeping as one register said it.
type keepingAt struct {
	keeping
	incarnation, index uint64 // of the application's register
}

// keeping looks up what desired state says of a component. It is asked at each commit, so it is worked out once for each change of the application.
func (s *Supervisor) keeping(component string) keeping {
	app, name, _ := strings.Cut(component, "/")
	reg, ok := s.register(components.ApplicationRegister(app))
	if !ok {
		return keeping{}
	}
	s.mu.Lock()
	k, known := s.keepings[component]
	s.mu.Unlock()
	if known && k.incarnation == reg.Incarnation && k.index == reg.Index {
		return k.keeping
	}
	k = keepingAt{incarnation: reg.Incarnation, index: reg.Index}
	var a componentsv1.Application
	if proto.Unmarshal(reg.Body, &a) == nil {
		if eff, err := components.EffectiveOf(&a, name); err == nil && eff != nil {
			k.keeping = keeping{eff.Replicas, eff.MinReplicas, eff.Standby}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keepings[component] = k
	return k.keeping
}

// keepingOf is keeping for the component of an instance's register.
func (s *Supervisor) keepingOf(key string) (k keeping, body *componentsv1.InstanceBody) {
	reg, ok := s.register(key)
	if !ok {
		return k, nil
	}
	body = &componentsv1.InstanceBody{}
	if proto.Unmarshal(reg.Body, body) != nil {
		return k, nil
	}
	return s.keeping(body.GetComponent()), body
}

// wantedOf is how many nodes should keep an instance's checkpoints by what its manifest says; 0: as many of the usual number as there are.
func (s *Supervisor) wantedOf(key string) int {
	k, _ := s.keepingOf(key)
	return max(k.replicas, k.least)
}

// copiesOf is how many nodes should keep an instance's checkpoints where there are so many.
func (s *Supervisor) copiesOf(k keeping) int { return max(cmp.Or(k.replicas, s.cfg.Copies), k.least) }
