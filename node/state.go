package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coppice-project/coppice/dht/store"
)

const stateFormat = 1

// What lies in a data folder, beside its identity.
const (
	stateName    = "cluster.json"
	databaseName = "db"
	raftName     = "raft"
)

// state is what a data folder says about the cluster it belongs to. It is written when the node joins or founds it, and when it listens
// at another free port than the last time.
type state struct {
	Format      int    `json:"format"`
	Cluster     string `json:"cluster"`
	Name        string `json:"name"`
	Certificate []byte `json:"certificate"`

	Listen   []string `json:"listen,omitempty"`   // what localListen became
	Restored bool     `json:"restored,omitempty"` // from a backup, and not yet founded by a first start
	Addrs    []string `json:"addrs,omitempty"`    // what others were told to reach it at

	// Of an identity that this node had before (renew.go).
	Was    string `json:"was,omitempty"`     // peer id
	WasWhy string `json:"was_why,omitempty"` // it was given up
	Aside  string `json:"aside,omitempty"`   // folder of what it held, below the data folder
	Expel  bool   `json:"expel,omitempty"`   // it is still to be expelled
}

func loadState(fs vfs.FS, path string) (state, bool, error) {
	f, err := fs.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return state{}, false, nil
	}
	if err != nil {
		return state{}, false, fmt.Errorf("read %s: %w", path, err)
	}
	b, err := io.ReadAll(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return state{}, false, fmt.Errorf("read %s: %w", path, err)
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return state{}, false, fmt.Errorf("%s is damaged: %w; restore it, or start with an empty data folder and join anew", path, err)
	}
	if s.Format != stateFormat {
		return state{}, false, fmt.Errorf("%s has format %d, this version knows %d; use the version that wrote it", path, s.Format, stateFormat)
	}
	return s, true, nil
}

func (s state) save(fs vfs.FS, dir, path string) error {
	s.Format = stateFormat
	return writeJSON(fs, dir, path, s)
}

// writeJSON replaces a file of a folder: after a crash it is the old one or the new one.
func writeJSON(fs vfs.FS, dir, path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	temp := path + ".new"
	f, err := fs.Create(temp, vfs.WriteCategoryUnspecified)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := fs.Rename(temp, path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return store.SyncDir(fs, dir)
}
