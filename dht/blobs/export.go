package blobs

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// Export calls f with the encoding of each node at and below the roots, each once and behind all that it links to. The encoding is f's to
// keep. Everything must be here (Fetch) and must be kept meanwhile (Pin): a node that is not is a *MissingError.
func (s *Store) Export(ctx context.Context, roots []Hash, f func(enc []byte) error) error {
	if !s.work.enter() {
		return ErrClosed
	}
	defer s.work.leave()
	type frame struct {
		hash  Hash
		links []Link
	}
	seen := map[Hash]struct{}{}
	var stack []frame
	visit := func(h Hash) error {
		if _, ok := seen[h]; ok {
			return nil
		}
		seen[h] = struct{}{}
		hd, ok, err := s.headOf(h)
		if err == nil && !ok {
			err = &MissingError{Hash: h}
		}
		stack = append(stack, frame{h, hd.links})
		return err
	}
	for _, root := range roots {
		err := visit(root)
		for err == nil && len(stack) > 0 {
			if err = ctx.Err(); err != nil {
				break
			}
			top := &stack[len(stack)-1]
			if len(top.links) > 0 {
				next := top.links[0].Hash
				top.links = top.links[1:]
				err = visit(next)
				continue
			}
			h := top.hash
			stack = stack[:len(stack)-1]
			var enc []byte
			if _, enc, err = s.get(h); err == nil {
				err = f(enc)
			}
		}
		if err != nil {
			return fmt.Errorf("export %s: %w", root.Short(), err)
		}
	}
	return nil
}

// Roots calls f with each complete node that is here and whose kind is one of these, in no order that means anything. f must not keep the node's data
// beyond the call, and ends the search with an error.
func (s *Store) Roots(ctx context.Context, kinds []string, f func(Hash, Node) error) error {
	if !s.work.enter() {
		return ErrClosed
	}
	defer s.work.leave()
	return s.eachHead(s.db, func(h Hash, hd head) error {
		if err := ctx.Err(); err != nil || !slices.Contains(kinds, hd.kind) {
			return err
		}
		ok, err := s.isComplete(h)
		if err != nil || !ok {
			return err
		}
		n, _, err := s.get(h)
		var corrupt *CorruptError
		var missing *MissingError
		switch {
		case errors.As(err, &corrupt), errors.As(err, &missing):
			return nil // it is none then
		case err != nil:
			return err
		}
		return f(h, n)
	})
}

// importBytes is how much an Importer gathers for one batch.
const importBytes = 1 << 20

// Importer keeps encodings that come from somewhere else than a peer. It is used by one goroutine, and ends with Close.
type Importer struct {
	s    *Store
	held [][]byte
	size int
}

// Import begins one.
func (s *Store) Import() *Importer { return &Importer{s: s} }

// Add keeps a node; it may come before or behind those that it links to. The error wraps ErrInvalid for what is no node.
func (i *Importer) Add(enc []byte) error {
	if _, err := decodeNode(enc); err != nil {
		return err
	}
	i.held = append(i.held, slices.Clone(enc))
	if i.size += len(enc); i.size < importBytes {
		return nil
	}
	return i.flush()
}

func (i *Importer) flush() error {
	if !i.s.work.enter() {
		return ErrClosed
	}
	defer i.s.work.leave()
	i.s.sweeping.RLock()
	defer i.s.sweeping.RUnlock()
	st := i.s.newStager(true)
	for _, enc := range i.held {
		if _, _, err := st.add(enc); err != nil {
			st.drop()
			return fmt.Errorf("import: %w", err)
		}
	}
	i.held, i.size = nil, 0
	if err := st.applyLazily(); err != nil {
		st.drop()
		return fmt.Errorf("import: %w", err)
	}
	return nil
}

// Close returns when all that was added is on disk.
func (i *Importer) Close() error {
	err := i.flush()
	return errors.Join(err, i.s.durable(i.s.wal.now()))
}
