package members

import (
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// In a cluster of mixed versions an older node tells others about a newer one: what it does not know itself must not be lost on the way.
func TestWhatANewerVersionSaysIsPassedOn(t *testing.T) {
	newer := infoToWire(*full.info)
	extra := protowire.AppendTag(nil, 1000, protowire.BytesType)
	extra = protowire.AppendString(extra, "of a later version")
	newer.ProtoReflect().SetUnknown(extra)
	told, err := infoFromWire(newer)
	if err != nil {
		t.Fatal(err)
	}
	passedOn, err := proto.Marshal(infoToWire(told.clone()))
	if err != nil {
		t.Fatal(err)
	}
	var heard wirev1.MemberInfo
	if err := proto.Unmarshal(passedOn, &heard); err != nil {
		t.Fatal(err)
	}
	if got := heard.ProtoReflect().GetUnknown(); string(got) != string(extra) {
		t.Errorf("passed on: %q, want %q", got, extra)
	}
	newer.ProtoReflect().SetUnknown(append(extra, make([]byte, maxRest)...))
	if _, err := infoFromWire(newer); err == nil {
		t.Error("more than that is taken")
	}
}
