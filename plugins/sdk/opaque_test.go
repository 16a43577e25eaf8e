package sdk_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

// words is a state of its own form: one text.
type words struct {
	text  string
	quiet []string
	fail  error
}

func (w *words) Checkpoint(_ context.Context, _ uint64, send func(*componentv1.StateFrame) error) error {
	return errors.Join(
		send(frames.Seal(&componentv1.StateFrame{Mark: 1, Schema: 1, TotalBytes: uint64(len(w.text))})),
		send(frames.Seal(&componentv1.StateFrame{Section: "words", Data: []byte(w.text)})),
		send(frames.Seal(&componentv1.StateFrame{Section: componentv1.SectionEnd, Mark: 1, Last: true})),
	)
}

func (w *words) Restore(_ context.Context, recv func() (*componentv1.StateFrame, error)) (uint64, uint64, error) {
	for {
		f, err := recv()
		if errors.Is(err, io.EOF) {
			return uint64(len(w.text)), 1, nil
		}
		if err != nil {
			return 0, 0, err
		}
		w.text += string(f.GetData())
	}
}

func (w *words) Quiesce(_ context.Context, reason componentv1.QuiesceRequest_Reason) error {
	w.quiet = append(w.quiet, reason.String())
	return w.fail
}

func (w *words) Resume(context.Context) error {
	w.quiet = append(w.quiet, "RESUME")
	return nil
}

// A state of a component's own form is saved, restored and brought to rest by the component itself.
func TestOpaqueStateIsTheComponents(t *testing.T) {
	w := &words{text: "hello"}
	r := sdktest.Start(t, &sdk.Component{Type: "words", Version: "1.0.0", Opaque: w, Info: func() map[string]string { return map[string]string{"listen": "here"} }})
	d, err := r.Control.Describe(t.Context(), &componentv1.DescribeRequest{})
	if err != nil || !d.GetState().GetStateful() || strings.Join(d.GetFeatures(), " ") != componentv1.FeatureIncremental {
		t.Errorf("it describes itself as %v, %v", d, err)
	}
	if b, err := r.Control.Heartbeat(t.Context(), &componentv1.Beat{}); err != nil || b.GetStatus().GetInfo()["listen"] != "here" {
		t.Errorf("its heartbeat tells %v, %v", b, err)
	}
	next := &words{}
	sdktest.Start(t, &sdk.Component{Type: "words", Version: "1.0.0", Opaque: next}, sdktest.From(r.Checkpoint(0)))
	if next.text != "hello" {
		t.Errorf("restored: %q", next.text)
	}
	freeze := func() error {
		_, err := r.Control.Quiesce(t.Context(), &componentv1.QuiesceRequest{Reason: componentv1.QuiesceRequest_SWAP})
		return err
	}
	if err := freeze(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Control.Resume(t.Context(), &componentv1.ResumeRequest{}); err != nil {
		t.Fatal(err)
	}
	w.fail = errors.New("not now")
	if err := freeze(); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("where it does not come to rest: %v", err)
	}
	if got := strings.Join(w.quiet, " "); got != "SWAP RESUME SWAP" {
		t.Errorf("it was told %s", got)
	}
	if _, err := sdk.New(&sdk.Component{Type: "two", Version: "1", State: &sdk.State{Schema: 1}, Opaque: w}, sdk.Env{}); err == nil {
		t.Error("a component with two states was taken")
	}
}
