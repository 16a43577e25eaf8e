package dht

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/record"
	"google.golang.org/protobuf/proto"
)

// Certificate is the signed mirror of a committed member record: it says that the arbiter admitted Member, at which point of its
// history. Any member may sign one, for others or (the founder) for itself; it counts where its signer is known as a member. No key
// mints members: a certificate states what was committed, and a revocation that the verifier knows of outweighs it.
type Certificate struct {
	Cluster string
	Member  peer.ID
	// Index and Incarnation are where the admission stands in the arbiter's log.
	Index, Incarnation uint64
	// Issued is the signer's clock (milliseconds kept); for people, not compared across machines.
	Issued time.Time
	// Client marks a certificate that opens kad-dht's lookups only: its holder is no node and enters no view.
	Client bool
	// Signer is who signed it; set by VerifyCertificate.
	Signer peer.ID
}

// Signature domains: an envelope of one cannot be passed off as another.
const (
	certificateDomain = "coppice-member-certificate"
	proofDomain       = "coppice-join-proof"
)

// signed is a protobuf message as libp2p's record.Record.
type signed struct {
	domain, codec string
	msg           proto.Message
}

func (s *signed) Domain() string { return s.domain }
func (s *signed) Codec() []byte  { return []byte(s.codec) }

func (s *signed) MarshalRecord() ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(s.msg)
}
func (s *signed) UnmarshalRecord(b []byte) error { return proto.Unmarshal(b, s.msg) }

func certificateRecord(m *wirev1.Certificate) *signed {
	return &signed{certificateDomain, "/coppice/certificate/1", m}
}

func proofRecord(m *wirev1.JoinProof) *signed {
	return &signed{proofDomain, "/coppice/join-proof/1", m}
}

func seal(r *signed, key crypto.PrivKey) ([]byte, error) {
	e, err := record.Seal(r, key)
	if err != nil {
		return nil, err
	}
	return e.Marshal()
}

// open verifies an envelope's signature and domain and returns its signer.
func open(b []byte, r *signed) (peer.ID, error) {
	e, err := record.ConsumeTypedEnvelope(b, r)
	if err != nil {
		return "", err
	}
	if string(e.PayloadType) != r.codec {
		return "", fmt.Errorf("it holds %q, not %q", e.PayloadType, r.codec)
	}
	return peer.IDFromPublicKey(e.PublicKey)
}

// SignCertificate seals a certificate with a member's key.
func SignCertificate(c Certificate, key crypto.PrivKey) ([]byte, error) {
	if err := CheckClusterID(c.Cluster); err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	if err := c.Member.Validate(); err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	b, err := seal(certificateRecord(&wirev1.Certificate{
		Cluster: c.Cluster, Member: []byte(c.Member), Index: c.Index, Incarnation: c.Incarnation,
		IssuedUnixMs: c.Issued.UnixMilli(), Client: c.Client,
	}), key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", c.Member, err)
	}
	return b, nil
}

// ErrBadCertificate is wrapped by all errors of VerifyCertificate.
var ErrBadCertificate = errors.New("not a valid member certificate")

// VerifyCertificate checks that b is a certificate of this cluster for member, signed by a peer that signer approves.
func VerifyCertificate(b []byte, cluster string, member peer.ID, signer func(peer.ID) bool) (Certificate, error) {
	var m wirev1.Certificate
	by, err := open(b, certificateRecord(&m))
	if err != nil {
		return Certificate{}, fmt.Errorf("%w: %w", ErrBadCertificate, err)
	}
	c := Certificate{
		Cluster: m.Cluster, Member: peer.ID(m.Member), Index: m.Index, Incarnation: m.Incarnation,
		Issued: time.UnixMilli(m.IssuedUnixMs), Client: m.Client, Signer: by,
	}
	switch {
	case c.Cluster != cluster:
		return Certificate{}, fmt.Errorf("%w: it is of cluster %q, this is %q", ErrBadCertificate, c.Cluster, cluster)
	case c.Member != member:
		return Certificate{}, fmt.Errorf("%w: it is %s's, not %s's", ErrBadCertificate, c.Member, member)
	case !signer(by):
		return Certificate{}, fmt.Errorf("%w: its signer %s is not known as a member here", ErrBadCertificate, by)
	}
	return c, nil
}

// VerifyProof checks a newcomer's proof: that the key of member signed this information for this cluster. Whoever reads the committed
// record can repeat it.
func VerifyProof(proof []byte, cluster string, member peer.ID, info []byte, client bool) error {
	var m wirev1.JoinProof
	by, err := open(proof, proofRecord(&m))
	if err != nil {
		return fmt.Errorf("join proof: %w", err)
	}
	sum := sha256.Sum256(info)
	if by != member || peer.ID(m.Member) != member || m.Cluster != cluster || string(m.InfoSha256) != string(sum[:]) || m.Client != client {
		return errors.New("join proof: it was signed for something else")
	}
	return nil
}

func signProof(cluster string, info []byte, client bool, key crypto.PrivKey) ([]byte, error) {
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(info)
	return seal(proofRecord(&wirev1.JoinProof{Cluster: cluster, Member: []byte(id), InfoSha256: sum[:], Client: client}), key)
}
