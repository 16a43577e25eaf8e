package conform

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// soon is within what time a process has to act upon what is not a matter of timing.
const soon = 10 * time.Second

func processes() []check {
	return []check{
		{"process", "says why it does nothing when it is started by hand", byHand},
		{"process", "answers its node only", answersItsNodeOnly},
		{"process", "ignores SIGINT", ignoresInterrupt},
		{"process", "ends at SIGTERM", endsAt(func(_ context.Context, p *process) error { return signal(p, syscall.SIGTERM) })},
		{"process", "ends with status 0 at Stop", endsAt(func(ctx context.Context, p *process) error {
			_, err := p.control.Stop(ctx, &componentv1.StopRequest{GraceMs: 1000})
			return err
		})},
		{"process", "ends at go-plugin's Shutdown", endsAt(func(ctx context.Context, p *process) error {
			err := p.Conn().Invoke(ctx, "/plugin.GRPCController/Shutdown", &emptypb.Empty{}, &emptypb.Empty{})
			if err != nil && p.Process.Ident().Pid > 0 {
				select {
				case <-p.Done(): // before it could answer
					return nil
				case <-time.After(time.Second):
				}
			}
			return err
		})},
		{"process", "goes on while its lease is renewed", goesOn},
		{"process", "ends itself when its lease lapses, with status 75", lapses},
		{"process", "begins nothing before its first lease where it is exactly-one", waitsForLease},
		{"process", "finds a node again that was away for less than its lease", findsAgain},
	}
}

func signal(p *process, s syscall.Signal) error {
	return syscall.Kill(p.Ident().Pid, s)
}

func byHand(ctx context.Context, r *rig) error {
	st, err := os.Stat(r.cfg.File)
	if err != nil {
		return err
	}
	if st.Mode()&0o111 == 0 {
		return skip("the file is not executable by hand")
	}
	ctx, cancel := context.WithTimeout(ctx, soon)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.cfg.File)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Dir = r.dir
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return errors.New("it ends with status 0 without the environment's " + componentv1.CookieKey + ": want another status")
	case ctx.Err() != nil:
		return fmt.Errorf("it runs on without the environment's %s", componentv1.CookieKey)
	case !errors.As(err, &exit):
		return err
	case len(out) == 0:
		return errors.New("it says nothing")
	}
	return nil
}

func answersItsNodeOnly(ctx context.Context, r *rig) error {
	p, err := r.start(ctx)
	if err != nil {
		return err
	}
	conn, err := r.stranger(p)
	if err != nil {
		return err
	}
	other := componentv1.NewComponentClient(conn)
	_, err = other.Heartbeat(ctx, &componentv1.Beat{})
	if err := refused("Heartbeat without the credential", err, codes.Unauthenticated); err != nil {
		return err
	}
	_, err = other.Stop(ctx, &componentv1.StopRequest{})
	if err := refused("Stop without the credential", err, codes.Unauthenticated); err != nil {
		return err
	}
	if stream, err := other.Checkpoint(ctx, &componentv1.CheckpointFrom{}); err == nil {
		_, err = stream.Recv()
		if err := refused("Checkpoint without the credential", err, codes.Unauthenticated); err != nil {
			return err
		}
	}
	if m, ok := r.anyMethod(); ok {
		err := conn.Invoke(ctx, m.full, m.empty(), m.reply())
		if err := refused(m.full+" without the credential", err, codes.Unauthenticated); err != nil {
			return err
		}
	}
	_, err = p.control.Heartbeat(ctx, &componentv1.Beat{})
	return err
}

func ignoresInterrupt(ctx context.Context, r *rig) error {
	p, err := r.start(ctx)
	if err != nil {
		return err
	}
	if err := signal(p, syscall.SIGINT); err != nil {
		return err
	}
	for range 5 { // it would have to be delivered by then
		if _, err := p.control.Heartbeat(ctx, &componentv1.Beat{}); err != nil {
			return fmt.Errorf("after SIGINT: %w", err)
		}
		select {
		case <-p.Done():
			return fmt.Errorf("it ended: %s; Ctrl-C in a node's terminal is the node's", p.Exit())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// endsAt: the process ends by itself after this, with status 0.
func endsAt(act func(context.Context, *process) error) func(context.Context, *rig) error {
	return func(ctx context.Context, r *rig) error {
		p, err := r.start(ctx)
		if err != nil {
			return err
		}
		if err := act(ctx, p); err != nil {
			return err
		}
		exit, err := p.ended(ctx, soon)
		if err != nil {
			return err
		}
		if exit.Signal != "" || exit.Code != 0 {
			return p.said(fmt.Errorf("it ends with %s, want status 0", exit))
		}
		return nil
	}
}

func goesOn(ctx context.Context, r *rig) error {
	p, err := r.launch(ctx)
	if err != nil {
		return err
	}
	p.node.set(func() { p.node.ttl = time.Second })
	if _, err := p.control.Start(ctx, startRequest()); err != nil {
		return err
	}
	begun := p.node.beats()
	for p.node.beats() < begun+9 { // three leases' worth
		if err := r.alive(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// alive waits a moment and says whether the process is still there.
func (r *rig) alive(ctx context.Context, p *process) error {
	select {
	case <-p.Done():
		return p.said(fmt.Errorf("it ended: %s", p.Exit()))
	case <-ctx.Done():
		return fmt.Errorf("it asked for its lease %d times only: %w", p.node.beats(), ctx.Err())
	case <-time.After(20 * time.Millisecond):
		return nil
	}
}

func lapses(ctx context.Context, r *rig) error {
	p, err := r.start(ctx)
	if err != nil {
		return err
	}
	for p.node.beats() == 0 {
		if err := r.alive(ctx, p); err != nil {
			return err
		}
	}
	p.node.silence()
	exit, err := p.ended(ctx, 20*time.Second)
	if err != nil {
		return fmt.Errorf("no lease for 20 s, and %w", err)
	}
	if exit.Code != componentv1.ExitLeaseLapsed {
		return p.said(fmt.Errorf("it ends with %s, want status %d", exit, componentv1.ExitLeaseLapsed))
	}
	return nil
}

func waitsForLease(ctx context.Context, r *rig) error {
	p, err := r.launchBeside(ctx, true)
	if err != nil {
		return err
	}
	req := startRequest()
	req.Leased = true
	begun := make(chan error, 1)
	go func() {
		_, err := p.control.Start(ctx, req)
		begun <- err
	}()
	select {
	case err := <-begun:
		return fmt.Errorf("start with leased returns before any grant (error: %w)", orNone(err))
	case <-time.After(500 * time.Millisecond):
	case <-p.Done():
		return fmt.Errorf("it ended: %s", p.Exit())
	}
	p.node.speak()
	select {
	case err := <-begun:
		return err
	case <-ctx.Done():
		return errors.New("start with leased does not return after a grant")
	}
}

var errNone = errors.New("none")

func orNone(err error) error {
	if err == nil {
		return errNone
	}
	return err
}

func findsAgain(ctx context.Context, r *rig) error {
	p, err := r.launch(ctx)
	if err != nil {
		return err
	}
	p.node.set(func() { p.node.ttl = 6 * time.Second }) // a beat each 2 s, so there is time for two that are not answered
	if _, err := p.control.Start(ctx, startRequest()); err != nil {
		return err
	}
	for has := p.node.beats(); p.node.beats() < has+2; { // one of them was granted so long
		if err := r.alive(ctx, p); err != nil {
			return err
		}
	}
	p.node.silence()
	before := p.node.beats()
	for p.node.beats() <= before+1 { // it asked again: what was not answered was given up
		if err := r.alive(ctx, p); err != nil {
			return err
		}
	}
	p.node.speak()
	before = p.node.beats()
	for p.node.beats() < before+3 { // beyond the end of the lease that it had

		if err := r.alive(ctx, p); err != nil {
			return err
		}
	}
	_, err = p.control.Heartbeat(ctx, &componentv1.Beat{}, grpc.WaitForReady(true))
	return err
}
