package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/plugins/contract/program"
)

// maxForwarded bounds the connections of one forward.
const maxForwarded = 1024

// tunnelWithin bounds the making of one connection: it waits while the program moves or is taken over.
const tunnelWithin = 15 * time.Second

// lastWords is how long the program may go on to answer a connection that sends nothing more.
const lastWords = 2 * time.Second

func (v *verbs) Forward(ctx context.Context, r *apiv1.ForwardRequest, s *connect.ServerStream[apiv1.ForwardUpdate]) error {
	n := v.n
	sub, err := n.find("forward", r.GetComponent())
	if err != nil {
		return err
	}
	what := "forward " + sub.component
	switch {
	case sub.eff.Spec.GetRun() == nil || sub.eff.Spec.GetRun().Port == nil:
		return api.Fail(connect.CodeFailedPrecondition, what, "it is no program with a port: only such a one listens by itself", "coppice inspect "+sub.component)
	case len(sub.instances) != 1:
		return api.Fail(connect.CodeInvalidArgument, what, "it has several instances, name one: "+strings.Join(sub.instances, ", "), "")
	}
	listen := r.GetListen()
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return api.Fail(connect.CodeFailedPrecondition, what, err.Error(), "another address, or none for a free port")
	}
	f := &forward{n: n, instance: sub.instances[0], slots: make(chan struct{}, maxForwarded)}
	if err := s.Send(&apiv1.ForwardUpdate{Listen: l.Addr().String(), Instance: f.instance}); err != nil {
		return errors.Join(err, l.Close())
	}
	return f.serve(ctx, l, s.Send)
}

// forward passes connections on to the port of one program.
type forward struct {
	n        *Node
	instance string
	slots    chan struct{}
}

// serve accepts until the client goes or the node stops. What could not be connected is told.
func (f *forward) serve(ctx context.Context, l net.Listener, tell func(*apiv1.ForwardUpdate) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })() //nolint:errcheck // it ends Accept
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	var telling sync.Mutex
	for {
		c, err := l.Accept()
		if err != nil {
			return ctx.Err()
		}
		select {
		case f.slots <- struct{}{}:
		default:
			c.Close() //nolint:errcheck // refused
			continue
		}
		conns.Go(func() {
			defer func() { <-f.slots }()
			defer c.Close() //nolint:errcheck // both ends are over
			if err := f.pass(ctx, c); err != nil && ctx.Err() == nil {
				telling.Lock()
				defer telling.Unlock()
				if tell(&apiv1.ForwardUpdate{Instance: f.instance, Problem: err.Error()}) != nil {
					cancel()
				}
			}
		})
	}
}

// pass makes one connection and passes bytes both ways until both are over.
func (f *forward) pass(ctx context.Context, c net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	to, err := f.dial(ctx)
	if err != nil {
		return err
	}
	defer to.Close()                                     //nolint:errcheck // both ends are over
	defer context.AfterFunc(ctx, func() { c.Close() })() //nolint:errcheck // it ends the copies
	ended := make(chan struct{}, 1)
	go func() {
		_, _ = io.Copy(to, c) // its end is the connection's, whatever it was
		// A tunnel has no half: who has sent all of his may still wait for the answer.
		time.AfterFunc(lastWords, func() { to.Close() }) //nolint:errcheck // it ends the other copy
		ended <- struct{}{}
	}()
	_, _ = io.Copy(c, to) // the same
	c.Close()             //nolint:errcheck // it ends the other copy
	<-ended
	return nil
}

// dial asks the component that runs the program for a connection to its port, through the membrane, wherever it is.
func (f *forward) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(tunnelWithin, func() { cancel(context.DeadlineExceeded) })
	defer late.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+components.ExecName+program.TunnelPath, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", program.TunnelProtocol)
	resp, err := f.n.router.Transport(f.instance).RoundTrip(req)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("connect to %s: %w", f.instance, err)
	}
	to, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode == http.StatusSwitchingProtocols && ok {
		return &tunnel{to, func() { cancel(nil) }}, nil
	}
	said, rerr := io.ReadAll(io.LimitReader(resp.Body, 256))
	cancel(nil)
	return nil, errors.Join(fmt.Errorf("connect to %s: %s: %s", f.instance, resp.Status, strings.TrimSpace(string(said))), rerr, resp.Body.Close())
}

// tunnel ends its request when it is closed.
type tunnel struct {
	io.ReadWriteCloser
	end func()
}

// Close implements io.Closer.
func (t *tunnel) Close() error {
	defer t.end()
	return t.ReadWriteCloser.Close()
}
