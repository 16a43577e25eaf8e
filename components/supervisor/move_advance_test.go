package supervisor

import (
	"testing"
	"time"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// What is committed while a move is prepared reaches the target before the pause; a target that cannot take it ends what it has prepared, and says so.
func TestTheTargetOfAMoveCatchesUpBeforeThePause(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes
		l := w.load(4, n...)
		l.more(20)
		reg, _ := w.register()
		ctx := within(w.t, 20*time.Second)
		if _, err := n[1].sup.prepareMove(ctx, n[0].id, &componentsv1.PrepareMoveRequest{
			Instance: testInstance, Epoch: reg.Epoch, Root: reg.Root, Holders: idStrings(reg.Holders), Move: "m",
		}); err != nil {
			w.t.Fatal(err)
		}
		p := n[1].sup.moves[testInstance]
		for range 2 {
			l.more(20)
			now, _ := w.register()
			if hashFrom(now.Root) == p.root {
				w.t.Fatal("nothing was committed meanwhile")
			}
			reply, err := n[1].sup.advanceMove(ctx, n[0].id, &componentsv1.FinishMoveRequest{Instance: testInstance, Move: "m", Root: now.Root, Holders: idStrings(now.Holders)})
			if err != nil || reply.GetRefused() != "" {
				w.t.Fatalf("%v %v", reply, err)
			}
			if p.root != hashFrom(now.Root) || p.gen.head.link.Hash != p.root {
				w.t.Errorf("the target is at %s, %s is committed", p.gen.head.link.Hash.Short(), hashFrom(now.Root).Short())
			}
		}
		other, err := n[1].sup.advanceMove(ctx, n[2].id, &componentsv1.FinishMoveRequest{Instance: testInstance, Move: "m", Root: reg.Root})
		if err != nil || other.GetRefused() == "" {
			w.t.Errorf("another node brings the move on: %v %v", other, err)
		}
		nowhere := make([]byte, 32)
		nowhere[0] = 1
		reply, err := n[1].sup.advanceMove(ctx, n[0].id, &componentsv1.FinishMoveRequest{Instance: testInstance, Move: "m", Root: nowhere, Holders: idStrings(reg.Holders)})
		if err != nil || reply.GetRefused() == "" {
			w.t.Errorf("a root that nobody has was restored: %v %v", reply, err)
		}
		if len(n[1].runner.running(testInstance)) != 0 {
			w.t.Error("what was prepared runs on")
		}
		if out, err := w.move(n[0], n[1]); err != nil {
			w.t.Errorf("%+v %v", out, err)
		}
		l.more(20)
		l.end(n[1])
	})
}
