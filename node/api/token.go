package api

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// TokenFile is the name of the file in the data directory that holds the token of the control API.
const TokenFile = "api.token"

// SocketFile is the name of the control API's socket in the data directory.
const SocketFile = "api.sock"

// minToken is the least length of a token: shorter ones could be guessed.
const minToken = 32

// EnsureToken returns the token of a data directory and makes one on the first call: 32 random bytes in a file of mode 0600 that only
// its owner may read. The file is replaced by nothing and nobody but an operator who deletes it.
func EnsureToken(dataDir string) (string, error) {
	path := filepath.Join(dataDir, TokenFile)
	tok, err := ReadToken(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return tok, err
	}
	raw := make([]byte, 32)
	if _, err := io.ReadFull(rand.Reader, raw); err != nil {
		return "", fmt.Errorf("make an API token: %w", err)
	}
	tok = base64.RawURLEncoding.EncodeToString(raw)
	f, err := os.CreateTemp(dataDir, TokenFile+".*") // 0600
	if err != nil {
		return "", fmt.Errorf("write the API token: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(tok + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Link(f.Name(), path) // unlike a rename, never over another one's
	}
	if errors.Is(err, fs.ErrExist) {
		return ReadToken(path)
	}
	if err != nil {
		return "", fmt.Errorf("write the API token: %w", err)
	}
	return tok, nil
}

// ReadToken reads a token file. It refuses one that others can read or write, or that belongs to another user: whoever can read it can
// command the cluster.
func ReadToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read the API token: %w", err)
	}
	defer f.Close()
	if err := privateFile(f); err != nil {
		return "", fmt.Errorf("read the API token: %w", err)
	}
	raw, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return "", fmt.Errorf("read the API token: %w", err)
	}
	tok := string(bytes.TrimSpace(raw))
	if len(tok) < minToken {
		return "", fmt.Errorf("read the API token: %s holds %d characters, want at least %d (remove it and start the node again for a new one)", path, len(tok), minToken)
	}
	return tok, nil
}

func privateFile(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", f.Name())
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o, others may read it (chmod 600 it)", f.Name(), st.Mode().Perm())
	}
	return owned(st, f.Name())
}

// owned refuses what belongs to another user; root may use anybody's.
func owned(st os.FileInfo, name string) error {
	sys, ok := st.Sys().(*syscall.Stat_t)
	if uid := os.Getuid(); ok && uid != 0 && int(sys.Uid) != uid {
		return fmt.Errorf("%s belongs to user %d, not to user %d", name, sys.Uid, uid)
	}
	return nil
}

// secret compares tokens in a time that depends on neither.
type secret [sha256.Size]byte

func newSecret(token string) secret { return sha256.Sum256([]byte(token)) }

func (s secret) is(token string) bool {
	sum := sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(s[:], sum[:]) == 1
}

// bearer takes the token from an Authorization header.
func bearer(header string) (string, bool) {
	scheme, token, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(scheme, "bearer") {
		return "", false
	}
	return strings.TrimSpace(token), true
}
