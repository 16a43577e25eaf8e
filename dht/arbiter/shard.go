package arbiter

import (
	"errors"
	"fmt"
)

// thisShard is the number of the group among several that divide the registers between them. There is one so far, and the number stands where it will be needed: in
// every entry and snapshot, call, feed and raft stream, and in the key that its voters are closest to. Whoever is told of another one refuses, so that nothing of a
// later version's second group is ever taken for the first's. A version that has a second one must not speak of it before Meta.format says that all members know
// of shards in calls and feeds: versions before this one refuse foreign entries, but do not look at the number anywhere else.
const thisShard uint32 = 0

// errShard is wrapped where something is of another group than this node knows.
var errShard = errors.New("of another shard")

// ours says whether a shard number is this group's.
func ours(shard uint32) error {
	if shard == thisShard {
		return nil
	}
	return fmt.Errorf("%w: %d, this version knows shard %d only; start a newer version of this program", errShard, shard, thisShard)
}

// shardKey is the key in the overlay that a shard's voters are closest to. That of the first has no number.
func shardKey(shard uint32) string {
	if shard == 0 {
		return PlacementKey
	}
	return fmt.Sprintf("%s/%d", PlacementKey, shard)
}
