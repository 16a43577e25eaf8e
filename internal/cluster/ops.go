package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Coppice runs a command of the binary against a node, as an operator does, and decodes what -o json prints into out, which may be nil. What
// the command complains of is the error.
func (c *Cluster) Coppice(ctx context.Context, on *Node, out any, args ...string) error {
	cmd := c.Command(append(args, "-o", "json", "--api", on.API)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("coppice %s: %w", args[0], err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() }) // it has ended, or ends now
	err := cmd.Wait()
	stop()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return errors.New(strings.TrimSpace(stderr.String()))
	}
	if err != nil {
		return fmt.Errorf("coppice %s: %w", args[0], err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(stdout.Bytes(), out); err != nil {
		return fmt.Errorf("coppice %s: what it printed: %w", args[0], err)
	}
	return nil
}

// Instances lists all instances as a node sees them.
func Instances(ctx context.Context, on *Node) ([]*apiv1.Instance, error) {
	c, err := on.Client()
	if err != nil {
		return nil, err
	}
	res, err := c.Ps(ctx, &apiv1.PsRequest{})
	return res.GetInstances(), err
}

// Instance is one of them.
func Instance(ctx context.Context, on *Node, name string) (*apiv1.Instance, error) {
	list, err := Instances(ctx, on)
	if err != nil {
		return nil, err
	}
	for _, in := range list {
		if in.GetInstance() == name {
			return in, nil
		}
	}
	return nil, fmt.Errorf("%s is not in ps", name)
}

// Calm waits until every instance runs and its epoch has settled: from then on the death of its owner is not held against it. It returns the
// only instance of a component.
func Calm(ctx context.Context, on *Node, component string) (*apiv1.InspectInstance, error) {
	c, err := on.Client()
	if err != nil {
		return nil, err
	}
	var out *apiv1.InspectInstance
	err = WaitFor(ctx, time.Minute, "every instance to run and to settle", func(ctx context.Context) (bool, error) {
		list, err := Instances(ctx, on)
		if err != nil {
			return false, err
		}
		var names []string
		for _, in := range list {
			if in.GetState() != "running" {
				return false, fmt.Errorf("%s is %s on %s: %s", in.GetInstance(), in.GetState(), in.GetNode(), in.GetReason())
			}
			if name := in.GetComponent(); !slices.Contains(names, name) && in.GetApplication() != "system" {
				names = append(names, name)
			}
		}
		for _, name := range names {
			res, err := c.Inspect(ctx, &apiv1.InspectRequest{Component: name})
			if err != nil {
				return false, err
			}
			for _, in := range res.GetInstances() {
				if !in.GetSettled() || in.GetPid() == 0 {
					return false, fmt.Errorf("%s has not settled in epoch %d on %s", in.GetInstance(), in.GetEpoch(), in.GetNode())
				}
				if name == component {
					out = in
				}
			}
		}
		if out == nil {
			return false, fmt.Errorf("%s is not there", component)
		}
		return true, nil
	})
	return out, err
}

// AllAlive waits until every running node sees every running node alive.
func (c *Cluster) AllAlive(ctx context.Context) error {
	alive := c.Alive()
	return Each(alive, func(n *Node) error {
		cl, err := n.Client()
		if err != nil {
			return err
		}
		return WaitFor(ctx, 30*time.Second, n.Name+" to see every node alive", func(ctx context.Context) (bool, error) {
			res, err := cl.Nodes(ctx, &apiv1.NodesRequest{})
			if err != nil {
				return false, err
			}
			for _, want := range alive {
				if !slices.ContainsFunc(res.GetNodes(), func(x *apiv1.Node) bool { return x.GetName() == want.Name && x.GetState() == "alive" }) {
					return false, fmt.Errorf("it does not see %s alive", want.Name)
				}
			}
			return true, nil
		})
	})
}

// CopyFolder copies what files and folders are in a folder, as a backup of a data folder would.
func CopyFolder(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	list, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range list {
		a, z := filepath.Join(from, e.Name()), filepath.Join(to, e.Name())
		info, err := e.Info()
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			err = CopyFolder(a, z)
		case info.Mode().IsRegular():
			var raw []byte
			if raw, err = os.ReadFile(a); err == nil {
				err = os.WriteFile(z, raw, info.Mode().Perm())
			}
		} // sockets are made anew
		if err != nil {
			return err
		}
	}
	return nil
}
