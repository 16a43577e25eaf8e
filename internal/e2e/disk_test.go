package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// The disk of a node fills up: before it is full the node stops being voter and holder, everyone can see that and why, the cluster goes on; and
// when there is space again it takes its duties back.
func TestFullDisk(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seed(t, 3)
	full := g.Nodes[2]
	if err := unix.Mount("tmpfs", full.Data, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size=640m,mode=0700"); err != nil {
		clustertest.NotPermitted(t, fmt.Sprintf("a small disk cannot be made here: mount: %v", err))
	}
	t.Cleanup(func() { must(t, unix.Unmount(full.Data, unix.MNT_DETACH)) })
	must(t, os.Mkdir(filepath.Join(full.Data, "plugins"), 0o700))
	must(t, g.Up(t.Context()))
	g.waitVoters()
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	if in := g.running(n1, "tally/counter-0", protected(3)); in.GetNode() == full.Name {
		g.do(n1, "move", "tally/counter", n1.Name)
	}

	filler, err := os.Create(filepath.Join(full.Data, "filler"))
	must(t, err)
	defer filler.Close()
	must(t, unix.Fallocate(int(filler.Fd()), 0, 0, 400<<20))
	ev := g.event(n1, "/nodes/"+full.Name, "its disk is low", func(ev *apiv1.Event) bool { return ev.GetType() == "disk-low" })
	if !strings.Contains(ev.GetMessage(), "no holder and no voter") {
		t.Errorf("the event says %q", ev.GetMessage())
	}
	g.wait("it to be no voter", func(ctx context.Context) error {
		for _, n := range g.Nodes {
			st, err := g.status(ctx, n)
			if err != nil {
				return err
			}
			if slices.Contains(st.GetArbiter().GetVoters(), full.Name) {
				return fmt.Errorf("%s says voters are %v", n.Name, st.GetArbiter().GetVoters())
			}
		}
		return nil
	})
	st, err := g.status(t.Context(), full)
	must(t, err)
	if !slices.ContainsFunc(st.GetWarnings(), func(w string) bool { return strings.Contains(w, "disk") }) {
		t.Errorf("its status does not warn of the disk: %v", st.GetWarnings())
	}
	// New checkpoints are kept elsewhere, and answered.
	g.counted(n1, 5)
	g.running(n1, "tally/counter-0", func(in *apiv1.Instance) error {
		if slices.Contains(in.GetReplicas(), full.Name) || len(in.GetReplicas()) != 2 {
			return fmt.Errorf("its checkpoint lies on %v", in.GetReplicas())
		}
		return nil
	})
	g.shows(full, 5)

	must(t, filler.Truncate(0))
	g.event(n1, "/nodes/"+full.Name, "its disk is well again", func(ev *apiv1.Event) bool { return ev.GetType() == "disk-ok" })
	g.waitVoters()
	g.wait("it to hold checkpoints again", func(ctx context.Context) error {
		in, err := g.instance(ctx, n1, "tally/counter-0")
		if err == nil && !slices.Contains(in.GetReplicas(), full.Name) {
			err = errors.New("it does not")
		}
		return err
	})
}
