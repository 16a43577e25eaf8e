package registry

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
)

// pushed is a world of four nodes with an artifact whose holders are the first three.
func pushed(t *testing.T, f func(w *world, art *componentsv1.Artifact, body []byte)) {
	t.Helper()
	inWorld(t, 4, func(w *world) {
		body := component(machineHere(), "kv", "1.0.0", 1<<20)
		art, _, err := w.nodes[0].push("", "", w.file("kv", body))
		w.must(err)
		f(w, art, body)
	})
}

func (n *node) open(art *componentsv1.Artifact) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	f, _, err := n.Open(ctx, art.GetDigest())
	if err != nil {
		return err
	}
	sum, err := hashFile(f)
	if err == nil && sum != art.GetDigest() {
		err = errors.New("opened something else: " + sum)
	}
	return errors.Join(err, f.Close())
}

func TestManyWhoOpenFetchOnce(t *testing.T) {
	pushed(t, func(w *world, art *componentsv1.Artifact, _ []byte) {
		n := w.nodes[3]
		var goes sync.WaitGroup
		for range 20 {
			goes.Go(func() {
				if err := n.open(art); err != nil {
					w.t.Error(err)
				}
			})
		}
		goes.Wait()
		if got := len(n.noticed("fetched")); got != 1 {
			w.t.Errorf("fetched %d times", got)
		}
		if left, _ := filepath.Glob(filepath.Join(n.cfg.Cache, ".*")); len(left) != 0 {
			w.t.Errorf("left behind: %v", left)
		}
	})
}

func TestAFlippedByteIsNoticedAndFetchedAnew(t *testing.T) {
	pushed(t, func(w *world, art *componentsv1.Artifact, body []byte) {
		n := w.nodes[3]
		w.must(n.open(art))
		path := n.path(art.GetDigest())
		stamp := n.verified[art.GetDigest()]
		w.must(n.open(art))
		if n.verified[art.GetDigest()] != stamp || stamp == (fileStamp{}) {
			w.t.Error("it was verified twice")
		}
		time.Sleep(time.Second)
		w.must(os.Chmod(path, 0o700))
		bad := append([]byte(nil), body...)
		bad[len(bad)/2] ^= 1
		w.must(os.WriteFile(path, bad, 0o700))
		w.must(n.open(art))
		if len(n.noticed("corrupt")) != 1 {
			w.t.Errorf("notices: %v", n.notices)
		}
		// A file that was put in its place altogether.
		w.must(os.Remove(path))
		w.must(os.WriteFile(path, []byte("#!/bin/sh\nrm -rf /\n"), 0o700))
		w.must(n.open(art))
		w.must(os.Remove(path))
		w.must(n.open(art)) // and one that is gone
	})
}

func TestPagesThatAreNotTheFileAreRefused(t *testing.T) {
	pushed(t, func(w *world, art *componentsv1.Artifact, body []byte) {
		n := w.nodes[0]
		bad := append([]byte(nil), body...)
		bad[7] ^= 1
		link, err := n.blobs.WriteStream(context.Background(), bytes.NewReader(bad))
		w.must(err)
		err = n.fill(context.Background(), art, &componentsv1.Platform{OsArch: native(), Digest: art.GetDigest(), Root: link.Hash[:]})
		if err == nil || !strings.Contains(err.Error(), "refused") {
			w.t.Errorf("taken: %v", err)
		}
		if _, err := os.Stat(n.path(art.GetDigest())); !errors.Is(err, os.ErrNotExist) {
			w.t.Errorf("it is in the cache: %v", err)
		}
	})
}

func TestAFetchThatItsCallerGivesUpIsTakenOver(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		n := w.nodes[0]
		ctx, cancel := context.WithCancel(context.Background())
		begun := make(chan struct{})
		var goes sync.WaitGroup
		goes.Go(func() {
			err := n.once(ctx, "x", func() error { close(begun); <-ctx.Done(); return ctx.Err() })
			if !errors.Is(err, context.Canceled) {
				w.t.Error(err)
			}
		})
		<-begun
		filled := 0
		for range 5 {
			goes.Go(func() {
				if err := n.once(context.Background(), "x", func() error { filled++; return nil }); err != nil {
					w.t.Error(err)
				}
			})
		}
		time.Sleep(time.Second)
		cancel()
		goes.Wait()
		if filled == 0 {
			w.t.Error("nobody took it over")
		}
	})
}

func TestAFetchThatFailsTellsAllWhoWait(t *testing.T) {
	pushed(t, func(w *world, art *componentsv1.Artifact, _ []byte) {
		n := w.nodes[3]
		for _, other := range w.nodes[:3] {
			w.net.Kill(other.id)
		}
		var goes sync.WaitGroup
		for range 3 {
			goes.Go(func() {
				if err := n.open(art); err == nil || !strings.Contains(err.Error(), "kv@1.0.0") {
					w.t.Errorf("opened without anybody who has it: %v", err)
				}
			})
		}
		goes.Wait()
	})
}

func TestAnEarlierLifesFilesAreCleanedUp(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		n := w.nodes[0]
		left := filepath.Join(n.cfg.Cache, incoming+"123")
		w.must(os.WriteFile(left, []byte("half"), 0o600))
		if _, err := New(n.cfg); err != nil {
			w.t.Fatal(err)
		}
		if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
			w.t.Errorf("it is still there: %v", err)
		}
	})
}

func TestNewHoldersGetTheirCopies(t *testing.T) {
	pushed(t, func(w *world, art *componentsv1.Artifact, _ []byte) {
		ctx, cancel := context.WithCancel(context.Background())
		n := w.nodes[3]
		n.cfg.Holders = func(string, int) []peer.ID { return []peer.ID{n.id} }
		done := make(chan struct{})
		go func() { defer close(done); n.Repair(ctx) }() //nolint:errcheck // ends with ctx
		w.eventually(20*time.Second, "the new holder has the pages", func() bool { return n.blobs.Complete(blobs.Hash(art.GetRoot())) })
		cancel()
		<-done
	})
}
