package nemesis

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/harm"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// TestRollingUpgrade upgrades a cluster to a version that knows a newer format, node by node, while clients call: nothing is lost, and the format
// rises when the last one knows it. From then on an older version can neither come back nor join, and says why.
func TestRollingUpgrade(t *testing.T) {
	if testing.Short() {
		t.Skip("it starts processes")
	}
	b := newBed(t, 3, time.Second)
	ctx := t.Context()
	l := open(t, b.c, b.seed)
	over := l.drafts.during()
	format := func(is uint32) error {
		return cluster.WaitFor(ctx, back, fmt.Sprintf("format %d everywhere", is), func(ctx context.Context) (bool, error) {
			for _, n := range b.c.Alive() {
				st, err := b.status(ctx, n)
				if err != nil {
					return false, err
				}
				if got := st.GetArbiter().GetFormat(); got != is {
					return false, fmt.Errorf("%s says format %d", n.Name, got)
				}
			}
			return true, nil
		})
	}
	for _, n := range b.c.Nodes {
		must(t, format(1))
		must(t, n.Term(ctx))
		must(t, n.Harm(harm.Orders{Format: 2}))
		must(t, n.Start(ctx))
		_, err := b.whole(ctx, l)
		must(t, err)
	}
	must(t, format(2))

	old := b.c.Nodes[2]
	must(t, old.Term(ctx))
	must(t, old.Harm(harm.Orders{}))
	tooOld := func(err error) {
		t.Helper()
		if err == nil {
			ectx, cancel := context.WithTimeout(ctx, back)
			defer cancel()
			code, eerr := old.Ended(ectx)
			must(t, eerr)
			if code <= 0 {
				t.Errorf("it was refused, and ended with status %d", code)
			}
			return
		}
		if !strings.Contains(err.Error(), "start a newer version") {
			t.Errorf("it is refused with: %v", err)
		}
	}
	tooOld(old.Start(ctx)) // with its own disk
	c, err := b.c.Nodes[0].Client()
	must(t, err)
	_, err = c.Revoke(ctx, &apiv1.RevokeRequest{Node: old.ID()})
	must(t, err)
	must(t, empty(old.Data))
	tok, err := c.Token(ctx, &apiv1.TokenRequest{})
	must(t, err)
	tooOld(old.Start(ctx, "--join", tok.GetToken())) // as a newcomer
	must(t, empty(old.Data))
	must(t, old.Harm(harm.Orders{Format: 2}))
	must(t, old.Start(ctx, "--join", tok.GetToken()))
	_, err = b.whole(ctx, l)
	must(t, err)
	must(t, format(2))
	over()
	l.close(b.seed)
}
