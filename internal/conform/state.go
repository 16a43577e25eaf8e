package conform

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func states() []check {
	return []check{
		{"state", "a checkpoint is a stream of frames that holds together", checkpoints},
		{"state", "another process that is given a checkpoint has that state", restored},
		{"state", "a checkpoint that is damaged, cut off, or of an unknown schema is refused, and changes nothing", garbage},
		{"state", "Restore is refused while it is started", restoreStarted},
		{"state", "a checkpoint of what changed since a mark goes on top of the one before", incremental},
		{"state", "a mark that was never there gives no wrong delta", future},
		{"state", "heartbeats are answered while its state streams", beatsBeside},
	}
}

// stateful starts a process and makes the calls that were given, so that its state is not empty where possible.
func (r *rig) stateful(ctx context.Context) (*process, error) {
	if !r.desc.GetState().GetStateful() {
		return nil, skip("no state")
	}
	p, err := r.start(ctx)
	if err != nil {
		return nil, err
	}
	given, err := r.given(false)
	if err != nil {
		return nil, err
	}
	for _, c := range given {
		if _, err := c.make(ctx, p, "", ""); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// checkpoint takes one and checks it.
func (p *process) checkpoint(ctx context.Context, since uint64) ([]*componentv1.StateFrame, error) {
	stream, err := p.control.Checkpoint(ctx, &componentv1.CheckpointFrom{SinceMark: since})
	if err != nil {
		return nil, err
	}
	v := frames.Checkpoint(since)
	var out []*componentv1.StateFrame
	for {
		f, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out, v.End()
		}
		if err != nil {
			return nil, err
		}
		if err := v.Frame(f); err != nil {
			return nil, err
		}
		out = append(out, f)
	}
}

func (p *process) restore(ctx context.Context, fs []*componentv1.StateFrame) (*componentv1.RestoreReply, error) {
	stream, err := p.control.Restore(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range fs {
		if err := stream.Send(f); err != nil {
			break // CloseAndRecv says why
		}
	}
	return stream.CloseAndRecv()
}

// sections puts the payload of a checkpoint together by section.
func sections(fs []*componentv1.StateFrame) map[string][]byte {
	out := map[string][]byte{}
	for _, f := range fs {
		if f.GetSection() != componentv1.SectionHeader && f.GetSection() != componentv1.SectionEnd {
			out[f.GetSection()] = append(out[f.GetSection()], f.GetData()...)
		}
	}
	return out
}

// same says where two full checkpoints differ. Of a state of a form of its own only the names of the sections are compared.
func same(a, b []*componentv1.StateFrame) error {
	one, two := sections(a), sections(b)
	for _, name := range []string{componentv1.SectionMap, componentv1.SectionDedupe} {
		if !bytes.Equal(one[name], two[name]) {
			return fmt.Errorf("section %q has %d bytes in one and %d in the other, and they differ", name, len(one[name]), len(two[name]))
		}
	}
	for name := range one {
		if _, ok := two[name]; !ok {
			return fmt.Errorf("section %q is in one only", name)
		}
	}
	if len(one) != len(two) {
		return fmt.Errorf("%d sections in one, %d in the other", len(one), len(two))
	}
	return nil
}

func checkpoints(ctx context.Context, r *rig) error {
	p, err := r.stateful(ctx)
	if err != nil {
		return err
	}
	first, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	if got := first[0].GetSchema(); got != r.desc.GetState().GetWritesSchema() {
		return fmt.Errorf("its schema is %d, the description says that it writes %d", got, r.desc.GetState().GetWritesSchema())
	}
	again, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	if first[0].GetMark() != again[0].GetMark() {
		return fmt.Errorf("mark %d, and %d a moment later, though nothing happened", first[0].GetMark(), again[0].GetMark())
	}
	return same(first, again)
}

// second gives a checkpoint to a process of its own, and starts it.
func (r *rig) second(ctx context.Context, fs ...[]*componentv1.StateFrame) (*process, error) {
	p, err := r.launch(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range fs {
		reply, err := p.restore(ctx, f)
		if err != nil {
			return nil, p.said(fmt.Errorf("the Restore call: %w", err))
		}
		if want := f[0].GetMark(); reply.GetMark() != want {
			return nil, fmt.Errorf("the Restore call answers mark %d, the checkpoint's is %d", reply.GetMark(), want)
		}
	}
	req := startRequest()
	req.Restored = true
	if _, err := p.control.Start(ctx, req); err != nil {
		return nil, p.said(fmt.Errorf("the Start call after Restore: %w", err))
	}
	return p, nil
}

func restored(ctx context.Context, r *rig) error {
	p, err := r.stateful(ctx)
	if err != nil {
		return err
	}
	fs, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	other, err := r.second(ctx, fs)
	if err != nil {
		return err
	}
	again, err := other.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	return same(fs, again)
}

func garbage(ctx context.Context, r *rig) error {
	p, err := r.stateful(ctx)
	if err != nil {
		return err
	}
	good, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	damaged := slices.Clone(good)
	for i, f := range slices.Backward(good) { // a bit of its data, or of its end where it has none
		if i == 0 && len(f.GetData()) == 0 {
			last := proto.CloneOf(good[len(good)-1])
			last.Mark ^= 1
			damaged[len(damaged)-1] = last
		} else if n := len(f.GetData()); n > 0 {
			damaged[i] = proto.CloneOf(f)
			damaged[i].Data[n-1] ^= 1
			break
		}
	}
	foreign := slices.Clone(good)
	head := proto.CloneOf(foreign[0])
	head.Schema += 1 << 20
	foreign[0] = frames.Seal(head)
	bad := map[string][]*componentv1.StateFrame{
		"a damaged checkpoint": damaged, "one that was cut off": good[:len(good)-1], "one of an unknown schema": foreign,
	}
	if _, err := verbs["Quiesce"](ctx, p); err != nil {
		return unimplemented("Quiesce", err)
	}
	for _, what := range []string{"a damaged checkpoint", "one that was cut off", "one of an unknown schema"} {
		if _, err := p.restore(ctx, bad[what]); err == nil {
			return fmt.Errorf("restore takes %s", what)
		}
		fresh, err := r.launch(ctx)
		if err != nil {
			return err
		}
		if _, err := fresh.restore(ctx, bad[what]); err == nil {
			return fmt.Errorf("restore takes %s, before Start", what)
		}
	}
	if _, err := verbs["Resume"](ctx, p); err != nil {
		return err
	}
	after, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	if err := same(good, after); err != nil {
		return fmt.Errorf("restores that were refused have changed the state: %w", err)
	}
	return nil
}

func restoreStarted(ctx context.Context, r *rig) error {
	p, err := r.stateful(ctx)
	if err != nil {
		return err
	}
	fs, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	_, err = p.restore(ctx, fs)
	return refused("Restore while it is started", err, codes.FailedPrecondition)
}

func incremental(ctx context.Context, r *rig) error {
	if !slices.Contains(r.desc.GetFeatures(), componentv1.FeatureIncremental) {
		return skip("the feature " + componentv1.FeatureIncremental + " is not offered")
	}
	given, err := r.given(false)
	if err != nil {
		return err
	}
	if len(given) == 0 {
		return skip(noCalls)
	}
	p, err := r.start(ctx)
	if err != nil {
		return err
	}
	base, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	pieces := [][]*componentv1.StateFrame{base}
	for range 2 {
		for _, c := range given {
			if _, err := c.make(ctx, p, "", ""); err != nil {
				return err
			}
		}
		since := pieces[len(pieces)-1][0].GetMark()
		delta, err := p.checkpoint(ctx, since)
		if err != nil {
			return fmt.Errorf("what changed since mark %d: %w", since, err)
		}
		pieces = append(pieces, delta)
	}
	other, err := r.second(ctx, pieces...)
	if err != nil {
		return err
	}
	whole, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	again, err := other.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	return same(whole, again)
}

func future(ctx context.Context, r *rig) error {
	if !slices.Contains(r.desc.GetFeatures(), componentv1.FeatureIncremental) {
		return skip("the feature " + componentv1.FeatureIncremental + " is not offered")
	}
	p, err := r.stateful(ctx)
	if err != nil {
		return err
	}
	fs, err := p.checkpoint(ctx, 1<<40)
	if err == nil && fs[0].GetSinceMark() != 0 {
		return errors.New("it gives what changed since a mark that it never had")
	}
	return nil // refused, or all of it
}

func beatsBeside(ctx context.Context, r *rig) error {
	p, err := r.stateful(ctx)
	if err != nil {
		return err
	}
	stream, err := p.control.Checkpoint(ctx, &componentv1.CheckpointFrom{ChunkBytes: 1 << 10})
	if err != nil {
		return err
	}
	if _, err := stream.Recv(); err != nil {
		return err
	}
	if slices.Contains(r.desc.GetFeatures(), componentv1.FeatureDeltas) {
		if _, err := p.control.Deltas(ctx, &componentv1.CheckpointFrom{SinceMark: 0}); err != nil {
			return err
		}
	}
	for range 10 {
		if _, err := p.control.Heartbeat(ctx, &componentv1.Beat{}); err != nil {
			return err
		}
	}
	return nil
}
