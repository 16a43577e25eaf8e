package state

import (
	"errors"
	"fmt"

	"github.com/RaduBerinde/btreemap"
	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func allStrings() (btreemap.LowerBound[string], btreemap.UpperBound[string]) {
	return btreemap.Min[string](), btreemap.Max[string]()
}

func allCalls() (btreemap.LowerBound[callKey], btreemap.UpperBound[callKey]) {
	return btreemap.Min[callKey](), btreemap.Max[callKey]()
}

// Checkpoint sends the state as frames and returns its mark. since 0 asks for all of it; another mark asks for what happened after it, and gets all of
// it when the journal does not reach back that far or would be longer (the header's since_mark says which). It works on the version of the moment it
// was called and stops nobody.
func (s *Store) Checkpoint(since uint64, chunk int, send Send) (uint64, error) {
	v, entries, err := s.checkpointSource(since)
	if err != nil {
		return 0, err
	}
	chunk = clampChunk(chunk)
	if entries == nil {
		return v.mark, v.sendFull(chunk, send)
	}
	header := &componentv1.StateFrame{Mark: v.mark, Schema: v.schema, SinceMark: since}
	for _, e := range entries {
		header.TotalBytes += uint64(len(e.Body))
	}
	if header.TotalBytes > uint64(v.pairBytes+v.dedupe) {
		return v.mark, v.sendFull(chunk, send)
	}
	if err := send(seal(header)); err != nil {
		return 0, err
	}
	for _, e := range entries {
		if err := EntryFrames(e, chunk, send); err != nil {
			return 0, err
		}
	}
	return v.mark, send(endFrame(v.mark))
}

// checkpointSource returns a version and, for a delta, the entries that lead to it; nil entries ask for a full checkpoint.
func (s *Store) checkpointSource(since uint64) (*version, []JournalEntry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.snapshotLocked()
	if since == 0 {
		return v, nil, nil
	}
	entries, err := s.journal.since(since)
	switch {
	case errors.Is(err, ErrGone):
		return v, nil, nil
	case err != nil:
		return nil, nil, fmt.Errorf("checkpoint: %w", err)
	case entries == nil:
		entries = []JournalEntry{}
	}
	return v, entries, nil
}

func endFrame(mark uint64) *componentv1.StateFrame {
	return seal(&componentv1.StateFrame{Section: componentv1.SectionEnd, Mark: mark, Last: true})
}

func (v *version) sendFull(chunk int, send Send) error {
	header := &componentv1.StateFrame{Mark: v.mark, Schema: v.schema, TotalBytes: v.encodedBytes()}
	if err := send(seal(header)); err != nil {
		return err
	}
	w := &sectionWriter{section: componentv1.SectionMap, chunk: chunk, send: send}
	var scratch []byte
	for k, val := range v.pairs.Ascend(allStrings()) {
		scratch = appendPair(scratch[:0], k, val)
		if err := w.record(scratch); err != nil {
			return err
		}
	}
	if err := w.flush(); err != nil {
		return err
	}
	w = &sectionWriter{section: componentv1.SectionDedupe, chunk: chunk, send: send}
	for d := range v.dedupes {
		b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(scratch[:0], d)
		if err != nil {
			return fmt.Errorf("encode dedupe table: %w", err)
		}
		scratch = b
		if err := w.record(b); err != nil {
			return err
		}
	}
	if err := w.flush(); err != nil {
		return err
	}
	return send(endFrame(v.mark))
}
