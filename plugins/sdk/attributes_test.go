package sdk_test

import (
	"errors"
	"testing"

	"google.golang.org/grpc/codes"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

func TestAttributes(t *testing.T) {
	capacity := sdk.NewAttribute("capacity", 100, sdk.Check(func(n int) error {
		if n < 1 {
			return errors.New("must be at least 1")
		}
		return nil
	}))
	size := sdk.NewAttribute("size", "small", sdk.RestartToApply[string]())
	load := sdk.NewAttribute("load", 0.5, sdk.ReadOnly[float64]())
	c := (&probe{}).component()
	c.Attributes = []sdk.Attr{capacity, size, load}
	r := sdktest.Start(t, c, sdktest.Request(&componentv1.StartRequest{
		Attributes: &componentv1.Attributes{Revision: 4, Json: map[string][]byte{"capacity": []byte(`"250"`), "size": []byte("big")}},
	}))
	ctx := t.Context()
	if capacity.Get() != 250 || size.Get() != "big" {
		t.Fatal(capacity.Get(), size.Get())
	}
	set := func(name, value string, revision uint64, dry bool) (*componentv1.Attributes, error) {
		return r.Control.SetAttributes(ctx, &componentv1.SetAttributesRequest{Json: map[string][]byte{name: []byte(value)}, IfRevision: revision, DryRun: dry})
	}
	if a, err := set("capacity", "7", 4, true); err != nil || string(a.GetJson()["capacity"]) != "7" || capacity.Get() != 250 {
		t.Fatal(a, err)
	}
	if a, err := set("capacity", "7", 4, false); err != nil || a.GetRevision() != 5 || capacity.Get() != 7 {
		t.Fatal(a, err)
	}
	_, err := set("capacity", "8", 4, false)
	wantCode(t, err, codes.Aborted, "revision 5")
	_, err = set("capacity", "0", 0, false)
	wantCode(t, err, codes.InvalidArgument, "at least 1")
	_, err = set("capacity", `{"a":1}`, 0, false)
	wantCode(t, err, codes.InvalidArgument, "Int64Value")
	_, err = set("colour", "1", 0, false)
	wantCode(t, err, codes.InvalidArgument, "capacity, size, load")
	_, err = set("load", "1", 0, false)
	wantCode(t, err, codes.FailedPrecondition, "read-only")
	if a, err := set("size", `"huge"`, 0, false); err != nil || size.Get() != "big" || string(a.GetJson()["size"]) != `"huge"` {
		t.Fatal("restart to apply", a, err)
	}
	bad := (&probe{}).component()
	bad.Attributes = []sdk.Attr{sdk.NewAttribute("n", 1)}
	b := sdktest.Start(t, bad, sdktest.Request(nil))
	_, err = b.Control.Start(ctx, &componentv1.StartRequest{Attributes: &componentv1.Attributes{Json: map[string][]byte{"n": []byte("x")}}})
	wantCode(t, err, codes.InvalidArgument, "Int64Value")
	if beat, err := b.Control.Heartbeat(ctx, &componentv1.Beat{Seq: 3}); err != nil || beat.GetStatus().GetState() != componentv1.State_FAILED || beat.GetSeq() != 3 {
		t.Fatal(beat, err)
	}
}
