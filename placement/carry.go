package placement

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// remember notes which epochs are new, and gives the memory for a snapshot. Epochs it sees for the first time count as moved now.
func (c *Coordinator) remember(v View) Memory {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	m := Memory{Now: now, Since: map[string]time.Time{}, Avoid: map[string][]string{}}
	there := map[string]bool{}
	for _, r := range v.Instances {
		there[r.Instance] = true
		s, ok := c.since[r.Instance]
		if !ok || s.epoch != r.Epoch || s.owner != r.Owner {
			s = seen{owner: r.Owner, epoch: r.Epoch, at: now}
			c.since[r.Instance] = s
		}
		m.Since[r.Instance] = s.at
	}
	maps.DeleteFunc(c.since, func(instance string, _ seen) bool { return !there[instance] })
	maps.DeleteFunc(c.retry, func(_ string, b *backoff) bool { return now.After(b.until.Add(time.Minute)) }) // nobody wants it any more
	for instance, nodes := range c.avoid {
		for node, a := range nodes {
			switch {
			case now.Before(a.until):
				m.Avoid[instance] = append(m.Avoid[instance], node)
			case now.After(a.until.Add(avoidMost)): // long well: the next failure counts as the first
				delete(nodes, node)
			}
		}
		if len(nodes) == 0 {
			delete(c.avoid, instance)
		}
	}
	return m
}

// start begins what is not in flight, not backing off, and within the bounds. due is when the first that backs off may be tried again.
func (c *Coordinator) start(ctx context.Context, actions []Action, maxMoves int) (started []Action, due time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	moves := 0
	for _, k := range c.inFlight {
		if k == Move {
			moves++
		}
	}
	now := time.Now()
	var successions []Action
	for _, a := range actions {
		if _, busy := c.inFlight[a.Instance]; busy || len(c.inFlight) >= MaxInFlight {
			continue // its end is a trigger
		}
		if b := c.retry[a.Instance]; b != nil && now.Before(b.until) && (b.err != nil || b.print == a.print()) {
			if w := b.until.Sub(now); due == 0 || w < due {
				due = w
			}
			continue
		}
		if a.Kind == Move {
			if moves >= maxMoves {
				continue
			}
			moves++
		}
		started = append(started, a)
		if a.Kind == Successors {
			successions = append(successions, a)
			continue
		}
		c.inFlight[a.Instance] = a.Kind
		c.goes.Go(func() { c.carryOut(ctx, []Action{a}) })
	}
	if len(successions) > 0 { // one transaction
		for _, a := range successions {
			c.inFlight[a.Instance] = a.Kind
		}
		c.goes.Go(func() { c.carryOut(ctx, successions) })
	}
	return started, due
}

// carryOut has the proposer do it, and notes how it went. Several actions are successions.
func (c *Coordinator) carryOut(ctx context.Context, actions []Action) {
	limit := c.cfg.PlaceTimeout
	if actions[0].Kind == Move {
		limit = c.cfg.MoveTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := c.propose(ctx, actions)
	c.mu.Lock()
	for _, a := range actions {
		delete(c.inFlight, a.Instance)
		b := c.retry[a.Instance]
		if b == nil || err == nil && b.print != a.print() {
			b = &backoff{}
			c.retry[a.Instance] = b
		}
		b.until, b.err, b.print = time.Now().Add(min(retryLeast<<min(b.times, 10), 6*retryMost)), err, a.print()
		b.times++
	}
	c.mu.Unlock()
	if err != nil {
		c.cfg.Log.Warn("placement could not carry out an action; a later round decides anew", "action", actions[0].Kind, "instances", names(actions), "error", err)
	}
	c.Trigger()
}

// print tells whether two actions are the same: the same effect on the same epoch.
func (a Action) print() string {
	var epoch uint64
	successors := ""
	switch a.Kind {
	case Place:
		epoch = a.Placing.Epoch
	case Move:
		epoch = a.Moving.Epoch
	case Retire:
		epoch = a.Retiring.Epoch
	case Forget:
		epoch = a.Forgetting.Version
	case Successors:
		epoch, successors = a.Succession.Epoch, strings.Join(a.Succession.Successors, " ")
	}
	return fmt.Sprintf("%s %d %s %s", a.Kind, epoch, a.Node, successors)
}

func (c *Coordinator) propose(ctx context.Context, actions []Action) error {
	a := actions[0]
	var err error
	switch a.Kind {
	case Place:
		err = c.cfg.Proposer.Place(ctx, *a.Placing)
	case Move:
		err = c.cfg.Proposer.Move(ctx, *a.Moving)
	case Retire:
		err = c.cfg.Proposer.Retire(ctx, *a.Retiring)
	case Forget:
		err = c.cfg.Proposer.Forget(ctx, a.Forgetting.Application, a.Forgetting.Version)
	case Successors:
		all := make([]Succession, len(actions))
		for i := range actions {
			all[i] = *actions[i].Succession
		}
		err = c.cfg.Proposer.SetSuccessors(ctx, all)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", a.Kind, a.Instance, err)
	}
	return nil
}

func names(actions []Action) []string {
	out := make([]string, len(actions))
	for i, a := range actions {
		out[i] = a.Instance
	}
	return slices.Clip(out)
}
