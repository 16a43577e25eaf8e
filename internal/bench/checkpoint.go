package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	checkpointOthers = 3
	checkpointSize   = 64 << 20
	// checkpointChanged: one value of so many is changed.
	checkpointChanged = 100
	checkpointWithin  = 10 * time.Minute
	blobProtocol      = "/coppice/blob/1"
)

// checkpoint saves a state to the disks of this node and of three others; the commit waits for all four. The baseline is what cannot be done without: the
// same bytes go over TLS to a process at each of the three others, which hashes and syncs them. Then one value of a hundred changes in place.
func checkpoint(ctx context.Context, cfg Config) (_ []Result, err error) {
	size := cfg.size(checkpointSize)
	s, err := newStandOf(ctx, cfg, checkpointOthers+1, "--copies", fmt.Sprint(checkpointOthers+1), "--copy-acks", fmt.Sprint(checkpointOthers+1))
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	disk, err := s.fsync()
	if err != nil {
		return nil, err
	}
	if err := s.deploy(ctx, "on-demand"); err != nil {
		return nil, err
	}
	b, err := s.newCheckpoints(ctx, size)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.sinks.end()) }()
	for run := range cfg.Runs {
		if err := b.run(ctx, run); err != nil {
			return nil, err
		}
		cfg.say("run %d of %d: %s saved with %.1f MiB/s, copied over TLS with %.1f MiB/s; 1 %% changed: %.2f %% of the bytes", run+1, cfg.Runs, sizeText(size),
			b.rate[run], b.base[run], b.share[run])
	}
	what := fmt.Sprintf("TLS copy, SHA-256 and fsync at %d others", checkpointOthers)
	return []Result{
		disk,
		summary(fmt.Sprintf("checkpoint of %s to %d other nodes and this one", sizeText(size), checkpointOthers), "MiB/s", b.rate).against(what, b.base),
		summary("the same: time", "ms", b.took),
		summary("the same: CPU time of all four nodes for each MiB", "ms", b.cpu),
		summary("the same: sent for each byte of the state and other node", "bytes", b.sent),
		summary("1 % of it changed in place: bytes sent, of those of the whole", "%", b.share),
		summary("the same: time", "ms", b.small),
		summary("memory of a node at its peak during the whole checkpoint, over that before", "MiB", b.rose),
	}, nil
}

// checkpoints are the samples of one benchmark.
type checkpoints struct {
	s     *stand
	size  int64
	owner string
	sinks *sinks
	data  []byte // of the baseline

	took, rate, base, cpu, sent, share, small, rose []float64
}

func (s *stand) newCheckpoints(ctx context.Context, size int64) (*checkpoints, error) {
	owner, err := s.owner(ctx)
	if err != nil {
		return nil, err
	}
	b := &checkpoints{s: s, size: size, owner: owner.Name, data: make([]byte, min(size, checkpointSize))}
	if _, err := rand.Read(b.data); err != nil {
		return nil, err
	}
	b.sinks, err = s.startSinks(ctx, checkpointOthers)
	return b, err
}

// run writes a whole new state and saves it, has the baseline copy as much, and saves a small change.
func (b *checkpoints) run(ctx context.Context, run int) error {
	if err := b.s.write(ctx, b.size, 1, uint64(2*run+2)); err != nil {
		return err
	}
	mem, err := b.s.watchMemory()
	if err != nil {
		return err
	}
	before, err := b.s.cpu()
	if err != nil {
		return err
	}
	took, whole, err := b.save(ctx)
	if err != nil {
		return err
	}
	after, err := b.s.cpu()
	if err != nil {
		return err
	}
	rose, err := mem.rise()
	if err != nil {
		return err
	}
	rate, err := b.baseline()
	if err != nil {
		return err
	}
	if err := b.s.write(ctx, b.size, checkpointChanged, uint64(2*run+3)); err != nil {
		return err
	}
	quick, part, err := b.save(ctx)
	if err != nil {
		return err
	}
	mib := float64(b.size) / (1 << 20)
	b.took, b.rate, b.base = append(b.took, ms(took)), append(b.rate, mib/took.Seconds()), append(b.base, rate)
	b.cpu = append(b.cpu, ms(after-before)/mib)
	b.sent = append(b.sent, whole/float64(b.size)/checkpointOthers)
	b.share, b.small, b.rose = append(b.share, 100*part/whole), append(b.small, ms(quick)), append(b.rose, slices.Max(rose))
	return nil
}

// save has the component saved and returns how long that took and what its node has sent for it, in bytes, TLS and below not counted.
func (b *checkpoints) save(ctx context.Context) (time.Duration, float64, error) {
	c, err := b.s.cluster.Node(b.owner).Client()
	if err != nil {
		return 0, 0, err
	}
	before, err := b.s.traffic(ctx)
	if err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	res, err := c.Checkpoint(ctx, &apiv1.CheckpointRequest{Component: component, TimeoutMs: uint64(checkpointWithin.Milliseconds())})
	took := time.Since(begin)
	if err != nil {
		return 0, 0, err
	}
	if len(res.GetReplicas()) != checkpointOthers+1 {
		return 0, 0, fmt.Errorf("the checkpoint is on %v, not on %d nodes", res.GetReplicas(), checkpointOthers+1)
	}
	after, err := b.s.traffic(ctx)
	return took, after[blobProtocol][b.owner].bytes - before[blobProtocol][b.owner].bytes, err
}

// baseline returns how many MiB/s reach all receivers' disks.
func (b *checkpoints) baseline() (float64, error) {
	conns, err := b.sinks.dial()
	if err != nil {
		return 0, errors.Join(err, closeAll(conns))
	}
	if _, err := copyTo(conns, b.data[:1]); err != nil { // the handshake is not counted
		return 0, errors.Join(err, closeAll(conns))
	}
	took, err := copyTo(conns, b.data)
	return float64(len(b.data)) / (1 << 20) / took.Seconds(), errors.Join(err, closeAll(conns))
}
