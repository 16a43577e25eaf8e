package arbiter

import (
	"errors"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
)

// onDisk opens the raft database of a node that is down.
func (n *node) onDisk(f func(d *disk)) {
	n.c.t.Helper()
	d, err := openDisk(n.fs, "raft", n.c.logger())
	if err != nil {
		n.c.t.Fatal(err)
	}
	f(d)
	if err := d.Close(); err != nil {
		n.c.t.Fatal(err)
	}
}

// TestIncarnationOutranksOnDisk: a node that has met a higher incarnation and dies before it could give its own up does so when it is
// started, before it says a word, with nobody to tell it again (I8).
func TestIncarnationOutranksOnDisk(t *testing.T) {
	inCluster(t, 50, 3, func(c *cluster) {
		if err := put(c.nodes[0].arb(), "k", "v", time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		n := c.nodes[1]
		c.kill(n)
		n.onDisk(func(d *disk) {
			if _, _, err := d.setIncarnations(func(group, _ incarnation) (incarnation, incarnation) { return group, incarnation{5, 9} }); err != nil {
				t.Fatal(err)
			}
		})
		n.fs = n.fs.CrashClone(vfs.CrashCloneCfg{})
		c.net.Isolate(n.id)
		c.up(n, false)
		c.eventually(5*time.Second, "it has given its log up", func() bool {
			group, seen := n.arb().disk.incarnations()
			_, last := n.arb().disk.ends()
			return group.none() && seen == incarnation{5, 9} && last == 0
		})
		doc, err := n.lostFound("1.json")
		if err != nil || doc.SupersededBy != 5 || doc.Incarnation != 1 || doc.LastIndex == 0 || doc.Registers[0].Key != "k" {
			t.Errorf("lost+found: %+v %v", doc, err)
		}
		if answer, ok := n.arb().greet(incarnation{1, 0}); ok || answer.number != 5 {
			t.Errorf("it admits incarnation 1: %s %v", answer, ok)
		}
		// The others of incarnation 1 hear of the higher one when it is back, and give up as well: nobody goes on below it.
		c.net.Heal()
		c.eventually(20*time.Second, "nobody is of incarnation 1 any more", func() bool {
			for _, x := range c.live() {
				if group, _ := x.arb().disk.incarnations(); !group.none() {
					return false
				}
			}
			return true
		})
	})
}

// TestAnIncarnationThatWasMetIsNotForgotten: a node dies at the moment at which it has heard of a higher incarnation. Its next life knows of it, with
// nobody to tell it again (I8).
func TestAnIncarnationThatWasMetIsNotForgotten(t *testing.T) {
	inCluster(t, 54, 3, func(c *cluster) {
		n := c.nodes[1]
		n.arb().meet(incarnation{5, 9})
		c.kill(n)
		c.net.Isolate(n.id)
		c.up(n, false)
		if _, seen := n.arb().disk.incarnations(); seen != (incarnation{5, 9}) {
			t.Errorf("after its death it has seen %s", seen)
		}
		if answer, ok := n.arb().greet(incarnation{1, 0}); ok {
			t.Errorf("it admits incarnation 1: %s", answer)
		}
	})
}

// stubborn is a log that cannot be compacted.
type stubborn struct{ raft.LogStore }

func (stubborn) DeleteRange(_, _ uint64) error { return errors.New("the power went") }

// TestCutOffRenewalIsFinished: the snapshot of the next incarnation is on disk and the process dies: the log of the lower one lies beside it
// and the label does not know. The next start goes on with the higher one, alone, and hands no entry of the lower one to anybody.
func TestCutOffRenewalIsFinished(t *testing.T) {
	inPair(t, 51, func(c *cluster, a, b *node) {
		if err := put(a.arb(), "k", "v", time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		c.kill(a)
		c.kill(b)
		next := incarnation{2, 7}
		a.onDisk(func(d *disk) {
			conf, last, err := d.configuration()
			if err != nil {
				t.Fatal(err)
			}
			me := raft.ServerAddress(a.id.String())
			rc := raft.DefaultConfig()
			rc.LocalID = raft.ServerID(me)
			f := &renewal{m: newMachine(), next: next, begun: last, self: a.id, former: votersOf(conf), format: MaxFormat}
			only := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(me), Address: me}}}
			if err := raft.RecoverCluster(rc, f, stubborn{d}, d, d, nil, only); err == nil {
				t.Fatal("nothing was cut off: the test shows nothing")
			}
			if group, _ := d.incarnations(); group.number != 1 {
				t.Fatalf("the label says %s: the test shows nothing", group)
			}
		})
		a.fs = a.fs.CrashClone(vfs.CrashCloneCfg{})
		c.up(a, false)
		if err := put(a.arb(), "k2", "alone", 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if group, seen := a.arb().disk.incarnations(); group != next || seen != next {
			t.Errorf("it goes on in %s, seen %s", group, seen)
		}
		if first, _ := a.arb().disk.ends(); first <= a.arb().view.now().meta.Begun {
			t.Errorf("the log begins at %d, the incarnation behind %d", first, a.arb().view.now().meta.Begun)
		}
		c.up(b, false)
		c.settled(20*time.Second, 2, 0)
		c.has(b, "k", "v")
		c.eventually(5*time.Second, "both show incarnation 2", func() bool { return a.incarnation() == 2 && b.incarnation() == 2 })
	})
}
