package members

import (
	"fmt"

	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// EncodeInfo returns what a node says of itself as bytes, for records and for joining.
func EncodeInfo(i Info) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(infoToWire(i))
	if err != nil { // only invalid UTF-8 in a text cannot be encoded, and those come from Config, which is checked
		return nil
	}
	return b
}

// DecodeInfo is the reverse of EncodeInfo; it refuses what is too large.
func DecodeInfo(b []byte) (Info, error) {
	var w wirev1.MemberInfo
	if err := proto.Unmarshal(b, &w); err != nil {
		return Info{}, fmt.Errorf("what a node says of itself: %w", err)
	}
	return infoFromWire(&w)
}
