package node

import (
	"fmt"
	"time"

	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
)

// diskLow takes the node out of the voters and holders while its disk is nearly full, and back.
func (n *Node) diskLow(low bool) {
	if !n.duties(func() { n.diskIsLow = low }) || n.events == nil {
		return
	}
	ev := events.Event{Channel: "/nodes/" + n.cfg.Name, Type: "disk-low", Message: n.cfg.Name + " is no holder and no voter: its disk is nearly full"}
	if !low {
		ev.Type, ev.Message = "disk-ok", n.cfg.Name+" is holder and voter again"
	}
	n.events.Publish(ev)
}

// corruptEvery is how often a corrupt page is told of: a disk that fails has many.
const corruptEvery = 10 * time.Second

// corruptPage is told of each page that is found wrong here. It is gone already, and being fetched again.
func (n *Node) corruptPage(e *blobs.CorruptError) {
	now := n.cfg.BootTime()
	if last := n.toldCorrupt.Load(); n.events == nil || last != 0 && now-time.Duration(last) < corruptEvery || !n.toldCorrupt.CompareAndSwap(last, int64(max(now, 1))) {
		return
	}
	n.events.Publish(events.Event{
		Channel: "/nodes/" + n.cfg.Name, Type: "corrupt", Cause: e.Why,
		Message: fmt.Sprintf("a page on %s was wrong; it is fetched again from another node (%d so far)", n.cfg.Name, n.blobs.Usage().Corrupt),
		Fields:  map[string]string{"page": e.Hash.String()},
	})
}

// votesNoMore is told that the arbiter has stopped here: the others are to let somebody else vote.
func (n *Node) votesNoMore(err error) {
	n.duties(func() { n.noVote = err.Error() })
	if n.events != nil {
		n.events.Publish(events.Event{Channel: "/nodes/" + n.cfg.Name, Type: "halted", Cause: err.Error(), Message: n.cfg.Name + " votes no more"})
	}
}

// duties changes why this node may not vote or hold, and tells the others. false: there is nobody to be told yet.
func (n *Node) duties(change func()) bool {
	n.dutyMu.Lock()
	defer n.dutyMu.Unlock()
	change()
	if n.telling {
		low, halted := n.diskIsLow, n.noVote != ""
		n.members.UpdateSelf(func(i *members.Info) { i.NoVoter, i.NoHolder = low || halted, low })
	}
	return n.telling
}
