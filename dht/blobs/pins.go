package blobs

import (
	"sync"
	"time"
)

// pins are what the collector must keep beside the live roots: timed ones, set by whoever relied on a node being here, and named ones,
// which their holder renews. A pin covers everything below its node.
type pins struct {
	mu    sync.Mutex // guards all below
	ttl   time.Duration
	timed map[Hash]time.Time
	named map[string]namedPin
	// log is what was relied on since a collection began; nil while none runs.
	log map[Hash]struct{}
}

type namedPin struct {
	roots []Hash
	until time.Time
}

func newPins(ttl time.Duration) *pins {
	return &pins{ttl: ttl, timed: map[Hash]time.Time{}, named: map[string]namedPin{}}
}

// Pin keeps roots and all below them until ttl has passed, under a name; pinning again under the same name replaces roots and time.
// The roots need not be here yet.
func (s *Store) Pin(name string, ttl time.Duration, roots ...Hash) { s.pins.hold(name, ttl, roots) }

// Unpin ends a named pin.
func (s *Store) Unpin(name string) { s.pins.release(name) }

func (p *pins) hold(name string, ttl time.Duration, roots []Hash) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.named[name] = namedPin{roots: append([]Hash(nil), roots...), until: time.Now().Add(ttl)}
	for _, h := range roots {
		p.note(h)
	}
}

func (p *pins) release(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.named, name)
}

// note is called under mu.
func (p *pins) note(h Hash) {
	if p.log != nil {
		p.log[h] = struct{}{}
	}
}

// touch notes that somebody relies on h for the length of a collection.
func (p *pins) touch(h Hash) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(h)
}

// pin keeps h for the time of the store.
func (p *pins) pin(h Hash) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(h)
	p.timed[h] = time.Now().Add(p.ttl)
}

// put is called when h, which links to others, was kept or found complete. With pin, h is pinned and covers from now on what the pins
// of its links covered: a chain holds one pin, at its end.
func (p *pins) put(h Hash, links []Link, pin bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note(h)
	if !pin {
		return
	}
	p.timed[h] = time.Now().Add(p.ttl)
	for _, l := range links {
		if l.Hash != h {
			delete(p.timed, l.Hash)
		}
	}
}

// begin starts the log of a collection and returns all that is pinned; end stops it.
func (p *pins) begin() []Hash {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prune()
	p.log = map[Hash]struct{}{}
	roots := make([]Hash, 0, len(p.timed)+len(p.named))
	for h := range p.timed {
		roots = append(roots, h)
	}
	for _, n := range p.named {
		roots = append(roots, n.roots...)
	}
	return roots
}

func (p *pins) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = nil
}

// logged takes what was logged since the last call.
func (p *pins) logged() []Hash {
	p.mu.Lock()
	defer p.mu.Unlock()
	hs := make([]Hash, 0, len(p.log))
	for h := range p.log {
		hs = append(hs, h)
	}
	clear(p.log)
	return hs
}

// prune forgets what has run out; called under mu.
func (p *pins) prune() {
	now := time.Now()
	for h, until := range p.timed {
		if !until.After(now) {
			delete(p.timed, h)
		}
	}
	for name, n := range p.named {
		if !n.until.After(now) {
			delete(p.named, name)
		}
	}
}

// expire prunes on its own where no collection does, and returns how many pins there are.
func (p *pins) expire() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prune()
	return len(p.timed) + len(p.named)
}

func (p *pins) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.timed) + len(p.named)
}
