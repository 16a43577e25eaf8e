package blobs

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	repairRetry = 30 * time.Second
	// repairLimit bounds one attempt, repairsKept what is waiting for the next.
	repairLimit = 10 * time.Second
	repairsKept = 4096
)

// repairLoop fetches nodes that were found corrupt from other members, until it succeeds.
func (s *Store) repairLoop(ctx context.Context) {
	broken := map[Hash]struct{}{}
	retry := time.NewTicker(repairRetry)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case h := <-s.repairs:
			if len(broken) < repairsKept {
				broken[h] = struct{}{}
			} else {
				s.stats.repairsDropped.Add(1)
			}
			s.repair(ctx, broken, h)
		case <-retry.C:
			s.pool.closeIdle()
			for h := range broken {
				s.repair(ctx, broken, h)
			}
		}
	}
}

func (s *Store) repair(ctx context.Context, broken map[Hash]struct{}, h Hash) {
	ctx, cancel := context.WithTimeout(ctx, repairLimit)
	defer cancel()
	err := s.FetchPages(ctx, []Hash{h}, s.cfg.Holders())
	if err != nil {
		if ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			s.cfg.Log.Warn("a corrupt node could not be fetched from another member yet", "node", h.String(), "err", err)
		}
		return
	}
	delete(broken, h)
	s.stats.repaired.Add(1)
	s.cfg.Log.Info("a corrupt node was fetched again", "node", h.String())
}

// Verify reads everything below root and checks it. It returns the nodes that are missing or were corrupt; the corrupt ones are being
// repaired.
func (s *Store) Verify(ctx context.Context, root Hash) (bad []Hash, err error) {
	if !s.work.enter() {
		return nil, ErrClosed
	}
	defer s.work.leave()
	seen := map[Hash]struct{}{root: {}}
	for todo := []Hash{root}; len(todo) > 0; {
		if err := ctx.Err(); err != nil {
			return bad, err
		}
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		n, _, err := s.get(h)
		var missing *MissingError
		var corrupt *CorruptError
		switch {
		case errors.As(err, &missing) || errors.As(err, &corrupt):
			bad = append(bad, h)
			continue
		case err != nil:
			return bad, fmt.Errorf("verify %s: %w", root.Short(), err)
		}
		for _, l := range n.Links {
			if _, ok := seen[l.Hash]; !ok {
				seen[l.Hash] = struct{}{}
				todo = append(todo, l.Hash)
			}
		}
	}
	return bad, nil
}
