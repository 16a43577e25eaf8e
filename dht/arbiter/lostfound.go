package arbiter

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"
)

// lost is what lost+found/<incarnation>.json says: what this node held of an incarnation that a higher one superseded.
type lost struct {
	Node         string         `json:"node"`
	Cluster      string         `json:"cluster"`
	Incarnation  uint64         `json:"incarnation"`
	SupersededBy uint64         `json:"superseded_by"`
	Time         time.Time      `json:"time"`
	Term         uint64         `json:"term"`
	LastIndex    uint64         `json:"last_index"`
	Committed    uint64         `json:"committed"`       // known to be, here; what follows may or may not have been
	Begun        uint64         `json:"begun,omitempty"` // last index that the next incarnation took over, where this node knows it
	Unreadable   string         `json:"unreadable,omitempty"`
	Registers    []lostRegister `json:"registers"`
}

type lostRegister struct {
	Key       string   `json:"key"`
	Epoch     uint64   `json:"epoch"`
	Owner     string   `json:"owner,omitempty"`
	Seq       uint64   `json:"seq"`
	Root      string   `json:"root,omitempty"`
	Holders   []string `json:"holders,omitempty"`
	Revision  uint64   `json:"revision"`
	Index     uint64   `json:"index"`
	Committed bool     `json:"committed"`
	Body      []byte   `json:"body,omitempty"` // base64
}

// lostFoundTries bounds the names of files of the same incarnation.
const lostFoundTries = 100

// export writes what the raft database holds into lost+found, for a person to read, and returns the file. Nothing is written twice over.
func (a *Arbiter) export(group, higher incarnation) (string, error) {
	doc, err := a.lostOf(group, higher)
	if err != nil {
		return "", fmt.Errorf("read what incarnation %s left: %w", group, err)
	}
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return "", err
	}
	fs, dir := a.cfg.FS, a.cfg.LostFound
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("lost+found: %w", err)
	}
	file := filepath.Join(dir, fmt.Sprintf("%d.json", group.number))
	for n := 2; n < lostFoundTries; n++ {
		if _, err := fs.Stat(file); err != nil {
			break
		}
		file = filepath.Join(dir, fmt.Sprintf("%d-%d.json", group.number, n))
	}
	temp := file + ".tmp"
	f, err := fs.Create(temp, "lost+found")
	if err != nil {
		return "", fmt.Errorf("lost+found: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = fs.Rename(temp, file)
	}
	if err == nil {
		err = a.syncDir(dir)
	}
	if err != nil {
		return "", fmt.Errorf("lost+found: %w", err)
	}
	return file, nil
}

func (a *Arbiter) syncDir(dir string) error {
	d, err := a.cfg.FS.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lostOf replays snapshot and log to their ends.
func (a *Arbiter) lostOf(group, higher incarnation) (*lost, error) {
	d := a.disk
	committed, err := d.knownCommitted()
	if err != nil {
		return nil, err
	}
	m := newMachine()
	snaps, err := d.List()
	if err != nil {
		return nil, err
	}
	var from uint64
	if len(snaps) > 0 {
		_, r, err := d.Open(snaps[0].ID)
		if err != nil {
			return nil, err
		}
		if m, err = readSnapshot(r); err != nil {
			return nil, err
		}
		from = snaps[0].Index
	}
	out := &lost{
		Node: a.cfg.Self.String(), Incarnation: group.number, SupersededBy: higher.number, Time: time.Now().UTC(), LastIndex: max(from, d.last),
		Committed: max(committed, from), Registers: []lostRegister{},
	}
	if out.Term, err = d.GetUint64(keyTerm); err != nil && !errors.Is(err, errNoKey) {
		return nil, err
	}
	f := &fsm{m: m, format: a.cfg.Format}
	for i := max(from+1, d.first); i <= d.last && d.last > 0; i++ {
		var l raft.Log
		if err := d.GetLog(i, &l); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if _, _, err := f.one(&l); err != nil {
			out.Unreadable = fmt.Sprintf("entry %d and what follows: %v", i, err)
			break
		}
	}
	out.Cluster = m.meta.Cluster
	if now := a.view.now().meta; now.incarnation() == higher {
		out.Begun = now.Begun
	}
	it := m.tree.Root().Iterator()
	for _, v, ok := it.Next(); ok; _, v, ok = it.Next() {
		r := v.(*Register)
		x := lostRegister{
			Key: r.Key, Epoch: r.Epoch, Seq: r.Seq, Root: hex.EncodeToString(r.Root), Revision: r.Revision, Index: r.Index,
			Committed: r.Index <= out.Committed, Body: r.Body,
		}
		if r.Owner != "" {
			x.Owner = r.Owner.String()
		}
		for _, h := range r.Holders {
			x.Holders = append(x.Holders, h.String())
		}
		out.Registers = append(out.Registers, x)
	}
	return out, nil
}
