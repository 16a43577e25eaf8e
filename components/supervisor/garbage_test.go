package supervisor

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/membrane"
	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

type frameList = []*componentv1.StateFrame

// spoilt is what a component may do wrong with its state.
var spoilt = map[string]func(list frameList) frameList{
	"a wrong digest": func(list frameList) frameList { list[1].Data[0] ^= 1; return list },
	"a gap":          func(list frameList) frameList { return slices.Delete(list, 1, 2) },
	"a repetition":   func(list frameList) frameList { return slices.Insert(list, 1, list[1]) },
	"no end":         func(list frameList) frameList { return list[:len(list)-1] },
	"too much":       func(list frameList) frameList { return append(list, list[1]) },
	"nothing":        func(frameList) frameList { return nil },
	"a stand-still":  func(list frameList) frameList { return append(list[:2], nil) },
	"no beginning":   func(frameList) frameList { return frameList{nil} },
}

// Garbage does not become a checkpoint, whichever way it is asked for; the one before stays, the component is blamed once, and when it does right again all is
// committed.
func TestGarbageIsNotCommitted(t *testing.T) {
	for name, spoil := range spoilt {
		for _, opaque := range []bool{false, true} {
			onBench(t, func(b *bench) {
				b.tape.opaque = opaque
				var blamed []error
				b.save(componentsv1.Durability_DURABILITY_INTERVAL, func(c *saverConfig) {
					c.incremental, c.faulty = !opaque, func(why error) { blamed = append(blamed, why) }
				})
				good := b.tape.write(3)
				b.eventually("it is saved", func() bool { return b.marks() == good })
				before := b.reg.now()
				b.tape.mu.Lock()
				b.tape.spoil = spoil
				asked := b.tape.asked
				b.tape.mu.Unlock()
				last := b.tape.write(3)
				time.Sleep(2 * time.Minute)
				if now := b.reg.now(); now.Seq != before.Seq || b.marks() != good {
					t.Fatalf("%s: seq %d was committed after %d, mark %d after %d", name, now.Seq, before.Seq, b.marks(), good)
				}
				if _, err := b.s.Saved(); !atFault(err) {
					t.Errorf("%s: it says %v", name, err)
				}
				if err := b.s.Flush(context.Background(), false); !atFault(err) {
					t.Errorf("%s: a checkpoint that was asked for: %v", name, err)
				}
				if len(blamed) != 1 {
					t.Errorf("%s: blamed %d times: %v", name, len(blamed), blamed)
				}
				b.tape.mu.Lock()
				if n := b.tape.asked - asked; n > 15 {
					t.Errorf("%s: asked %d times in two minutes", name, n)
				}
				b.tape.spoil = nil
				b.tape.mu.Unlock()
				time.Sleep(maxBackoff + membrane.StateStall)
				b.eventually("it is saved again", func() bool { return b.marks() == last })
				b.eventually("and says so", func() bool { _, err := b.s.Saved(); return err == nil })
				if got := b.restored(0, hashFrom(b.reg.now().Root)); got != last {
					t.Errorf("%s: it holds mark %d, want %d", name, got, last)
				}
			})
		}
	}
}

// A journal with garbage is cut off there: what came before is committed, nothing after it is, until it is right again.
func TestAGarbledJournalAnswersNothing(t *testing.T) {
	for name, spoil := range map[string]func(f *componentv1.StateFrame) *componentv1.StateFrame{
		"a wrong digest": func(f *componentv1.StateFrame) *componentv1.StateFrame { f.Data[0] ^= 1; return f },
		"a gap":          func(f *componentv1.StateFrame) *componentv1.StateFrame { f.Mark++; return frames.Seal(f) },
		"a repetition":   func(f *componentv1.StateFrame) *componentv1.StateFrame { f.Mark--; return frames.Seal(f) },
		"no end":         func(f *componentv1.StateFrame) *componentv1.StateFrame { f.Last = false; return frames.Seal(f) },
		"another stream": func(f *componentv1.StateFrame) *componentv1.StateFrame {
			f.Section = componentv1.SectionMap
			return frames.Seal(f)
		},
	} {
		onBench(t, func(b *bench) {
			blamed := 0
			b.save(componentsv1.Durability_DURABILITY_EACH_CALL, func(c *saverConfig) { c.faulty = func(error) { blamed++ } })
			good := b.tape.write(3)
			b.eventually("it is committed", func() bool { return b.marks() == good })
			b.tape.mu.Lock()
			b.tape.spoilEntry = spoil
			b.tape.mu.Unlock()
			last := b.tape.write(2)
			time.Sleep(time.Minute)
			if b.marks() != good {
				t.Fatalf("%s: mark %d was answered, %d is right", name, b.marks(), good)
			}
			if _, err := b.s.Saved(); !atFault(err) || blamed != 1 {
				t.Errorf("%s: it says %v, blamed %d times", name, err, blamed)
			}
			b.tape.mu.Lock()
			b.tape.spoilEntry = nil
			b.tape.mu.Unlock()
			time.Sleep(maxBackoff + membrane.StateStall)
			b.eventually("it is committed again", func() bool { return b.marks() == last })
			b.restored(0, hashFrom(b.reg.now().Root))
		})
	}
}

// A journal entry that begins and does not go on is not waited for for ever.
func TestAJournalThatStandsStillIsOpenedAgain(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_EACH_CALL)
		good := b.tape.write(1)
		b.eventually("it is committed", func() bool { return b.marks() == good })
		n := 0
		b.tape.mu.Lock()
		b.tape.spoilEntry = func(f *componentv1.StateFrame) *componentv1.StateFrame {
			if n++; n == 1 {
				f.Last = false
				return frames.Seal(f)
			}
			if n == 2 {
				return nil
			}
			return f
		}
		b.tape.mu.Unlock()
		last := b.tape.write(2)
		b.eventually("it is committed all the same", func() bool { return b.marks() == last })
	})
}

// spoiler changes what processes give as their state.
type spoiler func(method string, f *componentv1.StateFrame) error

type spoilStream struct {
	grpc.ClientStream
	b      *binary
	method string
}

func (s *spoilStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	spoil := s.b.spoil.Load()
	if err != nil || spoil == nil {
		return err
	}
	switch m := m.(type) {
	case *componentv1.StateFrame:
		return (*spoil)(s.method, m)
	case *membrane.Frame:
		if s.method != componentv1.Component_Checkpoint_FullMethodName {
			return nil
		}
		f, err := m.State()
		if err == nil {
			err = (*spoil)(s.method, f)
		}
		if err != nil {
			return err
		}
		raw, err := proto.Marshal(f)
		if err != nil {
			return err
		}
		*m = *membrane.NewFrame(raw)
	}
	return nil
}

func (s *spoilStream) SendMsg(m any) error {
	f, ok := m.(*componentv1.StateFrame)
	if spoil := s.b.spoil.Load(); ok && spoil != nil {
		if err := (*spoil)(s.method, f); err != nil {
			return err
		}
	}
	return s.ClientStream.SendMsg(m)
}

func (b *binary) spoils(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := streamer(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &spoilStream{s, b, method}, nil
}

// A component that garbles its journal is shown as degraded, with an event; calls are not answered as durable, and its checkpoint stands. When it does right
// again they are.
func TestAComponentThatGarblesItsStateIsDegraded(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		if _, err := n.add(within(w.t, 5*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		b, err := w.shelf.get("sha256:counter-1.0.0")
		if err != nil {
			w.t.Fatal(err)
		}
		before, _ := w.register()
		garble := spoiler(func(_ string, f *componentv1.StateFrame) error { f.Xxh64 ^= 1; return nil })
		b.spoil.Store(&garble)
		if v, err := n.add(within(w.t, 5*time.Second)); err == nil {
			w.t.Fatalf("a call was answered with %d, and nothing of it is durable", v)
		}
		w.eventually(5*time.Second, "it is degraded", func() bool { return n.state() == components.Degraded })
		if info, _ := n.sup.Info(testInstance); !strings.Contains(info.Reason, "digest") {
			w.t.Errorf("the reason is %q", info.Reason)
		}
		if ev := n.published("bad-state"); len(ev) != 1 || ev[0].Cause == "" {
			w.t.Errorf("events %v", ev)
		}
		if now, _ := w.register(); now.Seq != before.Seq {
			w.t.Errorf("seq %d was committed after %d", now.Seq, before.Seq)
		}
		b.spoil.Store(nil)
		w.eventually(2*maxBackoff, "it is well again", func() bool { return n.state() == components.Running })
		if v, err := n.add(within(w.t, 5*time.Second)); err != nil || v != 3 {
			w.t.Errorf("it has %d, %v", v, err)
		}
	})
}

// A process that does not take its state is given up, with a state that says so, and another is started.
func TestAProcessThatDoesNotTakeItsStateIsGivenUp(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		if _, err := n.add(within(w.t, 5*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		w.settled()
		b, err := w.shelf.get("sha256:counter-1.0.0")
		if err != nil {
			w.t.Fatal(err)
		}
		stuck := make(chan struct{})
		hang := spoiler(func(method string, _ *componentv1.StateFrame) error {
			if method == componentv1.Component_Restore_FullMethodName {
				<-stuck
				return errors.New("given up")
			}
			return nil
		})
		b.spoil.Store(&hang)
		time.AfterFunc(2*membrane.StateStall, func() { close(stuck) }) // a stream without a context of its own
		n.runner.running(testInstance)[0].die("killed")
		w.eventually(3*membrane.StateStall, "it says why it does not start", func() bool {
			info, _ := n.sup.Info(testInstance)
			return info.State == components.Failed && strings.Contains(info.Reason, "took nothing of its state")
		})
		if len(n.published("start-failed")) == 0 {
			w.t.Error("no event says so")
		}
		b.spoil.Store(nil)
		w.running(n, "1.0.0")
		if v, err := n.get(within(w.t, 5*time.Second)); err != nil || v != 1 {
			w.t.Errorf("it has %d, %v", v, err)
		}
	})
}

// A swap whose new version does not take the state, or whose old one garbles it, leaves the old one serving.
func TestASwapWhoseStateIsGarbledLeavesTheOldOneServing(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "1.1.0"})
		if _, err := n.add(within(w.t, 5*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		b, err := w.shelf.get("sha256:counter-1.0.0")
		if err != nil {
			w.t.Fatal(err)
		}
		garble := spoiler(func(method string, f *componentv1.StateFrame) error {
			if method == componentv1.Component_Checkpoint_FullMethodName {
				f.Xxh64 ^= 1
			}
			return nil
		})
		b.spoil.Store(&garble)
		if out, err := w.swap(n, "1.1.0"); err == nil {
			w.t.Fatalf("swapped with a garbled state: %+v", out)
		}
		b.spoil.Store(nil)
		if v, err := n.add(within(w.t, 5*time.Second)); err != nil || v != 2 {
			w.t.Errorf("the old version has %d, %v", v, err)
		}
		w.running(n, "1.0.0")
	})
}

// A base that takes longer than any limit of a step to bring to its holders gets there: what counts is that it gets on.
func TestASlowLinkDoesNotKeepABaseFromItsHolders(t *testing.T) {
	onBench(t, func(b *bench) {
		b.save(componentsv1.Durability_DURABILITY_INTERVAL)
		b.tape.write(1)
		b.eventually("a small one is committed", func() bool { return b.marks() == 1 })
		b.net.SetDelay(func(_, _ peer.ID) time.Duration { return 400 * time.Millisecond })
		b.tape.mu.Lock()
		b.tape.size = 4 << 20
		b.tape.mu.Unlock()
		last := b.tape.write(4)
		worst := error(nil)
		begin := time.Now()
		b.eventually("it is committed", func() bool {
			_, err := b.s.Saved()
			if err != nil {
				worst = err
			}
			return b.marks() == last
		})
		if took := time.Since(begin); took < 2*time.Second || worst != nil {
			t.Errorf("it took %s, and was shown as %v meanwhile", took, worst)
		}
		if !b.blobs[1].Complete(hashFrom(b.reg.now().Root)) && !b.blobs[2].Complete(hashFrom(b.reg.now().Root)) {
			t.Error("no other holder has it")
		}
		b.restored(0, blobs.Hash(b.reg.now().Root))
	})
}
