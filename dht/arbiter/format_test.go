package arbiter

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// ofFormat proposes a put of a format at the leader, and returns its answer.
func (c *cluster) ofFormat(format uint32, key, body string) *wirev1.ArbiterResponse {
	c.t.Helper()
	put := &wirev1.ArbiterOp{Kind: &wirev1.ArbiterOp_Put{Put: &wirev1.ArbiterPut{Key: key, Body: []byte(body)}}}
	e := &wirev1.ArbiterEntry{Format: format, Commands: []*wirev1.ArbiterCommand{
		{Kind: &wirev1.ArbiterCommand_Txn{Txn: &wirev1.ArbiterTxn{Nonce: c.draw() | 1, Then: []*wirev1.ArbiterOp{put}}}},
	}}
	b, err := proto.Marshal(e)
	if err != nil {
		c.t.Fatal(err)
	}
	var l *node
	c.eventually(5*time.Second, "a leader", func() bool { l = c.leader(); return l != nil })
	return l.arb().propose(c.t.Context(), b, l.arb().view.now().at.inc)
}

// formats are those that the live nodes show.
func (c *cluster) formats() (least, most uint32) {
	for i, n := range c.live() {
		f := n.arb().Status().Format
		if i == 0 || f < least {
			least = f
		}
		most = max(most, f)
	}
	return least, most
}

// upgrade starts a node again, by another version.
func (c *cluster) upgrade(n *node, format uint32) {
	c.kill(n)
	time.Sleep(500 * time.Millisecond)
	n.format.Store(format)
	c.up(n, false)
}

// While a cluster is upgraded, one node after the other, it works as before: nothing of the new format is taken. When the last one knows it, the
// format rises by itself, and what is of it is taken, by all.
func TestFormatRisesWhenEveryMemberKnowsIt(t *testing.T) {
	inCluster(t, 31, 6, func(c *cluster) { // five voters, and one that follows
		for i, n := range c.nodes {
			if _, most := c.formats(); most != 1 {
				t.Fatalf("the format is %d with %d of %d upgraded", most, i, len(c.nodes))
			}
			if resp := c.ofFormat(2, "new", "x"); resp.GetCode() != wirev1.ArbiterResponse_FORMAT || !strings.Contains(resp.GetReason(), "format 2") {
				t.Fatalf("an entry of format 2 with %d upgraded: %v", i, resp)
			}
			c.upgrade(n, 2)
			for _, at := range c.live() {
				if err := put(at.arb(), "mixed", n.id.String()+at.id.String(), 10*time.Second); err != nil {
					t.Fatalf("with %d upgraded, at one of format %d: %v", i+1, at.format.Load(), err)
				}
			}
		}
		c.eventually(15*time.Second, "format 2 everywhere", func() bool { least, _ := c.formats(); return least == 2 })
		if resp := c.ofFormat(2, "new", "x"); resp.GetCode() != wirev1.ArbiterResponse_OK {
			t.Fatalf("an entry of format 2: %v", resp)
		}
		c.eventually(5*time.Second, "it to be known everywhere", func() bool {
			for _, n := range c.live() {
				if r, ok := n.arb().Get("new"); !ok || string(r.Body) != "x" {
					return false
				}
			}
			return true
		})
	})
}

// A member that is dead counts as what it was: it may come back so. When it has left, it holds nothing back.
func TestADeadMemberHoldsTheFormatBack(t *testing.T) {
	inCluster(t, 32, 4, func(c *cluster) {
		old := c.nodes[3]
		for _, n := range c.nodes[:3] {
			c.upgrade(n, 2)
			time.Sleep(2 * time.Second)
		}
		c.kill(old)
		time.Sleep(time.Minute)
		if _, most := c.formats(); most != 1 {
			t.Fatalf("the format is %d, and a dead member knows 1", most)
		}
		for _, n := range c.live() {
			n.view().change(old.id, func(m *Member) { m.Left = true })
		}
		c.eventually(15*time.Second, "format 2", func() bool { least, _ := c.formats(); return least == 2 })
	})
}

// Who does not know the format that the group has agreed on can neither join nor come back, and says why.
func TestAnOldNodeIsRefusedByANewerGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 33)
		defer c.close()
		for i := range 3 {
			n := c.add()
			n.format.Store(2)
			c.up(n, i == 0)
			time.Sleep(50 * time.Millisecond)
		}
		c.settled(10*time.Second, 3, 0)
		c.eventually(15*time.Second, "format 2", func() bool { least, _ := c.formats(); return least == 2 })

		refused := func(n *node, err error) {
			t.Helper()
			if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "start a newer version") {
				t.Errorf("%s: %v", n.id, err)
			}
		}
		young := c.add()
		young.format.Store(1)
		c.up(young, false)
		select {
		case err := <-young.done:
			refused(young, err)
		case <-time.After(10 * time.Second):
			t.Fatal("an old node follows a newer group")
		}
		young.end()
		c.net.Kill(young.id)

		back := c.nodes[2]
		c.kill(back)
		time.Sleep(time.Second)
		back.format.Store(1)
		if err := back.tryStart(false); err == nil {
			err = <-back.done
			back.end()
			c.net.Kill(back.id)
			refused(back, err)
		} else {
			c.net.Kill(back.id)
			refused(back, err)
		}
		if err := put(c.nodes[0].arb(), "after", "1", 10*time.Second); err != nil {
			t.Fatal(err)
		}
		// By the newer version it is what it was.
		back.fs = back.fs.CrashClone(vfs.CrashCloneCfg{})
		back.format.Store(2)
		c.up(back, false)
		c.settled(15*time.Second, 3, 0)
	})
}
