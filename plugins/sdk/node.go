package sdk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// nodeLink is the connection to the node that started the process.
type nodeLink struct {
	conn   *grpc.ClientConn
	client componentv1.NodeClient
}

func dialNode(env Env) (*nodeLink, error) {
	stamp := func(ctx context.Context) context.Context {
		if env.Credential == "" {
			return ctx
		}
		return metadata.AppendToOutgoingContext(ctx, componentv1.MetaCredential, env.Credential)
	}
	conn, err := grpc.NewClient("unix:"+env.NodeSocket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 250 * time.Millisecond},
			// A unix socket answers at once or not at all.
			MinConnectTimeout: time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return next(stamp(ctx), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return next(stamp(ctx), desc, cc, method, opts...)
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("node socket $%s=%s: %w", componentv1.EnvNodeSocket, env.NodeSocket, err)
	}
	return &nodeLink{conn: conn, client: componentv1.NewNodeClient(conn)}, nil
}

var errNoNode = status.Errorf(codes.Unavailable, "not started by a node (no $%s)", componentv1.EnvNodeSocket)

// Publish sends one event to a channel and waits until the node has taken it.
func (in *Instance) Publish(ctx context.Context, ev *componentv1.Event) error {
	if in.node == nil {
		return errNoNode
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := in.node.client.Publish(ctx)
	if err != nil {
		return fmt.Errorf("publish to %s: %w", ev.GetChannel(), err)
	}
	if err := stream.Send(ev); err != nil {
		return fmt.Errorf("publish to %s: %w", ev.GetChannel(), err)
	}
	ack, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("publish to %s: %w", ev.GetChannel(), err)
	}
	if ack.GetError() != "" {
		return fmt.Errorf("publish to %s: %s", ev.GetChannel(), ack.GetError())
	}
	return nil
}

// Checkpoint says that the state is worth saving now, and waits until it is; it returns the mark that is safe. Not from inside a call or Update: the
// state they are about to change cannot be saved before they end.
func (in *Instance) Checkpoint(ctx context.Context, reason string) (mark uint64, err error) {
	if in.node == nil {
		return 0, errNoNode
	}
	if c := callOf(ctx); c != nil && c.tx != nil && !c.tx.ReadOnly() {
		return 0, errors.New("a Checkpoint inside a call or Update cannot hold what it is about to change: ask after it")
	}
	reply, err := in.node.client.Checkpoint(ctx, &componentv1.CheckpointRequest{Reason: reason})
	if err != nil {
		return 0, fmt.Errorf("checkpoint: %w", err)
	}
	if in.store != nil {
		in.store.SetDurable(reply.GetMark())
	}
	return reply.GetMark(), nil
}

// Leases. A component without a node that vouches for it ends itself: nothing may run that nobody can stop.
const (
	defaultTTL = 2 * time.Second  // of a grant that does not say
	firstTTL   = 10 * time.Second // until the first grant: the node may be busy starting
)

// leaseLook is how often the end of a lease that stands for exactly-one is looked for: timers stand still while the machine sleeps, the clock
// that leases count by does not.
const leaseLook = 100 * time.Millisecond

// fillWithin is for how long a process that is being given its state outlives its lease: a large state takes all of a small machine, and the lease's beats
// may wait behind it. A process that has not begun acts upon nothing; it asks for a valid lease before it begins.
const fillWithin = time.Minute

// beginFilling notes that a process which has not begun is being given its state; done: that it has it. Grants that waited behind it have one lease's time
// to come in.
func (in *Instance) beginFilling() (done func()) {
	set := func(d time.Duration) {
		in.mu.Lock()
		defer in.mu.Unlock()
		in.filling = bootTime() + d
	}
	set(fillWithin)
	return func() { set(defaultTTL) }
}

// lapsed says whether no lease is left that this process may go on with.
func (in *Instance) lapsed(until time.Duration) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	now := bootTime()
	begun := in.state != componentv1.State_CREATED || in.opening
	return now >= until && (begun || now >= in.filling)
}

// awaitLease has a start that is exactly-one wait for the first grant: if the node died right now, nothing else would end this process before the next
// owner starts. Any start waits for the next grant where the last one ran out while the state came (beginFilling).
func (in *Instance) awaitLease(ctx context.Context, req *componentv1.StartRequest) error {
	if in.granted == nil {
		return nil
	}
	late := status.Errorf(codes.DeadlineExceeded, "start: its node granted no lease in time")
	if req.GetLeased() {
		in.mu.Lock()
		in.leased = true
		in.mu.Unlock()
		late = status.Errorf(codes.DeadlineExceeded, "start: the component is exactly-one, and its node granted no lease in time")
		select {
		case <-in.granted:
		case <-ctx.Done():
			return late
		}
	}
	select {
	case <-in.granted:
	default:
		return nil // firstTTL has not passed
	}
	for in.LeaseLeft() == 0 { // it ran out while the state came
		select {
		case <-time.After(leaseLook / 10):
		case <-ctx.Done():
			return late
		}
	}
	return nil
}

// keepLease asks for the lease until the context ends, and ends the process when the lease has lapsed. The lease counts from when it was asked for, so
// what waited in a socket while this process was stopped does not prolong it, and by a clock that goes on while the machine sleeps.
func (in *Instance) keepLease(ctx context.Context) {
	grants := make(chan lease, 1)
	go in.askLease(ctx, grants)
	until := bootTime() + firstTTL
	for first := true; ; {
		wait := until - bootTime()
		if in.isLeased() || wait <= 0 {
			wait = min(max(wait, leaseLook/10), leaseLook)
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case g := <-grants:
			timer.Stop()
			until = g.asked + g.ttl
			in.setLease(until)
			if first && bootTime() < until {
				first = false
				close(in.granted)
			}
		case <-timer.C:
		}
		if in.lapsed(until) {
			exit := in.env.Exit
			if exit == nil {
				exit = os.Exit
			}
			in.lapse(bootTime()-until, exit)
			return
		}
	}
}

func (in *Instance) setLease(until time.Duration) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.leaseEnd = until
}

// LeaseLeft is for how long this process may still act, by a clock that goes on while the machine sleeps. What acts on the outside world under
// guarantee: exactly-one asks for it right before each act: as long as it is above zero, no other process of the instance runs anywhere. (A process
// that is stopped between asking and acting is what FencingToken is for.) Without a node it is an hour.
func (in *Instance) LeaseLeft() time.Duration {
	if in.node == nil {
		return time.Hour
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	return max(in.leaseEnd-bootTime(), 0)
}

func (in *Instance) isLeased() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.leased
}

func (in *Instance) setLeased(leased bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.leased = leased
}

// lease is one grant: how long it lasts, from when it was asked for.
type lease struct {
	asked time.Duration // bootTime
	ttl   time.Duration
}

// askLease keeps a lease stream open; the node may restart behind it.
func (in *Instance) askLease(ctx context.Context, grants chan<- lease) {
	for ctx.Err() == nil {
		err := in.leaseStream(ctx, grants)
		if ctx.Err() != nil {
			return
		}
		in.log.Warn("lease stream ended; asking again", "instance", in.Name(), "error", err)
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// leaseStream sends a beat, waits for its grant, and again after a third of the time granted. A beat that is not answered ends the stream: on a new one
// the next grant cannot be taken for the answer to an older beat.
func (in *Instance) leaseStream(ctx context.Context, grants chan<- lease) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := in.node.client.Lease(ctx)
	if err != nil {
		return err
	}
	ttl := defaultTTL
	for {
		asked := bootTime()
		if err := stream.Send(&componentv1.LeaseBeat{Token: in.currentToken()}); err != nil {
			_, err = stream.Recv() // says why
			return err
		}
		patience := time.AfterFunc(ttl/3, cancel)
		g, err := stream.Recv()
		if !patience.Stop() && err != nil {
			return errors.New("the node did not grant it in time")
		}
		if err != nil {
			return err
		}
		if ttl = time.Duration(g.GetTtlMs()) * time.Millisecond; ttl <= 0 {
			ttl = defaultTTL
		}
		in.setToken(g.GetToken())
		in.setDrain(g.GetDrain())
		in.setLeased(g.GetLeased())
		select {
		case grants <- lease{asked, ttl}:
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-time.After(ttl / 3):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
