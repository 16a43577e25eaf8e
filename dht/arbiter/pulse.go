package arbiter

import "sync"

// pulse wakes whoever waits for something to have changed.
type pulse struct {
	mu sync.Mutex // guards ch
	ch chan struct{}
}

// next returns a channel that closes at the next beat. Take it before looking at what may change.
func (p *pulse) next() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ch == nil {
		p.ch = make(chan struct{})
	}
	return p.ch
}

func (p *pulse) beat() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ch != nil {
		close(p.ch)
		p.ch = nil
	}
}
