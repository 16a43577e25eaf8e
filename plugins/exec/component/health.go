package component

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	lookEvery   = time.Second
	checkWithin = 2 * time.Second
	startCheck  = 20 * time.Millisecond // between the checks of a start
	// startHealthy is how long a program may take to become healthy; after it the component says that it is not.
	startHealthy = time.Minute
)

// becomesHealthy waits until the program is healthy for the first time, or ctx ends; that is no error. Its end is one.
func (a *adapter) becomesHealthy(ctx context.Context, p *process) error {
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, end.Add(-startReserve))
		defer cancel()
	}
	for {
		err := a.check(ctx)
		if p.over() {
			return errors.New(p.ended())
		}
		if err == nil {
			// What ends at once, for it cannot listen or read its configuration, may have answered just before; or another one has, on its port.
			select {
			case <-p.done:
				return errors.New(p.ended())
			case <-time.After(startCheck):
			}
			a.mu.Lock()
			a.healthy = true
			a.mu.Unlock()
			return nil
		}
		select {
		case <-p.done:
			return errors.New(p.ended())
		case <-ctx.Done():
			a.mu.Lock()
			a.health = err
			a.mu.Unlock()
			return nil
		case <-time.After(startCheck):
		}
	}
}

// check asks the program once, as the manifest says; where it says nothing, its port is to be open. The caller holds ops.
func (a *adapter) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkWithin)
	defer cancel()
	path, get := strings.CutPrefix(a.cfg.Health, "GET ")
	switch {
	case get:
		return checkHTTP(ctx, "http://"+a.address()+path)
	case a.cfg.Health != "" && a.cfg.Health != "tcp":
		words, env, err := a.line(a.cfg.Health)
		if err != nil {
			return err
		}
		return command(ctx, words, env, a.home.work)
	case a.port == 0:
		return nil
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", a.address())
	if err != nil {
		return err
	}
	return c.Close()
}

func checkHTTP(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer r.Body.Close() //nolint:errcheck // it is read to its end
	said, err := io.ReadAll(io.LimitReader(r.Body, 200))
	if err == nil && r.StatusCode >= http.StatusBadRequest {
		err = fmt.Errorf("GET %s: %s: %s", url, r.Status, strings.TrimSpace(string(said)))
	}
	return err
}

// look checks the program's health again and again, until the component stops. What is meant to rest is not asked.
func (a *adapter) look() {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-a.ended:
			return
		case <-tick.C:
		}
		if !a.ops.TryLock() {
			continue
		}
		a.lookOnce()
		a.ops.Unlock()
	}
}

func (a *adapter) lookOnce() {
	a.mu.Lock()
	p, quiet := a.prog, a.quiet
	a.mu.Unlock()
	if p == nil || quiet || p.over() {
		return
	}
	reap(func(pid int) bool { return pid == p.pid })
	err := a.check(context.Background())
	a.mu.Lock()
	defer a.mu.Unlock()
	a.health = err
	a.healthy = a.healthy || err == nil
}

// isHealthy answers a heartbeat.
func (a *adapter) isHealthy(context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.health == nil, a.prog != nil && !a.healthy && time.Since(a.started) < startHealthy:
		return nil
	case !a.healthy:
		return fmt.Errorf("the program was not healthy within %s: %w", startHealthy, a.health)
	}
	return fmt.Errorf("the program is not healthy: %w", a.health)
}
