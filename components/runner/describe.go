package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const defaultDescribe = 5 * time.Second

// Describe starts an executable in the strictest sandbox (no network, nothing to write but its socket), asks it what it is and ends
// it. The whole is bounded by limits.Start, default 5 s. Errors wrap ErrNoExecutable, ErrWrongArch, ErrNoHandshake, ErrProtocol,
// ErrHung or ErrDescribe.
func Describe(ctx context.Context, exec ExecFile, limits Limits) (*componentv1.Description, error) {
	r, err := New(Config{})
	if err != nil {
		return nil, err
	}
	return r.Describe(ctx, exec, limits)
}

// Describe is the function of the same name with this runner's configuration.
func (r *Local) Describe(ctx context.Context, exec ExecFile, limits Limits) (_ *componentv1.Description, err error) {
	if limits.Start <= 0 {
		limits.Start = defaultDescribe
	}
	ctx, cancel := context.WithTimeout(ctx, limits.Start)
	defer cancel()
	dir, err := shortTempDir()
	if err != nil {
		return nil, fmt.Errorf("describe: %w", err)
	}
	defer func() {
		if rerr := os.RemoveAll(dir); rerr != nil && err == nil {
			err = rerr
		}
	}()
	p, err := r.Start(ctx, Spec{
		Instance: "describe", Exec: exec, RunDir: filepath.Join(dir, "r"), LogDir: filepath.Join(dir, "l"),
		Sandbox: Sandbox{Network: NetworkNone, ReadOnly: true}, Limits: limits,
	})
	if err != nil {
		return nil, fmt.Errorf("describe: %w", err)
	}
	defer func() {
		if kerr := p.Kill(); kerr != nil && err == nil {
			err = kerr
		}
		select {
		case <-p.Done():
		case <-time.After(killWait):
			err = errors.Join(err, fmt.Errorf("describe: pid %d does not end", p.Ident().Pid))
		}
	}()
	d, err := componentv1.NewComponentClient(p.Conn()).Describe(ctx, &componentv1.DescribeRequest{HostContract: componentv1.ProtocolVersion})
	switch {
	case err == nil:
	case status.Code(err) == codes.DeadlineExceeded || ctx.Err() != nil:
		return nil, fmt.Errorf("%w: Describe did not return within %s", ErrHung, limits.Start)
	default:
		said := lastLines(p.Output(), 0, 5)
		return nil, fmt.Errorf("%w: %s; its last output: %s", ErrDescribe, status.Convert(err).Message(), said)
	}
	if d.GetType() == "" {
		return nil, fmt.Errorf("%w: the description names no type", ErrDescribe)
	}
	return d, nil
}

// shortTempDir makes a private directory whose path leaves room for a socket's.
func shortTempDir() (string, error) {
	for _, base := range []string{os.TempDir(), "/tmp", "/run", "/dev/shm"} {
		if len(base) > maxRunDir-20 {
			continue
		}
		if dir, err := os.MkdirTemp(base, "cpd"); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no temporary folder with a short path can be made; try TMPDIR=/tmp")
}
