package bench

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// SinkCommand is the command of the binary that is the baseline's receiver: it keeps what comes over TLS and acknowledges it after the fsync.
const SinkCommand = "__sink"

const (
	// sinkChunk is how much a sender and a receiver of the baseline handle at a time.
	sinkChunk = 256 << 10
	sinkPort  = 7599
)

// A message to a sink is its length (8 bytes, big endian) and so many bytes. The answer, after the fsync, is their SHA-256.

// ServeSink listens at an address, says where on standard output, and keeps what comes in files of a folder until standard input ends.
func ServeSink(addr, dir string) error {
	cert, err := selfSigned()
	if err != nil {
		return err
	}
	ln, err := tls.Listen("tcp", addr, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})
	if err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // its end, however it comes, is the sign to end
		_ = ln.Close()                       // Accept says so
	}()
	f, err := os.CreateTemp(dir, "sink")
	if err != nil {
		return errors.Join(err, ln.Close())
	}
	k := &keeper{f: f}
	fmt.Println(ln.Addr())
	for {
		c, err := ln.Accept()
		if err != nil {
			return errors.Join(f.Close(), os.Remove(f.Name()))
		}
		go k.serve(c)
	}
}

// keeper writes what all connections of a sink bring into one file, as a log does: an fsync serves all that was written before it began.
type keeper struct {
	f *os.File

	mu      sync.Mutex // guards written and at
	written uint64     // messages
	at      int64

	syncMu sync.Mutex // held for an fsync
	synced uint64     // messages on disk; guarded by syncMu
}

func (k *keeper) serve(c net.Conn) {
	defer c.Close() // what is wrong with it the other side sees
	r := bufio.NewReaderSize(c, sinkChunk)
	buf := make([]byte, sinkChunk)
	for {
		sum, err := k.take(r, buf)
		if err != nil {
			return
		}
		if _, err := c.Write(sum); err != nil {
			return
		}
	}
}

// take keeps one message and returns its SHA-256 when it is on disk.
func (k *keeper) take(r io.Reader, buf []byte) ([]byte, error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	left := binary.BigEndian.Uint64(head[:])
	k.mu.Lock()
	at := k.at
	k.at += int64(left)
	k.mu.Unlock()
	sum := sha256.New()
	for left > 0 {
		piece := buf[:min(uint64(len(buf)), left)]
		if _, err := io.ReadFull(r, piece); err != nil {
			return nil, err
		}
		sum.Write(piece)
		if _, err := k.f.WriteAt(piece, at); err != nil {
			return nil, err
		}
		at, left = at+int64(len(piece)), left-uint64(len(piece))
	}
	return sum.Sum(nil), k.sync()
}

// keep is take for what is here already.
func (k *keeper) keep(data []byte) error {
	k.mu.Lock()
	at := k.at
	k.at += int64(len(data))
	k.mu.Unlock()
	if _, err := k.f.WriteAt(data, at); err != nil {
		return err
	}
	return k.sync()
}

// sync returns when all that its caller has written is on disk.
func (k *keeper) sync() error {
	k.mu.Lock()
	k.written++
	mine := k.written
	k.mu.Unlock()
	k.syncMu.Lock()
	defer k.syncMu.Unlock()
	if k.synced >= mine {
		return nil
	}
	k.mu.Lock()
	covers := k.written
	k.mu.Unlock()
	if err := k.f.Sync(); err != nil {
		return err
	}
	k.synced = covers
	return nil
}

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("a key for the baseline: %w", err)
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "sink"}, NotAfter: time.Now().Add(24 * time.Hour)}
	raw, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("a certificate for the baseline: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}, nil
}

// sinks are receivers of the baseline, one process at each of some nodes of a stand.
type sinks struct {
	s     *stand
	cmds  []*exec.Cmd
	stops []io.Closer
	addrs []string
}

// startSinks starts a receiver where each of the last n nodes is.
func (s *stand) startSinks(ctx context.Context, n int) (_ *sinks, err error) {
	k := &sinks{s: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, k.end())
		}
	}()
	for _, node := range s.cluster.Nodes[len(s.cluster.Nodes)-n:] {
		host, _, err := net.SplitHostPort(s.cluster.Network.HTTP(node.Index))
		if err != nil {
			return nil, fmt.Errorf("start a receiver at %s: %w", node.Name, err)
		}
		dir := filepath.Join(s.dir, fmt.Sprintf("sink%d", node.Index))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		addr, err := k.start(ctx, node.Index, net.JoinHostPort(host, s.port(sinkPort)), dir)
		if err != nil {
			return nil, fmt.Errorf("start a receiver at %s: %w", node.Name, err)
		}
		k.addrs = append(k.addrs, addr)
	}
	return k, nil
}

func (k *sinks) start(ctx context.Context, at int, addr, dir string) (string, error) {
	cmd := k.s.cluster.Command(SinkCommand, addr, dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := k.s.cluster.Network.Start(at, cmd); err != nil {
		return "", err
	}
	k.cmds, k.stops = append(k.cmds, cmd), append(k.stops, in)
	stop := context.AfterFunc(ctx, func() { _ = in.Close() }) // it has ended, or ends now
	defer stop()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("it did not say where it listens: %w", err)
	}
	return line[:len(line)-1], nil
}

// dial opens a connection to each receiver.
func (k *sinks) dial() ([]net.Conn, error) {
	var out []net.Conn
	for _, addr := range k.addrs {
		raw, err := k.s.cluster.Network.Dial(addr)
		if err != nil {
			return out, fmt.Errorf("reach the baseline's receiver: %w", err)
		}
		// The receiver's certificate is made by it just now, and nobody else is on this network: what is measured is the cost of TLS.
		out = append(out, tls.Client(raw, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}))
	}
	return out, nil
}

// copyTo sends data to each receiver at the same time and returns when all have it on disk; it hashes it itself, too, and compares.
func copyTo(conns []net.Conn, data []byte) (time.Duration, error) {
	begin := time.Now()
	errs := make([]error, len(conns))
	sums := make([][sha256.Size]byte, len(conns))
	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() { errs[i] = send(c, data, sums[i][:]) })
	}
	want := sha256.Sum256(data)
	wg.Wait()
	took := time.Since(begin)
	for i := range conns {
		if errs[i] == nil && sums[i] != want {
			errs[i] = errors.New("the baseline's receiver has other bytes")
		}
	}
	return took, errors.Join(errs...)
}

func send(c net.Conn, data, sum []byte) error {
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, uint64(len(data)))); err != nil {
		return err
	}
	for rest := data; len(rest) > 0; {
		n := min(len(rest), sinkChunk)
		if _, err := c.Write(rest[:n]); err != nil {
			return err
		}
		rest = rest[n:]
	}
	_, err := io.ReadFull(c, sum)
	return err
}

func closeAll(conns []net.Conn) error {
	var errs []error
	for _, c := range conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// end ends the receivers.
func (k *sinks) end() error {
	var errs []error
	for i, cmd := range k.cmds {
		errs = append(errs, k.stops[i].Close(), cmd.Wait())
	}
	return errors.Join(errs...)
}
