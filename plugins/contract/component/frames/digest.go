package frames

import (
	"encoding/binary"

	"github.com/cespare/xxhash/v2"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Digest computes the xxh64 of a frame as the contract defines it.
func Digest(f *componentv1.StateFrame) uint64 {
	var head [64]byte
	b := head[:0]
	b = binary.LittleEndian.AppendUint64(b, f.GetMark())
	b = binary.LittleEndian.AppendUint32(b, f.GetSchema())
	b = binary.LittleEndian.AppendUint64(b, f.GetTotalBytes())
	b = binary.LittleEndian.AppendUint64(b, f.GetSinceMark())
	b = binary.LittleEndian.AppendUint64(b, f.GetOffset())
	b = append(b, bit(f.GetDeleted()), bit(f.GetLast()))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.GetSection())))
	d := xxhash.New()
	// Write and WriteString of a xxhash.Digest never return an error.
	_, _ = d.Write(b)
	_, _ = d.WriteString(f.GetSection())
	_, _ = d.Write(f.GetData())
	return d.Sum64()
}

func bit(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// Seal sets a frame's digest and returns it.
func Seal(f *componentv1.StateFrame) *componentv1.StateFrame {
	f.Xxh64 = Digest(f)
	return f
}
