package placement

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// A decision that is kept is solved again to the same plan, byte for byte; by a solver that thinks otherwise it is not, and that is said.
func TestADecisionReplays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 5)
		defer w.run()()
		w.deploy(shop)
		time.Sleep(time.Second)
		w.setState("n2", "dead")
		time.Sleep(5 * time.Second)
		var l Ledger
		for _, d := range read(w, func() []Decision { return w.decisions }) {
			if err := l.Add(d); err != nil {
				t.Fatal(err)
			}
		}
		all := l.List()
		if len(all) < 2 || !all[0].Time.After(all[len(all)-1].Time) {
			t.Fatalf("%d decisions, newest %+v", len(all), all[0])
		}
		placed := 0
		for _, e := range all {
			placed += e.Places
			if e.Digest == "" || e.Problem != "" {
				continue
			}
			r, err := l.Replay(t.Context(), e.Digest, InProcess{})
			if err != nil || !r.GetFound() || !r.GetSame() || r.GetObjective() != e.Objective {
				t.Errorf("%s: %v, %v", e.Digest, r, err)
			}
			part, err := l.Replay(t.Context(), strings.TrimPrefix(e.Digest, "sha256:")[:16], InProcess{})
			if err != nil || part.GetDigest() != e.Digest {
				t.Errorf("by its beginning: %v, %v", part, err)
			}
			other, err := l.Replay(t.Context(), e.Digest, solverFunc(func(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
				plan, err := InProcess{}.Solve(ctx, req)
				plan = proto.CloneOf(plan)
				plan.Objective += 1e-9
				return plan, err
			}))
			if err != nil || other.GetSame() {
				t.Errorf("another plan is called the same: %v, %v", other, err)
			}
		}
		if placed < 4 {
			t.Errorf("%d instances placed in %+v", placed, all)
		}
		if r, err := l.Replay(t.Context(), "sha256:00", InProcess{}); err != nil || r.GetFound() {
			t.Errorf("what is not kept: %v, %v", r, err)
		}
		if r, err := l.Replay(t.Context(), "sha256:", InProcess{}); err != nil || r.GetFound() || len(r.GetCandidates()) < 2 {
			t.Errorf("what fits several: %v, %v", r, err)
		}
	})
}

func TestALedgerIsBounded(t *testing.T) {
	var l Ledger
	r := rand.New(rand.NewPCG(1, 1))
	now := time.Unix(1000, 0)
	for i := range 140 {
		now = now.Add(time.Second)
		noise := make([]byte, 100_000) // does not compress
		for k := range noise {
			noise[k] = byte('a' + r.IntN(26))
		}
		d := Decision{Time: now, Digest: fmt.Sprintf("sha256:%04d", i), Plan: &placementv1.Plan{Feasible: true}, Request: &placementv1.SolveRequest{Snapshot: &placementv1.Snapshot{
			Nodes: []*placementv1.Node{{Id: string(noise)}},
		}}}
		if i%10 == 0 {
			d = Decision{Time: now, Err: errors.New(strings.Repeat("crashed ", 100))}
		}
		for k := range 100 {
			d.Actions = append(d.Actions, Action{Kind: Place, Instance: fmt.Sprint("a/x-", k), Node: "n1"})
		}
		if err := l.Add(d); err != nil {
			t.Fatal(err)
		}
		if l.bytes > LedgerBytes || len(l.kept) > LedgerEntries {
			t.Fatalf("%d bytes, %d entries", l.bytes, len(l.kept))
		}
	}
	newest := l.List()[0]
	if newest.Digest != "sha256:0139" || newest.Places != 100 || len(newest.What) > whatLength+20 || !strings.HasSuffix(newest.What, " more") {
		t.Errorf("%+v", newest)
	}
	for range 2 * LedgerEntries {
		if err := l.Add(Decision{Time: now, Err: errors.New("crashed")}); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.List()) != LedgerEntries || l.bytes != 0 {
		t.Errorf("%d entries, %d bytes", len(l.List()), l.bytes)
	}
}
