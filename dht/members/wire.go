package members

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// Limits of what a node may say of itself.
const (
	maxID    = 128
	maxText  = 512
	maxAddrs = 64
	maxPairs = 128
	maxPeers = 64
	maxRest  = 4096 // bytes of fields that this version does not know
)

func infoToWire(i Info) *wirev1.MemberInfo {
	w := &wirev1.MemberInfo{
		Id: []byte(i.ID), Name: i.Name, Addrs: i.Addrs, Zone: i.Zone, Role: i.Role, Labels: i.Labels, CpuMillis: i.CPUMillis,
		MemoryBytes: i.MemoryBytes, DiskBytes: i.DiskBytes, Version: i.Version, Platform: i.Platform, Boot: i.Boot, Counter: i.Counter,
		StartedUnixMs: i.StartedUnixMs, Draining: i.Draining, NoVoter: i.NoVoter, NoHolder: i.NoHolder, MaxFormat: i.MaxFormat,
		Watchers: idsToWire(i.Watchers), Readmitted: versionToWire(i.readmitted),
	}
	w.ProtoReflect().SetUnknown([]byte(i.rest))
	return w
}

func infoFromWire(w *wirev1.MemberInfo) (Info, error) {
	id, err := idFromWire(w.GetId())
	if err != nil {
		return Info{}, err
	}
	texts := append([]string{w.GetName(), w.GetZone(), w.GetRole(), w.GetVersion(), w.GetPlatform()}, w.GetAddrs()...)
	for k, v := range w.GetLabels() {
		texts = append(texts, k, v)
	}
	rest := w.ProtoReflect().GetUnknown()
	if len(rest) > maxRest || slices.ContainsFunc(texts, func(s string) bool { return len(s) > maxText }) ||
		len(w.GetAddrs()) > maxAddrs || len(w.GetLabels()) > maxPairs || len(w.GetWatchers()) > maxPeers {
		return Info{}, fmt.Errorf("what %s says of itself is too large", id)
	}
	watchers, err := idsFromWire(w.GetWatchers())
	if err != nil {
		return Info{}, err
	}
	return Info{
		ID: id, Name: w.GetName(), Addrs: w.GetAddrs(), Zone: w.GetZone(), Role: w.GetRole(), Labels: w.GetLabels(),
		CPUMillis: w.GetCpuMillis(), MemoryBytes: w.GetMemoryBytes(), DiskBytes: w.GetDiskBytes(), Version: w.GetVersion(),
		Platform: w.GetPlatform(), Boot: w.GetBoot(), Counter: w.GetCounter(), StartedUnixMs: w.GetStartedUnixMs(),
		Draining: w.GetDraining(), NoVoter: w.GetNoVoter(), NoHolder: w.GetNoHolder(), MaxFormat: w.GetMaxFormat(), Watchers: watchers,
		readmitted: versionFromWire(w.GetReadmitted()), rest: string(rest),
	}, nil
}

func versionToWire(v version) *wirev1.MemberVersion {
	if v == (version{}) {
		return nil
	}
	return &wirev1.MemberVersion{StartedUnixMs: v.started, Boot: v.boot, Counter: v.counter}
}

func versionFromWire(w *wirev1.MemberVersion) version {
	return version{w.GetStartedUnixMs(), w.GetBoot(), w.GetCounter()}
}

func idFromWire(b []byte) (peer.ID, error) {
	if len(b) == 0 || len(b) > maxID {
		return "", fmt.Errorf("a node id of %d bytes", len(b))
	}
	return peer.ID(b), nil
}

func idsToWire(ids []peer.ID) [][]byte {
	var out [][]byte
	for _, id := range ids {
		out = append(out, []byte(id))
	}
	return out
}

func idsFromWire(bs [][]byte) ([]peer.ID, error) {
	var out []peer.ID
	for _, b := range bs {
		id, err := idFromWire(b)
		if err != nil {
			return nil, err
		}
		out = append(out, id)
	}
	return out, nil
}

func verdictToWire(v *verdict) *wirev1.Verdict {
	if v == nil {
		return nil
	}
	kind := wirev1.Verdict_DEAD
	if v.kind == Left {
		kind = wirev1.Verdict_LEFT
	}
	return &wirev1.Verdict{
		Kind: kind, StartedUnixMs: v.at.started, Boot: v.at.boot, Counter: v.at.counter, Evidence: v.evidence, By: idsToWire(v.by),
		Proof: v.proof, AgeMs: uint64(max(0, time.Since(v.since).Milliseconds())),
	}
}

func verdictFromWire(w *wirev1.Verdict) (*verdict, error) {
	if w == nil {
		return nil, nil
	}
	v := &verdict{
		at: version{w.GetStartedUnixMs(), w.GetBoot(), w.GetCounter()}, evidence: w.GetEvidence(), proof: w.GetProof(),
	}
	switch w.GetKind() {
	case wirev1.Verdict_NONE:
		return nil, nil
	case wirev1.Verdict_DEAD:
		v.kind = Dead
	case wirev1.Verdict_LEFT:
		v.kind = Left
	default:
		return nil, fmt.Errorf("a verdict of kind %d, unknown here", w.GetKind())
	}
	if len(w.GetBy()) > maxPeers || len(v.evidence) > maxText {
		return nil, errors.New("a verdict too large")
	}
	var err error
	v.by, err = idsFromWire(w.GetBy())
	v.since = time.Now().Add(-time.Duration(min(w.GetAgeMs(), uint64(keepLost.Milliseconds()))) * time.Millisecond)
	return v, err
}

// state is one node as a message tells of it.
type state struct {
	info    *Info
	verdict *verdict
	unheard bool
}

func stateFromWire(w *wirev1.MemberState) (state, error) {
	info, err := infoFromWire(w.GetInfo())
	if err != nil {
		return state{}, err
	}
	v, err := verdictFromWire(w.GetVerdict())
	return state{&info, v, w.GetUnheard()}, err
}

func (s state) toWire() *wirev1.MemberState {
	return &wirev1.MemberState{Info: infoToWire(*s.info), Verdict: verdictToWire(s.verdict), Unheard: s.unheard}
}

// hash is equal on two nodes that hold the same of a node.
func (s state) hash() uint64 {
	h := fnv.New64a()
	var b []byte
	b = append(b, s.info.ID...)
	if !s.unheard {
		var until version
		kind := Alive
		if s.verdict != nil {
			until, kind = s.verdict.at, s.verdict.kind
		}
		for _, v := range []version{s.info.version(), until} {
			b = binary.LittleEndian.AppendUint64(b, uint64(v.started))
			b = binary.LittleEndian.AppendUint64(b, v.boot)
			b = binary.LittleEndian.AppendUint64(b, v.counter)
		}
		b = append(b, byte(kind))
	}
	_, _ = h.Write(b) // never fails
	return h.Sum64()
}

// names joins ids' short forms for evidence.
func names(of func(peer.ID) string, ids []peer.ID) string {
	var out []string
	for _, id := range ids {
		out = append(out, of(id))
	}
	return strings.Join(out, ", ")
}
