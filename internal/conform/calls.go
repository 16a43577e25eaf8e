package conform

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const noCalls = "no call that may write was given to try it with (--call)"

func calls() []check {
	return []check{
		{"calls", "a method without side effects changes nothing", readsChangeNothing},
		{"txn-calls", "each answer names the mark that holds its effects", marks},
		{"txn-calls", "a repeated key gets the same answer, and has no second effect", repeats},
		{"txn-calls", "a key that comes many times at once has one effect", repeatsAtOnce},
		{"txn-calls", "a key that is used for another request is refused", reusedKey},
		{"txn-calls", "keys below the caller's low-water mark are refused", lowWater},
		{"txn-calls", "answers are remembered by a process that is given the state", rememberedElsewhere},
		{"deltas", "the journal streams each call as it is made, and leads to the same state", journal},
	}
}

// givenCall is a call that was given, resolved.
type givenCall struct {
	*method
	json string
}

// given resolves the calls that were given; readOnly: those of methods without side effects, else the others.
func (r *rig) given(readOnly bool) ([]givenCall, error) {
	all, err := r.methods()
	if err != nil {
		return nil, err
	}
	var out []givenCall
	for _, c := range r.cfg.Calls {
		var found *method
		for _, m := range all {
			if c.Method == m.name || c.Method == m.service+"."+m.name || strings.TrimPrefix(c.Method, "/") == strings.TrimPrefix(m.full, "/") {
				found = m
			}
		}
		switch {
		case found == nil:
			return nil, fmt.Errorf("--call %s: the component has no such method", c.Method)
		case found.stream:
			return nil, fmt.Errorf("--call %s: a stream; want a method that answers once", c.Method)
		}
		if found.readOnly == readOnly {
			out = append(out, givenCall{found, cmp.Or(c.JSON, "{}")})
		}
	}
	return out, nil
}

// answer of one call.
type answer struct {
	body []byte
	mark uint64
	meta metadata.MD
}

// make makes the call, with an idempotency key and a low-water mark where they are not "".
func (c *givenCall) make(ctx context.Context, p *process, key, low string) (*answer, error) {
	req := c.empty()
	if err := protojson.Unmarshal([]byte(c.json), req); err != nil {
		return nil, fmt.Errorf("--call %s: %w", c.name, err)
	}
	return c.send(ctx, p, req, key, low)
}

func (c *givenCall) send(ctx context.Context, p *process, req *dynamicpb.Message, key, low string) (*answer, error) {
	if key != "" {
		caller, _, _ := strings.Cut(key, "/")
		ctx = metadata.AppendToOutgoingContext(ctx, componentv1.MetaKey, key, componentv1.MetaCaller, caller)
	}
	if low != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, componentv1.MetaLow, low)
	}
	reply := c.reply()
	var trailer metadata.MD
	err := p.Conn().Invoke(ctx, c.full, req, reply, grpc.Trailer(&trailer))
	a := &answer{meta: trailer}
	if m := trailer.Get(componentv1.MetaMark); len(m) > 0 {
		n, perr := strconv.ParseUint(m[0], 10, 64)
		if perr != nil {
			return nil, fmt.Errorf("trailer %s is %q, want a number", componentv1.MetaMark, m[0])
		}
		a.mark = n
	}
	if err != nil {
		return a, fmt.Errorf("%s: %w", c.full, err)
	}
	if a.body, err = (proto.MarshalOptions{Deterministic: true}).Marshal(reply); err != nil {
		return nil, err
	}
	return a, nil
}

// mark is where the journal is, by a heartbeat.
func (p *process) mark(ctx context.Context) (string, error) {
	beat, err := p.control.Heartbeat(ctx, &componentv1.Beat{})
	if err != nil {
		return "", err
	}
	return beat.GetStatus().GetInfo()[componentv1.InfoMark], nil
}

func readsChangeNothing(ctx context.Context, r *rig) error {
	reads, err := r.given(true)
	if err != nil {
		return err
	}
	if len(reads) == 0 {
		return skip("no call of a method without side effects was given (--call)")
	}
	p, err := r.stateful(ctx)
	if err != nil {
		return err
	}
	before, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	for _, c := range reads {
		for range 2 {
			if _, err := c.make(ctx, p, "", ""); err != nil {
				return err
			}
		}
	}
	after, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	if before[0].GetMark() != after[0].GetMark() {
		return fmt.Errorf("the mark was %d and is %d", before[0].GetMark(), after[0].GetMark())
	}
	return same(before, after)
}

// transactional starts a process for a check of txn-calls.
func (r *rig) transactional(ctx context.Context) (*process, []givenCall, error) {
	if !slices.Contains(r.desc.GetFeatures(), componentv1.FeatureTxnCalls) {
		return nil, nil, skip("the feature " + componentv1.FeatureTxnCalls + " is not offered")
	}
	given, err := r.given(false)
	if err != nil {
		return nil, nil, err
	}
	if len(given) == 0 {
		return nil, nil, skip(noCalls)
	}
	p, err := r.start(ctx)
	return p, given, err
}

func marks(ctx context.Context, r *rig) error {
	p, given, err := r.transactional(ctx)
	if err != nil {
		return err
	}
	var last uint64
	for i, c := range given {
		a, err := c.make(ctx, p, fmt.Sprintf("conform/%d", i+1), "")
		if err != nil {
			return err
		}
		if a.mark <= last {
			return fmt.Errorf("%s: trailer %s is %d after %d: a call with a key is an entry of its own, at least for its answer", c.full, componentv1.MetaMark, a.mark, last)
		}
		last = a.mark
		now, err := p.mark(ctx)
		if err != nil {
			return err
		}
		if now != strconv.FormatUint(last, 10) {
			return fmt.Errorf("%s is answered with mark %d, and the heartbeat's %s is %q", c.full, last, componentv1.InfoMark, now)
		}
	}
	return nil
}

func repeats(ctx context.Context, r *rig) error {
	p, given, err := r.transactional(ctx)
	if err != nil {
		return err
	}
	for i, c := range given {
		for _, key := range []string{fmt.Sprintf("conform/%d", i+1), fmt.Sprintf("a key of a client %d", i)} {
			first, err := c.make(ctx, p, key, "")
			if err != nil {
				return err
			}
			before, err := p.checkpoint(ctx, 0)
			if err != nil {
				return err
			}
			again, err := c.make(ctx, p, key, "")
			if err != nil {
				return fmt.Errorf("the same again: %w", err)
			}
			if !bytes.Equal(first.body, again.body) || first.mark != again.mark {
				return fmt.Errorf("%s with key %q: the second answer is another one (marks %d and %d)", c.full, key, first.mark, again.mark)
			}
			after, err := p.checkpoint(ctx, 0)
			if err != nil {
				return err
			}
			if err := same(before, after); err != nil {
				return fmt.Errorf("%s with key %q: the second call has changed the state: %w", c.full, key, err)
			}
		}
	}
	return nil
}

func repeatsAtOnce(ctx context.Context, r *rig) error {
	p, given, err := r.transactional(ctx)
	if err != nil {
		return err
	}
	const many = 16
	var wg sync.WaitGroup
	answers, errs := make([]*answer, many), make([]error, many)
	for i := range many {
		wg.Go(func() { answers[i], errs[i] = given[0].make(ctx, p, "conform/1", "") })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, a := range answers {
		if !bytes.Equal(a.body, answers[0].body) || a.mark != answers[0].mark {
			return fmt.Errorf("%s: %d calls with one key at once, and two answers (marks %d and %d)", given[0].full, many, answers[0].mark, a.mark)
		}
	}
	if now, err := p.mark(ctx); err != nil || now != strconv.FormatUint(answers[0].mark, 10) {
		return errors.Join(err, fmt.Errorf("%d calls with one key led to mark %s, want %d", many, now, answers[0].mark))
	}
	return nil
}

func reusedKey(ctx context.Context, r *rig) error {
	p, given, err := r.transactional(ctx)
	if err != nil {
		return err
	}
	c := given[0]
	if _, err := c.make(ctx, p, "conform/1", ""); err != nil {
		return err
	}
	other := c.empty()
	if err := protojson.Unmarshal([]byte(c.json), other); err != nil {
		return err
	}
	// Another request in any case: the same one, with a field that no version knows.
	other.SetUnknown(append(other.GetUnknown(), 0xfa, 0xff, 0xff, 0xff, 0x0f, 0x01, 'x'))
	a, err := c.send(ctx, p, other, "conform/1", "")
	if err := refused(c.full+" with a key of another request", err, codes.Aborted); err != nil {
		return err
	}
	if v := a.meta.Get(componentv1.MetaKeyReused); len(v) != 1 || v[0] != "1" {
		return fmt.Errorf("the trailer %s is %q, want \"1\"", componentv1.MetaKeyReused, v)
	}
	return nil
}

func lowWater(ctx context.Context, r *rig) error {
	p, given, err := r.transactional(ctx)
	if err != nil {
		return err
	}
	c := given[0]
	for _, key := range []string{"conform/1", "conform/2"} {
		if _, err := c.make(ctx, p, key, ""); err != nil {
			return err
		}
	}
	if _, err := c.make(ctx, p, "conform/3", "2"); err != nil {
		return err
	}
	_, err = c.make(ctx, p, "conform/1", "")
	if err := refused("a key below the low-water mark", err, codes.FailedPrecondition); err != nil {
		return err
	}
	_, err = c.make(ctx, p, "conform/2", "")
	return err
}

func rememberedElsewhere(ctx context.Context, r *rig) error {
	p, given, err := r.transactional(ctx)
	if err != nil {
		return err
	}
	c := given[0]
	first, err := c.make(ctx, p, "conform/1", "")
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
	again, err := c.make(ctx, other, "conform/1", "")
	if err != nil {
		return err
	}
	if !bytes.Equal(first.body, again.body) {
		return errors.New("the second process gives another answer")
	}
	after, err := other.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	return same(fs, after)
}

func journal(ctx context.Context, r *rig) error {
	if !slices.Contains(r.desc.GetFeatures(), componentv1.FeatureDeltas) {
		return skip("the feature " + componentv1.FeatureDeltas + " is not offered")
	}
	p, given, err := r.transactional(ctx)
	if err != nil {
		return err
	}
	base, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	since := base[0].GetMark()
	stream, err := p.control.Deltas(ctx, &componentv1.CheckpointFrom{SinceMark: since})
	if err != nil {
		return err
	}
	check := frames.Journal(since)
	var entries []*componentv1.StateFrame
	for i, c := range given {
		a, err := c.make(ctx, p, fmt.Sprintf("conform/%d", i+1), "")
		if err != nil {
			return err
		}
		for check.Mark() < a.mark {
			f, err := stream.Recv()
			if err != nil {
				return fmt.Errorf("the journal, at mark %d: %w", check.Mark(), err)
			}
			if err := check.Frame(f); err != nil {
				return err
			}
			entries = append(entries, f)
		}
	}
	other, err := r.launch(ctx)
	if err != nil {
		return err
	}
	if _, err := other.restore(ctx, append(base, entries...)); err != nil {
		return fmt.Errorf("a Restore of a checkpoint and the journal after it: %w", err)
	}
	whole, err := p.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	if _, err := other.control.Start(ctx, startRequest()); err != nil {
		return err
	}
	again, err := other.checkpoint(ctx, 0)
	if err != nil {
		return err
	}
	return same(whole, again)
}
