package arbiter

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// What is of another shard is refused, with its number, and changes nothing here: a call, what a call tells of the group, a feed, an entry, a snapshot.
func TestWhatIsOfAnotherShardIsRefused(t *testing.T) {
	inCluster(t, 18, 3, func(c *cluster) {
		time.Sleep(5 * time.Second)
		lead := c.leader()
		other := c.live()[0]
		if other == lead {
			other = c.live()[1]
		}
		ctx, cancel := within(10 * time.Second)
		defer cancel()
		_, before := lead.arb().disk.incarnations()
		// Its incarnation is higher: it would end this group's.
		ahead := &wirev1.ArbiterIncarnation{Number: before.number + 5, Lineage: 9}
		resp := new(wirev1.ArbiterResponse)
		c.must(other.arb().caller.Call(ctx, lead.id, protoCall, &wirev1.ArbiterRequest{Shard: 1, Incarnation: ahead, Kind: &wirev1.ArbiterRequest_ReadIndex{ReadIndex: true}}, resp))
		if resp.GetCode() != wirev1.ArbiterResponse_INVALID || !strings.Contains(resp.GetReason(), "of another shard: 1") {
			c.t.Errorf("a call: %s %q", resp.GetCode(), resp.GetReason())
		}
		lead.arb().hear(&wirev1.ArbiterWhere{Shard: 1, Incarnation: ahead.GetNumber(), Lineage: ahead.GetLineage()})
		if _, now := lead.arb().disk.incarnations(); now != before {
			c.t.Errorf("it has taken incarnation %s of another shard for its own group's, %s", now, before)
		}
		s, err := other.arb().cfg.Peers.Open(ctx, lead.id, protoFeed)
		c.must(err)
		_, err = protodelim.MarshalTo(s, &wirev1.ArbiterFeedRequest{Shard: 1, Incarnation: ahead.GetNumber(), Lineage: ahead.GetLineage()})
		c.must(err)
		if n, err := s.Read(make([]byte, 1)); n > 0 || err == nil {
			c.t.Errorf("a feed gives %d bytes", n)
		}
		if _, err := other.arb().follow.take(&wirev1.ArbiterFeedUpdate{Shard: 1}, nil); !errors.Is(err, errShard) {
			c.t.Errorf("what a feed brings: %v", err)
		}
		if _, now := lead.arb().disk.incarnations(); now != before {
			c.t.Errorf("a feed's request has it meet %s", now)
		}
		c.must(put(lead.arb(), "a", "1", time.Second)) // nothing has stopped
	})
	entry, err := proto.Marshal(&wirev1.ArbiterEntry{Format: 1, Shard: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decodeEntry(entry, MaxFormat); !errors.Is(err, errShard) || !errors.Is(err, errUnknown) {
		t.Errorf("an entry: %v", err)
	}
	f := newMachine().freeze()
	f.header.Shard = 1
	var b bytes.Buffer
	if err := f.write(&b); err != nil {
		t.Fatal(err)
	}
	if _, err := readSnapshot(&b); !errors.Is(err, errShard) {
		t.Errorf("a snapshot: %v", err)
	}
	if shardKey(0) != PlacementKey || shardKey(1) == PlacementKey {
		t.Errorf("keys %q, %q", shardKey(0), shardKey(1))
	}
}
