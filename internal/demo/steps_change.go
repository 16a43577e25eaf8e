package demo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
)

// swap: another version takes over under load, the old one comes back, and the new one again.
func (d *demo) swap(ctx context.Context) (string, error) {
	n1 := d.cluster.Nodes[0]
	if err := d.coppice(ctx, n1, nil, "registry", "push", d.file("demo/shop-1.1.0")); err != nil {
		return "", err
	}
	var there, back struct {
		From, To string
		Pause    float64 `json:"pause_ms"`
		Took     float64 `json:"took_ms"`
		Held     uint64  `json:"calls_held"`
	}
	from := time.Now()
	if err := d.coppice(ctx, n1, &there, "swap", storeComponent+"@1.1"); err != nil {
		return "", err
	}
	if err := d.runs(ctx, "1.1.0"); err != nil {
		return "", err
	}
	if err := cluster.Sleep(ctx, time.Second); err != nil {
		return "", err
	}
	f, err := d.since(from, storeComponent)
	if err != nil {
		return "", err
	}
	if err := d.coppice(ctx, n1, &back, "undo", storeComponent); err != nil {
		return "", err
	}
	if err := d.runs(ctx, "1.0.0"); err != nil {
		return "", err
	}
	if err := d.coppice(ctx, n1, nil, "swap", storeComponent+"@1.1"); err != nil {
		return "", err
	}
	if err := d.runs(ctx, "1.1.0"); err != nil {
		return "", err
	}
	d.figure("pause_ms", there.Pause)
	d.figure("undo_ms", back.Took)
	d.figure("longest_gap_ms", float64(f.Gap.Microseconds())/1000)
	return fmt.Sprintf("store 1.0 → 1.1 under load: %d/%d failed, pause %s, longest time without an answer %s · undo %s",
		f.Failed+f.Refused, f.Calls, msText(there.Pause), msOf(f.Gap), msText(back.Took)), errors.Join(d.noneFailed(), d.calm(ctx, n1))
}

// runs waits until the store runs in a version, as ps says.
func (d *demo) runs(ctx context.Context, version string) error {
	return cluster.WaitFor(ctx, 10*time.Second, "the store to run in version "+version, func(ctx context.Context) (bool, error) {
		in, err := d.store(ctx, d.cluster.Nodes[0])
		if err == nil && (in.GetVersion() != version || in.GetState() != "running") {
			err = fmt.Errorf("it is %s in version %s", in.GetState(), in.GetVersion())
		}
		return err == nil, err
	})
}

// badVersion: a version that never becomes healthy changes nothing.
func (d *demo) badVersion(ctx context.Context) (string, error) {
	n1 := d.cluster.Nodes[0]
	if err := d.coppice(ctx, n1, nil, "registry", "push", d.file("demo/shop-1.2.0")); err != nil {
		return "", err
	}
	from := time.Now()
	err := d.coppice(ctx, n1, nil, "swap", storeComponent+"@1.2")
	if err == nil {
		return "", errors.New("the swap to a version that never becomes healthy was reported as done")
	}
	why := err.Error()
	if err := d.runs(ctx, "1.1.0"); err != nil {
		return "", err
	}
	if err := cluster.Sleep(ctx, time.Second); err != nil {
		return "", err
	}
	f, err := d.since(from, storeComponent)
	if err != nil {
		return "", err
	}
	d.figure("why", why)
	d.figure("longest_gap_ms", float64(f.Gap.Microseconds())/1000)
	return fmt.Sprintf("1.2 never healthy: returned to 1.1 by itself, %d failed, longest time without an answer %s", f.Failed+f.Refused, msOf(f.Gap)), d.noneFailed()
}

// allDown: every machine loses power at once. What was answered is there when they are back.
func (d *demo) allDown(ctx context.Context) (string, error) {
	if err := d.load.Pause(); err != nil {
		return "", err
	}
	before, err := d.load.Verify()
	if err != nil {
		return "", err
	}
	if err := cluster.Each(d.cluster.Nodes, func(n *cluster.Node) error {
		_, err := n.Kill()
		return err
	}); err != nil {
		return "", err
	}
	begin := time.Now()
	if err := cluster.Each(d.cluster.Nodes, func(n *cluster.Node) error { return n.Start(ctx) }); err != nil {
		return "", err
	}
	after, err := d.load.Verify() // it asks until it is answered
	if err != nil {
		return "", err
	}
	took := time.Since(begin)
	if !after.Good() || after.Answered != before.Answered || after.Orders != before.Orders {
		return "", fmt.Errorf("before: %d writes, %d orders; after: %d of %d found, %d orders: %s", before.Answered, before.Orders, after.Found, after.Answered,
			after.Orders, strings.Join(after.Examples, "; "))
	}
	if err := d.allAlive(ctx); err != nil {
		return "", err
	}
	if err := d.runs(ctx, "1.1.0"); err != nil {
		return "", err
	}
	if err := d.load.Rate(d.Rate); err != nil { // and it serves
		return "", err
	}
	from := time.Now()
	if err := cluster.Sleep(ctx, 2*time.Second); err != nil {
		return "", err
	}
	f, err := d.load.Figures(load.Window{From: from, To: time.Now(), Component: storeComponent, Writes: true})
	if err != nil {
		return "", err
	}
	if f.Answered == 0 {
		return "", fmt.Errorf("the store answers no writes: %s", f.Why)
	}
	d.figure("back_s", took.Seconds())
	return fmt.Sprintf("every node kill -9, started again: same state in %.1f s", took.Seconds()), d.noneFailed()
}

// costFor is how long the idle cost is measured, after the load has been paused for costAfter.
const (
	costAfter = 3 * time.Second
	costFor   = 5 * time.Second
)

// cost: what a node takes while nothing happens.
func (d *demo) cost(ctx context.Context) (string, error) {
	if err := d.load.Pause(); err != nil {
		return "", err
	}
	if err := d.calm(ctx, d.cluster.Nodes[0]); err != nil {
		return "", err
	}
	if err := cluster.Sleep(ctx, costAfter); err != nil {
		return "", err
	}
	c, err := d.cluster.Idle(ctx, costFor)
	if err != nil {
		return "", err
	}
	bytes := "bytes not counted on loopback"
	if c.Counted {
		bytes = fmt.Sprintf("%.0f B/s", c.Bytes)
		d.figure("bytes_per_second", c.Bytes)
	}
	d.figure("rss_mib", c.RSS)
	d.figure("cpu_percent", c.CPU)
	return fmt.Sprintf("per node idle: RSS %.0f MiB, CPU %.1f %%, %s", c.RSS, c.CPU, bytes), nil
}

// verdict reads everything back once more.
func (d *demo) verdict() error {
	if err := d.load.Pause(); err != nil {
		return err
	}
	rep, err := d.load.Verify()
	if err != nil {
		return err
	}
	word := "PASS"
	if !rep.Good() {
		word = "FAIL"
	}
	line := fmt.Sprintf("ledger %d answered writes, %d found, %d missing, %d twice → %s", rep.Answered, rep.Found, rep.Missing, rep.Doubled, word)
	if d.JSON {
		d.object(map[string]any{"ledger": rep, "pass": rep.Good(), "text": line})
	} else {
		d.print(line)
	}
	if !rep.Good() {
		return errors.New(strings.Join(rep.Examples, "; "))
	}
	return nil
}
