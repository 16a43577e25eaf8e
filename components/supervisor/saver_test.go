package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
)

func TestEveryCommittedMarkIsOnEnoughDisksAtAnyTime(t *testing.T) {
	onBench(t, func(b *bench) {
		rng := rand.New(rand.NewPCG(seedOf(t, 3), 1))
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		for range 60 {
			b.tape.write(1 + rng.IntN(5))
			time.Sleep(time.Duration(rng.IntN(4000)) * time.Microsecond)
			// A crash of every machine at this moment: what was answered is in the committed root, and that on enough of the disks.
			answered, reg := b.marks(), b.reg.now()
			if reg.Seq == 0 {
				continue
			}
			crashed := make([]*vfs.MemFS, 3)
			for i := range crashed {
				crashed[i] = b.fs[i].CrashClone(vfs.CrashCloneCfg{})
			}
			good := 0
			for i := range crashed {
				o := &bench{t: b.t, net: peers.NewNet(1), ids: b.ids, fs: crashed, disks: make([]*store.Store, 3), blobs: make([]*blobs.Store, 3), stop: make([]func(), 3)}
				o.open(i)
				if o.blobs[i].Complete(hashFrom(reg.Root)) {
					good++
					if mark := o.restored(i, hashFrom(reg.Root)); mark < answered {
						t.Fatalf("mark %d was answered, the committed root has %d", answered, mark)
					}
				}
				o.stop[i]()
				o.net.Close()
			}
			if good < int(reg.W) || reg.W != 2 {
				t.Fatalf("%d disks have the root, %d acknowledged it", good, reg.W)
			}
		}
		last := b.tape.write(1)
		b.eventually("all is committed", func() bool { return b.marks() == last })
	})
}

func TestCallsAtOnceShareACommit(t *testing.T) {
	onBench(t, func(b *bench) {
		b.reg.delay = 10 * time.Millisecond
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		for range 1000 {
			b.tape.write(1)
			time.Sleep(200 * time.Microsecond)
		}
		b.eventually("all is committed", func() bool { return b.marks() == 1000 })
		if b.reg.commits > 40 {
			t.Errorf("%d commits for 1000 entries in 200 ms at 10 ms each", b.reg.commits)
		}
		b.restored(0, hashFrom(b.reg.now().Root))
	})
}

func TestCompactionUnderWrites(t *testing.T) {
	onBench(t, func(b *bench) {
		b.tape.slow = 20 * time.Millisecond
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		longest := uint64(0)
		for i := range 3 * maxChain {
			b.tape.write(1)
			time.Sleep(2 * time.Millisecond)
			if i%97 == 0 { // a command's checkpoint in the middle of everything, compactions included
				b.must(b.s.Flush(context.Background(), i%2 == 0))
			}
			b.s.mu.Lock()
			if b.s.head != nil {
				longest = max(longest, b.s.head.meta.GetChain())
			}
			b.s.mu.Unlock()
		}
		last := b.tape.write(1)
		b.eventually("all is committed", func() bool { return b.marks() == last })
		for i, root := range b.reg.roots {
			if i%50 == 0 || i == len(b.reg.roots)-1 {
				b.restored(0, root)
			}
		}
		if longest > maxChain+50 || b.tape.fulls < 3 {
			t.Errorf("the longest chain had %d deltas, %d full checkpoints", longest, b.tape.fulls)
		}
	})
}

// A capture between the beginning of a compaction and its end commits what the compaction's entries do not have.
func TestACaptureDuringACompactionLeavesNoHole(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		last := b.tape.write(1)
		b.eventually("the first is committed", func() bool { return b.marks() == last })
		b.tape.slow, b.tape.lag = 500*time.Millisecond, 3*time.Millisecond
		b.s.mu.Lock()
		b.s.head.meta.Chain = maxChain // long enough
		b.s.mu.Unlock()
		b.tape.write(1)
		b.eventually("a compaction is under way", func() bool { b.s.mu.Lock(); defer b.s.mu.Unlock(); return b.s.compaction != nil })
		b.s.mu.Lock()
		b.s.head.meta.Chain = 1 // captures are no bases
		b.s.mu.Unlock()
		for i := range 200 {
			last = b.tape.write(1)
			if i%7 == 0 { // before the journal tells of it
				b.must(b.s.Flush(context.Background(), false))
			}
			time.Sleep(5 * time.Millisecond)
		}
		b.eventually("it is committed", func() bool { return b.marks() == last })
		for _, root := range b.reg.roots {
			b.restored(0, root)
		}
	})
}

func TestAChainThatCompactionDoesNotKeepUpWithIsEnded(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		last := b.tape.write(1)
		b.eventually("the first is committed", func() bool { return b.marks() == last })
		b.s.mu.Lock()
		b.s.head.meta.Chain, b.s.compactAt = fullChain, time.Now().Add(time.Hour)
		b.s.mu.Unlock()
		last = b.tape.write(1)
		b.eventually("it is committed", func() bool { return b.marks() == last })
		head, _, err := readHead(b.blobs[0], hashFrom(b.reg.now().Root))
		b.must(err)
		if head.meta.GetChain() != 0 {
			t.Errorf("its chain has %d deltas", head.meta.GetChain())
		}
	})
}

func TestAHolderThatDiesIsReplaced(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		last := b.tape.write(3)
		b.eventually("it is committed", func() bool { return b.marks() == last })
		b.kill(1)
		begin := time.Now()
		last = b.tape.write(1)
		b.eventually("the next is committed without it", func() bool { return b.marks() == last })
		if d := time.Since(begin); d > time.Second {
			t.Errorf("the commit took %s", d)
		}
		b.kill(2)
		// Nothing is written any more: the copies are made good all the same, and the register says where they are.
		b.eventually("the copies are complete again", func() bool {
			return slices.Equal(slices.Sorted(slices.Values(b.reg.now().Holders)), slices.Sorted(slices.Values([]peer.ID{b.ids[0], b.ids[3]})))
		})
		b.restored(3, hashFrom(b.reg.now().Root))
	})
}

// A silent holder must not hold up commits: repairing copies is no part of them.
func TestASilentHolderDoesNotHoldUpCommits(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		last := b.tape.write(1)
		b.eventually("it is committed", func() bool { return b.marks() == last })
		b.net.Freeze(b.ids[2])
		for range 100 {
			begin := time.Now()
			last = b.tape.write(1)
			b.eventually("it is committed", func() bool { return b.marks() == last })
			if d := time.Since(begin); d > 100*time.Millisecond {
				t.Fatalf("a commit took %s", d)
			}
			time.Sleep(50 * time.Millisecond)
		}
		b.net.Thaw(b.ids[2])
	})
}

func TestAFencedSaverEndsAndCommitsNothing(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		last := b.tape.write(1)
		b.eventually("it is committed", func() bool { return b.marks() == last })
		b.reg.claim()
		before := b.reg.now()
		b.tape.write(5)
		b.eventually("it ends", func() bool { _, over := b.s.over(); return over })
		if why, _ := b.s.over(); !errors.Is(why, errFenced) {
			t.Errorf("it ended with %v", why)
		}
		if now := b.reg.now(); now.Seq != before.Seq || b.marks() != last {
			t.Errorf("seq %d after %d, mark %d answered", now.Seq, before.Seq, b.marks())
		}
		if err := b.s.Flush(context.Background(), false); !errors.Is(err, errSaverEnded) {
			t.Errorf("a flush of an ended saver: %v", err)
		}
	})
}

// Answers of commits get lost in every way there is. Every root goes under its own number, nothing is lost, and all ends well.
func TestCommitsInDoubt(t *testing.T) {
	onBench(t, func(b *bench) {
		seed := seedOf(t, 11)
		rng, fate := rand.New(rand.NewPCG(seed, 1)), rand.New(rand.NewPCG(seed, 2)) // fate is drawn from under the register's lock
		b.reg.doubt = func() string { return []string{"", "before", "after", "late", ""}[fate.IntN(5)] }
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		for range 200 {
			b.tape.write(1)
			time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
			if answered := b.marks(); b.reg.now().Seq > 0 {
				if mark := b.restored(0, hashFrom(b.reg.now().Root)); mark < answered {
					t.Fatalf("answered %d, committed %d", answered, mark)
				}
			}
		}
		b.reg.mu.Lock()
		b.reg.doubt = nil
		b.reg.mu.Unlock()
		last := b.tape.write(1)
		b.eventually("all is committed", func() bool { return b.marks() == last })
	})
}

// The process of a saver ends while a commit is under way that comes through later. What the next process is given must hold it.
func TestSettleWaitsForTheCommitThatIsUnderWay(t *testing.T) {
	for _, how := range []string{"before", "after", "late"} {
		t.Run(how, func(t *testing.T) {
			onBench(t, func(b *bench) {
				b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
				last := b.tape.write(1)
				b.eventually("it is committed", func() bool { return b.marks() == last })
				b.reg.mu.Lock()
				b.reg.doubt = func() string { b.reg.doubt = nil; return how }
				b.reg.mu.Unlock()
				b.tape.write(1)
				b.eventually("its commit is under way", func() bool { b.s.mu.Lock(); defer b.s.mu.Unlock(); return b.s.doubt != nil && b.s.doubt.req.Key != "" })
				time.Sleep(1100 * time.Microsecond) // its answer is lost
				b.end()
				b.must(b.s.settle(context.Background()))
				reg := b.reg.now()
				saved, _ := b.s.Saved()
				if reg.Seq != saved.Seq || hashFrom(reg.Root) != saved.Root {
					t.Errorf("the log has seq %d, the saver %d", reg.Seq, saved.Seq)
				}
				time.Sleep(time.Second)
				if now := b.reg.now(); now.Seq != reg.Seq {
					t.Errorf("seq %d was committed after all was said to be settled at %d", now.Seq, reg.Seq)
				}
			})
		})
	}
}

func TestACheckpointThatTheSaverDidNotWriteEndsIt(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		last := b.tape.write(1)
		b.eventually("it is committed", func() bool { return b.marks() == last })
		b.reg.mu.Lock()
		b.reg.reg.Seq++
		b.reg.reg.Root = bytes.Repeat([]byte{1}, 32)
		b.reg.mu.Unlock()
		b.tape.write(1)
		b.eventually("it ends", func() bool { why, _ := b.s.over(); return errors.Is(why, errForeign) })
		if b.marks() != last {
			t.Errorf("mark %d was answered", b.marks())
		}
	})
}

func TestAJournalThatDoesNotReachBackIsBridged(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		last := b.tape.write(5)
		b.eventually("it is committed", func() bool { return b.marks() == last })
		b.end()
		<-b.s.done
		b.tape.write(100)
		b.tape.mu.Lock()
		b.tape.first = 90
		b.tape.mu.Unlock()
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		b.eventually("it is committed all the same", func() bool { return b.marks() == 105 })
		last = b.tape.write(1)
		b.eventually("and goes on", func() bool { return b.marks() == last })
		b.restored(0, hashFrom(b.reg.now().Root))
	})
}

func TestIntervalAndOnDemand(t *testing.T) {
	for _, opaque := range []bool{false, true} {
		t.Run(fmt.Sprint("opaque ", opaque), func(t *testing.T) {
			onBench(t, func(b *bench) {
				b.tape.opaque = opaque
				b.save(componentsv1.Durability_DURABILITY_INTERVAL, func(c *saverConfig) { c.incremental = !opaque })
				b.eventually("an empty state has its first checkpoint", func() bool { return b.reg.now().Seq == 1 })
				for i := range 5 {
					last := b.tape.write(3)
					b.eventually("it is saved within the interval", func() bool { return b.marks() == last })
					if now := b.reg.now().Seq; now != uint64(i+2) {
						t.Fatalf("seq %d, want %d", now, i+2)
					}
				}
				seq := b.reg.now().Seq
				time.Sleep(10 * time.Second)
				if b.reg.now().Seq != seq {
					t.Errorf("seq %d after %d: nothing had changed", b.reg.now().Seq, seq)
				}
				b.tape.mu.Lock()
				b.tape.broken = errors.New("disk on fire")
				b.tape.mu.Unlock()
				b.tape.write(1)
				time.Sleep(3 * time.Second)
				if _, err := b.s.Saved(); err == nil {
					t.Error("nothing says that it cannot be saved")
				}
				b.tape.mu.Lock()
				b.tape.broken = nil
				b.tape.mu.Unlock()
				b.eventually("it is saved again, and says so", func() bool { _, err := b.s.Saved(); return err == nil && b.marks() == 16 })
				b.end()
				<-b.s.done
				b.save(componentsv1.Durability_DURABILITY_ON_DEMAND, func(c *saverConfig) { c.incremental = !opaque })
				last := b.tape.write(1)
				time.Sleep(5 * time.Second)
				if b.marks() == last {
					t.Error("saved without being asked")
				}
				b.must(b.s.Flush(context.Background(), false))
				if b.marks() != last {
					t.Errorf("a flush saved up to %d of %d", b.marks(), last)
				}
				b.restored(0, hashFrom(b.reg.now().Root))
			})
		})
	}
}
