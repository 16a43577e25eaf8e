package membrane

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// watch looks after a process from now on: its end and its heartbeats. The one watched before is not looked after any more.
func (m *Membrane) watch(b *Backend) {
	ctx, cancel := context.WithCancel(context.Background())
	m.mu.Lock()
	if m.cancel != nil {
		m.cancel()
	}
	m.cancel, m.watched = cancel, b
	m.mu.Unlock()
	go m.watchEnd(ctx, b)
	go m.beat(ctx, b)
}

func (m *Membrane) unwatch() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cancel != nil {
		m.cancel()
	}
	m.cancel, m.watched = nil, nil
}

// watchEnd holds the gate as soon as the process has ended, so that calls wait for its successor instead of failing.
func (m *Membrane) watchEnd(ctx context.Context, b *Backend) {
	select {
	case <-ctx.Done():
		return
	case <-b.proc.Done():
	}
	m.mu.Lock()
	mine := m.watched == b
	m.mu.Unlock()
	if !mine {
		return // it was stopped, or replaced, on purpose
	}
	exit := b.proc.Exit()
	held := m.gate.change(func(p *phase) error {
		if p.backend != b || p.mode == gateClosed {
			return fmt.Errorf("another process serves")
		}
		p.mode, p.why = gateHeld, "its process ended ("+exit.String()+")"
		return nil
	})
	if held != nil {
		return // it was replaced in this very moment
	}
	if _, err := m.move(VerbFail, "its process ended: "+exit.String()); err != nil {
		m.cfg.Log.Warn("lifecycle", "instance", m.cfg.Instance, "error", err)
	}
	if m.cfg.OnEnd != nil {
		m.cfg.OnEnd(b, exit)
	}
}

// beat asks for a heartbeat again and again. The component answers it where it runs its calls, so a deadlock there is seen; a process
// that is stopped (SIGSTOP) is seen as well.
func (m *Membrane) beat(ctx context.Context, b *Backend) {
	t := time.NewTicker(m.cfg.HeartbeatEvery)
	defer t.Stop()
	misses, told := 0, false
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.proc.Done():
			return
		case <-t.C:
		}
		err := m.beatOnce(ctx, b)
		switch {
		case ctx.Err() != nil || b.dead():
			return
		case err == nil:
			misses, told = 0, false
			continue
		case status.Code(err) == codes.Unimplemented:
			m.cfg.Log.Warn("the component offers no Heartbeat, which the contract demands: hangs are not noticed", "instance", m.cfg.Instance)
			return
		}
		misses++
		m.cfg.Log.Debug("heartbeat missed", "instance", m.cfg.Instance, "misses", misses, "error", err)
		if misses >= m.cfg.HeartbeatMisses && !told {
			told = true
			if m.cfg.OnHung != nil {
				m.cfg.OnHung(b, fmt.Errorf("%s: %d heartbeats missed, each given %s: %w", m.cfg.Instance, misses, m.cfg.HeartbeatTimeout, err))
			}
		}
	}
}

func (m *Membrane) beatOnce(ctx context.Context, b *Backend) error {
	ctx, cancel := context.WithTimeout(ctx, m.cfg.HeartbeatTimeout)
	defer cancel()
	_, err := b.Heartbeat(ctx, m.Token())
	return err
}
