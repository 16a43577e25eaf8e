package api

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// maxSocketPath is what fits into sockaddr_un on Linux with its final NUL; macOS has 104.
const maxSocketPath = 103

// Listen opens the address of a control API and returns it as clients write it. addr is unix:///path, http://loopback:port (port 0
// picks one) or "" for the socket in the data directory, which it makes private (0700). A data directory whose path is too long for a
// socket gets its socket in the runtime directory.
func Listen(dataDir, addr string) (net.Listener, string, error) {
	if addr == "" {
		path, err := socketPath(dataDir)
		if err != nil {
			return nil, "", err
		}
		addr = "unix://" + path
	}
	u, err := url.Parse(addr)
	if err != nil {
		return nil, "", fmt.Errorf("API address %q: %w", addr, err)
	}
	switch {
	case u.Scheme == "unix" && u.Host == "" && filepath.IsAbs(u.Path):
		ln, err := listenUnix(u.Path)
		return ln, addr, err
	case u.Scheme == "http" && (u.Path == "" || u.Path == "/"):
		if !loopback(u.Hostname()) {
			return nil, "", fmt.Errorf("API address %q: plain http is for loopback addresses only", addr)
		}
		ln, err := net.Listen("tcp", u.Host)
		if err != nil {
			return nil, "", fmt.Errorf("API address %q: %w", addr, err)
		}
		return ln, "http://" + ln.Addr().String(), nil
	}
	return nil, "", fmt.Errorf("API address %q: want unix:///path or http://127.0.0.1:port", addr)
}

func socketPath(dataDir string) (string, error) {
	abs, err := filepath.Abs(dataDir)
	if err != nil {
		return "", fmt.Errorf("data directory %q: %w", dataDir, err)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return "", fmt.Errorf("data directory: %w", err)
	}
	if err := os.Chmod(abs, 0o700); err != nil {
		return "", fmt.Errorf("make the data directory private: %w", err)
	}
	if path := filepath.Join(abs, SocketFile); len(path) <= maxSocketPath {
		return path, nil
	}
	run, err := runtimeDir(true)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(abs))
	return filepath.Join(run, hex.EncodeToString(sum[:8])+".sock"), nil
}

// listenUnix takes a socket path over from a process that died, never from one that answers. The socket is made 0600 right after it
// appears: until then, in a directory that is not private, others could connect, and would be refused for want of the token.
func listenUnix(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("API socket %s: the path has %d bytes, at most %d fit", path, len(path), maxSocketPath)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		err = errors.New("another process answers there")
		return nil, fmt.Errorf("API socket %s: %w", path, errors.Join(err, c.Close()))
	case errors.Is(err, syscall.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("API socket %s: remove what a dead process left: %w", path, err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("API socket %s: %w", path, err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("API socket %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("API socket %s: %w", path, errors.Join(err, ln.Close()))
	}
	return ln, nil
}
