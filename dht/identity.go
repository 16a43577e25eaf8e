package dht

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
)

// identityName is the file of the node's private key, in libp2p's protobuf encoding.
const identityName = "identity.key"

// maxIdentity bounds the key file; an Ed25519 key takes 68 bytes.
const maxIdentity = 4096

// LoadIdentity returns the node's Ed25519 key from dir, making it (file mode 0600, atomically, durably) when there is none. fresh is
// true when it was made: a data directory that is empty must come with a new identity, and this is where it gets it. A key file that
// others can read, or that is damaged, is refused and left alone.
func LoadIdentity(fs vfs.FS, dir string) (key crypto.PrivKey, fresh bool, err error) {
	path := fs.PathJoin(dir, identityName)
	key, err = readIdentity(fs, path)
	if err == nil {
		return key, false, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, false, fmt.Errorf("read identity %s: %w", path, err)
	}
	key, _, err = crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, false, fmt.Errorf("make an identity: %w", err)
	}
	if err := writeIdentity(fs, dir, path, key); err != nil {
		return nil, false, fmt.Errorf("write identity %s: %w", path, err)
	}
	return key, true, nil
}

func readIdentity(fs vfs.FS, path string) (crypto.PrivKey, error) {
	f, err := fs.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	if f.Fd() != vfs.InvalidFd {
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		if st.Mode().Perm()&0o077 != 0 {
			return nil, fmt.Errorf("the private key is open to others (mode %#o); if nobody has read it, try: chmod 600 %s", st.Mode().Perm(), path)
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, maxIdentity))
	if err != nil {
		return nil, err
	}
	key, err := crypto.UnmarshalPrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("damaged (%w); restore it from a copy, or remove the whole data directory to join as a new node", err)
	}
	return key, nil
}

// writeIdentity writes beside and renames, so that no crash leaves half a key under the name.
func writeIdentity(fs vfs.FS, dir, path string, key crypto.PrivKey) error {
	b, err := crypto.MarshalPrivateKey(key)
	if err != nil {
		return err
	}
	if err := store.MkdirAll(fs, dir); err != nil {
		return err
	}
	tmp := path + ".new"
	f, err := fs.Create(tmp, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	if fd := f.Fd(); fd != vfs.InvalidFd { // before the key is in it
		if err := syscall.Fchmod(int(fd), 0o600); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := fs.Rename(tmp, path); err != nil {
		return err
	}
	return store.SyncDir(fs, dir)
}

// IDOf returns the peer id of a key.
func IDOf(key crypto.PrivKey) (peer.ID, error) { return peer.IDFromPrivateKey(key) }
