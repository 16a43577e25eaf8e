package supervisor

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// merged asks the running process, which is at rest, to merge three states, and stores the result as a new base.
func (i *instance) merged(ctx context.Context, base, ours, theirs blobs.Hash) (*chainHead, error) {
	stream, err := i.gen.comp.Merge(ctx)
	if err != nil {
		return nil, mergeError(err)
	}
	for _, b := range []struct {
		branch componentv1.BranchFrame_Branch
		root   blobs.Hash
	}{{componentv1.BranchFrame_BASE, base}, {componentv1.BranchFrame_OURS, ours}, {componentv1.BranchFrame_THEIRS, theirs}} {
		if b.root.IsZero() {
			continue
		}
		steps, _, err := chainSteps(i.sup.cfg.Blobs, b.root, blobs.Hash{})
		if err != nil {
			return nil, err
		}
		for _, node := range steps {
			err := stepFrames(i.sup.cfg.Blobs, node, func(f *componentv1.StateFrame) error {
				return stream.Send(&componentv1.BranchFrame{Branch: b.branch, Frame: f})
			})
			if err != nil && !errors.Is(err, io.EOF) { // io.EOF: what it receives says why
				return nil, err
			}
		}
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	return i.storeMerged(ctx, stream.Recv)
}

// storeMerged writes the frames of a result.
func (i *instance) storeMerged(ctx context.Context, recv func() (*componentv1.StateFrame, error)) (*chainHead, error) {
	first, err := recv()
	if err != nil {
		return nil, mergeError(err)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		pw.CloseWithError(func() error {
			check := frames.Checkpoint(0)
			for f := first; ; {
				if err := check.Frame(f); err != nil {
					return &noMergeError{err}
				}
				var buf frameBuffer
				if err := buf.add(f); err != nil {
					return err
				}
				if _, err := pw.Write(buf.buf.Bytes()); err != nil {
					return err
				}
				var err error
				if f, err = recv(); errors.Is(err, io.EOF) {
					if err := check.End(); err != nil {
						return &noMergeError{err}
					}
					return nil
				} else if err != nil {
					return mergeError(err)
				}
			}
		}())
	}()
	head, err := writeBase(ctx, i.sup.cfg.Blobs, i.gen.saver.meta(first.GetMark()), pr, route{})
	pr.CloseWithError(err)
	<-done
	return head, err
}

// mergeError tells what trying again may mend from what it does not.
func mergeError(err error) error {
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return err
	}
	return &noMergeError{err}
}
