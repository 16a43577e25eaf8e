package arbiter

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
)

// GroupChange is one committed configuration of the group.
type GroupChange struct {
	Index, Term      uint64
	At               time.Time // when the leader of that time appended it, by its clock
	Voters, Learners []peer.ID
}

// GroupChanges reads from the database of a node that does not run which servers the group had, oldest first, as far back as its log
// goes and as far forward as it is known to be committed there. For audits: it changes nothing that counts.
func GroupChanges(fs vfs.FS, dir string) (out []GroupChange, err error) {
	d, err := openDisk(fs, dir, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	to, err := d.knownCommitted()
	if err != nil {
		return nil, err
	}
	for i := max(d.first, 1); i <= to; i++ {
		var l raft.Log
		if err := d.GetLog(i, &l); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if l.Type != raft.LogConfiguration {
			continue
		}
		conf, err := decodeConfiguration(l.Data)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		c := GroupChange{Index: i, Term: l.Term, At: l.AppendedAt, Voters: votersOf(conf)}
		for _, s := range conf.Servers {
			if id, err := peer.Decode(string(s.ID)); err == nil && s.Suffrage != raft.Voter {
				c.Learners = append(c.Learners, id)
			}
		}
		out = append(out, c)
	}
	return out, nil
}
