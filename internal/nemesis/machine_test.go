package nemesis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	"github.com/coppice-project/coppice/internal/harm"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Faults of the machine below the process: its disk and its clock.

// smallDisk is the size of one node's disk. Below 256 MiB of free space a node gives up its duties.
const smallDisk = 640 << 20

// shrink gives one node a small disk of its own, before it is started.
func (b *bed) shrink() {
	n := b.any()
	if err := unix.Mount("tmpfs", n.Data, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("size=%d,mode=0700", smallDisk)); err != nil {
		clustertest.Without(b.t, fmt.Sprintf("no disk will be full: a small one cannot be made here: mount: %v", err))
		return
	}
	b.t.Cleanup(func() {
		if err := unix.Unmount(n.Data, unix.MNT_DETACH); err != nil {
			b.t.Errorf("unmount the small disk: %v", err)
		}
	})
	must(b.t, os.Mkdir(filepath.Join(n.Data, "plugins"), 0o700))
	b.small = n
}

// empty takes everything out of a folder, which may be a mount point.
func empty(dir string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (b *bed) status(ctx context.Context, n *cluster.Node) (*apiv1.StatusResponse, error) {
	c, err := n.Client()
	if err != nil {
		return nil, err
	}
	return c.Status(ctx, &apiv1.StatusRequest{})
}

// warned waits until a node's status and its doctor speak of something.
func (b *bed) warned(ctx context.Context, n *cluster.Node, of string) error {
	return cluster.WaitFor(ctx, back, n.Name+" to warn of its "+of, func(ctx context.Context) (bool, error) {
		st, err := b.status(ctx, n)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(st.GetWarnings(), func(w string) bool { return strings.Contains(w, of) }) {
			return false, fmt.Errorf("its warnings are %q", st.GetWarnings())
		}
		c, err := n.Client()
		if err != nil {
			return false, err
		}
		res, err := c.Doctor(ctx, &apiv1.DoctorRequest{})
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(res.GetFindings(), func(f *apiv1.Finding) bool { return strings.Contains(f.GetFinding(), of) }) {
			return false, fmt.Errorf("its doctor finds %v", res.GetFindings())
		}
		return true, nil
	})
}

// relieved waits until no other node counts on the vote of one, or on its pages.
func (b *bed) relieved(ctx context.Context, n *cluster.Node, pages bool) error {
	return cluster.WaitFor(ctx, back, n.Name+" to be relieved of its duties", func(ctx context.Context) (bool, error) {
		other := b.other(n)
		st, err := b.status(ctx, other)
		if err != nil {
			return false, err
		}
		if slices.Contains(st.GetArbiter().GetVoters(), n.Name) {
			return false, fmt.Errorf("%s says that the voters are %v", other.Name, st.GetArbiter().GetVoters())
		}
		if !pages {
			return true, nil
		}
		list, err := cluster.Instances(ctx, other)
		if err != nil {
			return false, err
		}
		for _, in := range list {
			if slices.Contains(in.GetReplicas(), n.Name) && in.GetNode() != n.Name && in.GetApplication() != "system" {
				return false, fmt.Errorf("the checkpoint of %s lies on %v", in.GetInstance(), in.GetReplicas())
			}
		}
		return true, nil
	})
}

// other is the node after one.
func (b *bed) other(n *cluster.Node) *cluster.Node { return b.c.Nodes[n.Index%len(b.c.Nodes)] }

// voter is one that votes.
func (b *bed) voter(ctx context.Context) (*cluster.Node, error) {
	st, err := b.status(ctx, b.any())
	if err != nil {
		return nil, err
	}
	var voters []*cluster.Node
	for _, n := range b.c.Nodes {
		if slices.Contains(st.GetArbiter().GetVoters(), n.Name) { // a disk that was lost a moment ago may still have a vote, without a name
			voters = append(voters, n)
		}
	}
	if len(voters) == 0 {
		return nil, fmt.Errorf("nobody here votes: %v", st.GetArbiter().GetVoters())
	}
	return voters[b.rng.IntN(len(voters))], nil
}

// fullDisk fills the small disk until its node has given up its duties, then to the last byte, and makes room again.
func fullDisk(ctx context.Context, b *bed) (string, error) {
	n := b.small
	if n == nil {
		return "", fmt.Errorf("%w: there is no small disk to fill", errSkipped)
	}
	filler, err := os.Create(filepath.Join(n.Data, "filler"))
	if err != nil {
		return "", err
	}
	defer filler.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(filler.Fd()), &st); err != nil {
		return "", err
	}
	size := int64(st.Bavail)*st.Bsize - 200<<20
	if err := unix.Fallocate(int(filler.Fd()), 0, 0, size); err != nil {
		return "", fmt.Errorf("fill the disk: %w", err)
	}
	if err := b.warned(ctx, n, "disk"); err != nil {
		return "", err
	}
	if err := b.relieved(ctx, n, true); err != nil {
		return "", err
	}
	// A node that starts on such a disk has its duties no more than one that ran into it.
	if _, err := b.terminate(ctx, n); err != nil {
		return "", err
	}
	if err := b.warned(ctx, n, "disk"); err != nil {
		return "", err
	}
	if err := b.relieved(ctx, n, false); err != nil {
		return "", err
	}
	held := b.between(time.Second, min(b.longest, 10*time.Second))
	for end := time.Now().Add(held); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		if err := unix.Fallocate(int(filler.Fd()), 0, size, 64<<10); err == nil {
			size += 64 << 10
		} else if !errors.Is(err, unix.ENOSPC) {
			return "", fmt.Errorf("fill the disk: %w", err)
		}
		for {
			if err := unix.Fallocate(int(filler.Fd()), 0, size, 4<<20); err != nil {
				break
			}
			size += 4 << 20
		}
	}
	survived := n.Running()
	if err := os.Remove(filler.Name()); err != nil {
		return "", err
	}
	if err := filler.Close(); err != nil {
		return "", err
	}
	what := fmt.Sprintf("%s had no byte left for %s, and ", n.Name, held.Round(time.Millisecond))
	if survived {
		what += "went on"
	} else {
		what += "ended"
		if err := n.Start(ctx); err != nil {
			return "", err
		}
	}
	return what, b.eligible(ctx, n)
}

// eligible waits until a node has no warning of its own: it may vote and hold again.
func (b *bed) eligible(ctx context.Context, n *cluster.Node) error {
	return cluster.WaitFor(ctx, back, n.Name+" to be well", func(ctx context.Context) (bool, error) {
		st, err := b.status(ctx, n)
		if err != nil {
			return false, err
		}
		for _, w := range st.GetWarnings() {
			if strings.Contains(w, "disk") || strings.Contains(w, "voting") {
				return false, errors.New(w)
			}
		}
		return true, nil
	})
}

// failingLog has a voter's fsync of its raft log fail, from now on. It votes no more and says so, another votes in its place; a start with a
// good disk mends it.
func failingLog(ctx context.Context, b *bed) (string, error) {
	n, err := b.voter(ctx)
	if err != nil {
		return "", err
	}
	if err := n.Harm(harm.Orders{Fail: []string{"/raft/"}}); err != nil {
		return "", err
	}
	if err := b.warned(ctx, n, "stopped voting"); err != nil {
		return "", err
	}
	if err := b.relieved(ctx, n, false); err != nil {
		return "", err
	}
	if err := n.Harm(harm.Orders{}); err != nil {
		return "", err
	}
	if _, err := b.terminate(ctx, n); err != nil {
		return "", err
	}
	return "the raft log of " + n.Name + " could not be synced: it voted no more until it was started again", b.eligible(ctx, n)
}

// failingDisk has the fsync of an owner's database fail, where its pages are: it ends by itself, and not in silence. (A node that promises
// nothing syncs nothing, and notices nothing: where placement takes the instance away just then, the next owner is harmed.)
func failingDisk(ctx context.Context, b *bed) (string, error) {
	var n *cluster.Node
	code := 0
	if err := cluster.WaitFor(ctx, 2*back, "an owner whose disk failed to end", func(ctx context.Context) (bool, error) {
		owner, _, err := b.owner(ctx)
		if err != nil {
			return false, err
		}
		n = owner
		if err := n.Harm(harm.Orders{Fail: []string{"/db/", "/raft/"}[:1+b.rng.IntN(2)]}); err != nil {
			return false, err
		}
		for owns := true; owns; {
			ectx, cancel := context.WithTimeout(ctx, 5*time.Second)
			code, err = n.Ended(ectx)
			cancel()
			if err == nil {
				return true, nil
			}
			if ctx.Err() != nil {
				return false, err
			}
			other := slices.DeleteFunc(slices.Clone(b.c.Nodes), func(o *cluster.Node) bool { return o == n })[0]
			list, lerr := cluster.Instances(ctx, other)
			if lerr != nil {
				return false, errors.Join(err, lerr)
			}
			owns = slices.ContainsFunc(list, func(in *apiv1.Instance) bool { return in.GetNode() == n.Name && in.GetApplication() != "system" })
		}
		return false, errors.Join(fmt.Errorf("%s owns nothing any more", n.Name), n.Harm(harm.Orders{}))
	}); err != nil {
		return "", err
	}
	if code <= 0 {
		return "", fmt.Errorf("the disk of %s failed, and it ended with status %d", n.Name, code)
	}
	if log, err := os.ReadFile(n.Log()); err != nil || !strings.Contains(string(log), "the database failed") {
		return "", fmt.Errorf("%s does not say why it ended (%w)", n.Name, err)
	}
	if err := n.Harm(harm.Orders{}); err != nil {
		return "", err
	}
	return fmt.Sprintf("the database of %s could not be synced: it ended with status %d, and was started again", n.Name, code), n.Start(ctx)
}

// slowDisk has every fsync of some nodes take long.
func slowDisk(ctx context.Context, b *bed) (string, error) {
	nodes := b.some(1 + b.rng.IntN(len(b.c.Nodes)/2))
	each := b.between(50*time.Millisecond, 2*time.Second)
	held := b.between(time.Second, b.longest)
	return fmt.Sprintf("every fsync of %s took %s longer, for %s", names(nodes), each.Round(time.Millisecond), held.Round(time.Millisecond)),
		b.harmed(ctx, nodes, held, func() harm.Orders { return harm.Orders{Slow: []string{"/raft/", "/db/"}, SlowFor: each} })
}

// harmed harms nodes for a while.
func (b *bed) harmed(ctx context.Context, nodes []*cluster.Node, held time.Duration, with func() harm.Orders) error {
	for _, n := range nodes {
		if err := n.Harm(with()); err != nil {
			return err
		}
	}
	err := cluster.Sleep(ctx, held)
	for _, n := range nodes {
		err = errors.Join(err, n.Harm(harm.Orders{}))
	}
	return err
}

// clocks has the wall clocks of some nodes jump by hours, each by its own, and back.
func clocks(ctx context.Context, b *bed) (string, error) {
	nodes := b.some(1 + b.rng.IntN(len(b.c.Nodes)-1))
	held := b.between(time.Second, b.longest)
	var jumps []string
	err := b.harmed(ctx, nodes, held, func() harm.Orders {
		by := b.between(time.Hour, 72*time.Hour).Round(time.Second)
		if b.rng.IntN(2) == 0 {
			by = -by
		}
		jumps = append(jumps, by.String())
		return harm.Orders{Clock: int64(by / time.Second)}
	})
	return fmt.Sprintf("the clocks of %s jumped by %s, and back after %s", names(nodes), strings.Join(jumps, ", "), held.Round(time.Millisecond)), err
}

// boot1970 starts a node on a machine that takes it for 1970, as one without a battery does. It is a member like any other: a newcomer, whose
// clock is as wrong or not, joins by a token that it makes. Later somebody sets the clock.
func boot1970(ctx context.Context, b *bed) (string, error) {
	pair := b.some(2)
	n, newcomer := pair[0], pair[1]
	if err := n.Term(ctx); err != nil {
		return "", err
	}
	if err := n.Harm(harm.Orders{Clock: -time.Now().Unix()}); err != nil {
		return "", err
	}
	if err := n.Start(ctx); err != nil {
		return "", err
	}
	if err := b.c.AllAlive(ctx); err != nil {
		return "", fmt.Errorf("%s in 1970: %w", n.Name, err)
	}
	if _, err := newcomer.Kill(); err != nil {
		return "", err
	}
	what := fmt.Sprintf("%s took it for 1970, and %s joined by its token", n.Name, newcomer.Name)
	if b.rng.IntN(2) == 0 {
		what += ", taking it for 1970, too"
		if err := newcomer.Harm(harm.Orders{Clock: -time.Now().Unix()}); err != nil {
			return "", err
		}
	}
	if err := b.asNew(ctx, newcomer, n); err != nil {
		return "", err
	}
	if err := b.c.AllAlive(ctx); err != nil {
		return "", fmt.Errorf("%s in 1970: %w", n.Name, err)
	}
	err := cluster.Sleep(ctx, b.between(time.Second, b.longest))
	return what, errors.Join(err, n.Harm(harm.Orders{}), newcomer.Harm(harm.Orders{}))
}

// asNew has a node that does not run lose its disk and join as a new one, by another's token. Its old identity is revoked, as an operator would.
func (b *bed) asNew(ctx context.Context, n, by *cluster.Node) error {
	c, err := by.Client()
	if err != nil {
		return err
	}
	old := n.ID()
	if err := cluster.WaitFor(ctx, back, "the old "+n.Name+" to be revoked", func(ctx context.Context) (bool, error) {
		_, err := c.Revoke(ctx, &apiv1.RevokeRequest{Node: old})
		return err == nil, err
	}); err != nil {
		return err
	}
	if err := empty(n.Data); err != nil {
		return err
	}
	var token string
	if err := cluster.WaitFor(ctx, back, "a token that others take, too", func(ctx context.Context) (bool, error) {
		res, err := c.Token(ctx, &apiv1.TokenRequest{})
		if err != nil {
			return false, err
		}
		token = res.GetToken()
		// An hour from now, by the cluster's clock, whatever that of the node says.
		if left := time.Until(res.GetExpires().AsTime()); left < 30*time.Minute || left > 90*time.Minute {
			return false, fmt.Errorf("%s makes one that expires in %s", by.Name, left.Round(time.Second))
		}
		return true, nil
	}); err != nil {
		return err
	}
	return n.Start(ctx, "--join", token)
}

// rollBack puts an old copy of a node's data folder back. The node finds out, puts it aside and joins with a new identity, by itself.
func rollBack(ctx context.Context, b *bed) (string, error) {
	n, err := b.voter(ctx)
	if err != nil {
		return "", err
	}
	if _, err := n.Kill(); err != nil {
		return "", err
	}
	copied := filepath.Join(b.c.Dir, n.Name+".copy")
	if err := os.RemoveAll(copied); err != nil {
		return "", err
	}
	if err := cluster.CopyFolder(n.Data, copied); err != nil {
		return "", err
	}
	if err := n.Start(ctx); err != nil {
		return "", err
	}
	if err := b.c.AllAlive(ctx); err != nil {
		return "", err
	}
	if err := cluster.Sleep(ctx, b.between(500*time.Millisecond, 3*time.Second)); err != nil {
		return "", err
	}
	if _, err := n.Kill(); err != nil {
		return "", err
	}
	if err := empty(n.Data); err != nil {
		return "", err
	}
	if err := cluster.CopyFolder(copied, n.Data); err != nil {
		return "", err
	}
	old := n.ID()
	if err := n.Start(ctx); err != nil {
		return "", err
	}
	if err := b.renewed(ctx, n, old); err != nil {
		return "", err
	}
	return "an old copy of the disk of " + n.Name + " was put back: it was noticed, and the node has a new identity", os.RemoveAll(filepath.Join(n.Data, "lost+found"))
}

// renewed waits until a node has a new identity, with what it held aside, and the old one is no member any more.
func (b *bed) renewed(ctx context.Context, n *cluster.Node, old string) error {
	if err := cluster.WaitFor(ctx, back, n.Name+" to have a new identity", func(ctx context.Context) (bool, error) {
		if n.ID() == old {
			return false, errors.New("it goes by its old one")
		}
		st, err := b.status(ctx, n)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(st.GetWarnings(), func(w string) bool { return strings.Contains(w, "new identity") && strings.Contains(w, old) }) {
			return false, fmt.Errorf("its warnings are %q", st.GetWarnings())
		}
		return true, nil
	}); err != nil {
		return err
	}
	if kept, err := filepath.Glob(filepath.Join(n.Data, "lost+found", "*", "identity.key")); err != nil || len(kept) != 1 {
		return fmt.Errorf("what %s held is not aside: %v (%w)", n.Name, kept, err)
	}
	c, err := b.other(n).Client()
	if err != nil {
		return err
	}
	return cluster.WaitFor(ctx, back, "the old identity of "+n.Name+" to be no member", func(ctx context.Context) (bool, error) {
		res, err := c.Nodes(ctx, &apiv1.NodesRequest{})
		if err != nil {
			return false, err
		}
		there := slices.ContainsFunc(res.GetNodes(), func(x *apiv1.Node) bool { return x.GetId() == old })
		return !there, nil
	})
}

// bridge parts the nodes into two halves that hear nothing of each other, but for one node that hears and is heard by all.
func bridge(ctx context.Context, b *bed) (string, error) {
	nodes := b.some(len(b.c.Nodes))
	middle, left, right := nodes[0], nodes[1:(len(nodes)+1)/2], nodes[(len(nodes)+1)/2:]
	for _, l := range left {
		for _, r := range right {
			if err := errors.Join(l.Deaf(r, false), r.Deaf(l, false)); err != nil {
				return "", err
			}
		}
	}
	held := b.between(time.Second, b.longest)
	err := cluster.Sleep(ctx, held)
	for _, n := range nodes {
		err = errors.Join(err, n.Hear())
	}
	return fmt.Sprintf("%s and %s met only at %s for %s", names(left), names(right), middle.Name, held.Round(time.Millisecond)), err
}
