package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	memberPrefix    = "member/"
	tokenPrefix     = "token/"
	pausedKey       = "meta/paused"
	admissionFormat = 1

	// defaultTokenTTL is how long a join token admits where nobody says otherwise.
	defaultTokenTTL = time.Hour
	maxTokenTTL     = 30 * 24 * time.Hour
	// casTries bounds how often a conditional write is tried against others who write the same.
	casTries = 16
)

func memberKey(id peer.ID) string { return memberPrefix + id.String() }

// newToken commits a join token and returns its text. uses 0 means any number until it expires.
func (n *Node) newToken(ctx context.Context, ttl time.Duration, uses uint32) (string, time.Time, error) {
	if ttl <= 0 {
		ttl = defaultTokenTTL
	}
	if ttl > maxTokenTTL {
		return "", time.Time{}, fmt.Errorf("a token lives %s at the most", maxTokenTTL)
	}
	secret, err := dht.NewSecret()
	if err != nil {
		return "", time.Time{}, err
	}
	expires := n.clusterNow().Add(ttl)
	body, err := proto.Marshal(&wirev1.TokenRecord{
		Format: admissionFormat, ExpiresUnixMs: uint64(expires.UnixMilli()), Limited: uses > 0, UsesLeft: uses, MadeBy: []byte(n.id),
	})
	if err != nil {
		return "", time.Time{}, err
	}
	if err := n.put(ctx, dht.SecretKey(secret), body); err != nil {
		return "", time.Time{}, fmt.Errorf("commit the token: %w", err)
	}
	text, err := dht.Token{ClusterID: n.state.Cluster, Addrs: n.tokenAddrs(), Secret: secret, Expires: expires}.Encode()
	return text, expires, err
}

// tokenAddrs names this node first and then others, so that a token outlives the node that made it.
func (n *Node) tokenAddrs() []string {
	const most = 8
	var out []string
	add := func(m members.Member) {
		for _, a := range m.Addrs {
			if len(out) < most {
				out = append(out, a+"/p2p/"+m.ID.String())
			}
		}
	}
	add(n.members.Self())
	for _, m := range n.members.Alive() {
		if m.ID != n.id {
			add(m)
		}
	}
	return out
}

// revokeToken makes a token useless; false when it was so already.
func (n *Node) revokeToken(ctx context.Context, text string) (bool, error) {
	tok, err := dht.DecodeToken(text)
	if err != nil {
		return false, err
	}
	revoked := false
	err = n.update(ctx, dht.SecretKey(tok.Secret), func(body []byte) ([]byte, error) {
		var rec wirev1.TokenRecord
		if err := proto.Unmarshal(body, &rec); err != nil {
			return nil, err
		}
		if rec.GetRevoked() || n.expired(&rec) {
			return nil, nil
		}
		rec.Revoked, revoked = true, true
		return proto.Marshal(&rec)
	})
	return revoked, err
}

func (n *Node) expired(rec *wirev1.TokenRecord) bool {
	return n.clusterNow().UnixMilli() >= int64(rec.GetExpiresUnixMs())
}

// admit decides about a newcomer: one transaction takes a use from the token and makes the member.
func (n *Node) admit(ctx context.Context, req dht.JoinRequest) (dht.Welcome, error) {
	tokenKey := dht.SecretKey(req.Secret)
	for range casTries {
		// Through the log: the token may have been made a moment ago on another node, and a use must not be counted twice.
		reg, ok, err := n.arbiter.Read(ctx, tokenKey)
		if err != nil {
			return dht.Welcome{}, &dht.Refusal{Reason: dht.Unavailable, Message: err.Error()}
		}
		if !ok {
			return dht.Welcome{}, &dht.Refusal{Reason: dht.UnknownToken}
		}
		known, have, err := n.arbiter.Read(ctx, memberKey(req.ID))
		if err != nil {
			return dht.Welcome{}, &dht.Refusal{Reason: dht.Unavailable, Message: err.Error()}
		}
		member, next, err := n.judge(&req, reg, known, have)
		if err != nil {
			return dht.Welcome{}, err
		}
		res, err := n.arbiter.Txn(ctx, arbiter.TxnRequest{
			Nonce:    n.nonce(),
			Compares: []arbiter.Compare{{Key: tokenKey, Field: "revision", Equal: reg.Revision}, {Key: memberKey(req.ID), Field: "revision", Equal: known.Revision}},
			Then:     []arbiter.Op{{Put: &arbiter.PutOp{Key: tokenKey, Body: next}}, {Put: &arbiter.PutOp{Key: memberKey(req.ID), Body: member}}},
		})
		if err != nil {
			return dht.Welcome{}, &dht.Refusal{Reason: dht.Unavailable, Message: err.Error()}
		}
		if res.Succeeded {
			return n.welcome(req, res)
		}
	}
	return dht.Welcome{}, &dht.Refusal{Reason: dht.Unavailable, Message: "many nodes join at once"}
}

// judge says whether the token admits the newcomer, and what both registers become.
func (n *Node) judge(req *dht.JoinRequest, token, known arbiter.Register, have bool) (member, next []byte, err error) {
	var rec wirev1.TokenRecord
	if err := proto.Unmarshal(token.Body, &rec); err != nil {
		return nil, nil, fmt.Errorf("token record: %w", err)
	}
	var was wirev1.MemberRecord
	if have {
		if err := proto.Unmarshal(known.Body, &was); err != nil {
			return nil, nil, fmt.Errorf("member record: %w", err)
		}
	}
	if err := n.tooOld(req); err != nil {
		return nil, nil, err
	}
	switch {
	case was.GetRevoked():
		return nil, nil, &dht.Refusal{Reason: dht.Revoked, Message: was.GetRevokedWhy()}
	case rec.GetRevoked():
		return nil, nil, &dht.Refusal{Reason: dht.Revoked, Message: "the token was revoked"}
	case n.expired(&rec):
		return nil, nil, &dht.Refusal{Reason: dht.Expired, Message: "at " + time.UnixMilli(int64(rec.GetExpiresUnixMs())).UTC().Format(time.RFC3339)}
	case rec.GetLimited() && rec.GetUsesLeft() == 0 && !have:
		return nil, nil, &dht.Refusal{Reason: dht.UsedUp}
	}
	if rec.GetLimited() && !have {
		rec.UsesLeft--
	}
	if next, err = proto.Marshal(&rec); err != nil {
		return nil, nil, err
	}
	member, err = proto.Marshal(&wirev1.MemberRecord{
		Format: admissionFormat, Id: []byte(req.ID), Info: req.Info, Client: req.Client, AdmittedBy: []byte(n.id), AdmittedUnixMs: uint64(time.Now().UnixMilli()),
	})
	return member, next, err
}

// tooOld refuses a newcomer whose version does not know the format that the cluster has agreed on: it could read neither the arbiter's log nor,
// in time, its records.
func (n *Node) tooOld(req *dht.JoinRequest) error {
	if req.Client {
		return nil // it reads signed records, which say their own format
	}
	info, err := members.DecodeInfo(req.Info)
	if err != nil {
		return &dht.Refusal{Reason: dht.BadRequest, Message: err.Error()}
	}
	if format := n.arbiter.Status().Format; format > max(info.MaxFormat, 1) {
		return &dht.Refusal{Reason: dht.BadRequest, Message: fmt.Sprintf(
			"this cluster has agreed on format %d, and version %s of %s knows up to %d: start a newer version there", format, info.Version, info.Name, max(info.MaxFormat, 1))}
	}
	return nil
}

// welcome tells an admitted newcomer what it needs to begin.
func (n *Node) welcome(req dht.JoinRequest, res arbiter.TxnResult) (dht.Welcome, error) {
	reg := res.Registers[len(res.Registers)-1]
	cert, err := dht.SignCertificate(dht.Certificate{
		Cluster: n.state.Cluster, Member: req.ID, Index: reg.Index, Incarnation: reg.Incarnation, Issued: time.Now(), Client: req.Client,
	}, n.key)
	if err != nil {
		return dht.Welcome{}, err
	}
	w := dht.Welcome{Cluster: n.state.Cluster, Certificate: cert, Arbiters: n.arbiter.Status().Voters}
	for _, m := range n.members.All() {
		w.Members = append(w.Members, members.EncodeInfo(m.Info))
	}
	if !req.Client {
		info, err := members.DecodeInfo(req.Info)
		if err != nil {
			return dht.Welcome{}, &dht.Refusal{Reason: dht.BadRequest, Message: err.Error()}
		}
		n.members.Admit(info)
	}
	n.log.Info("admitted", "peer", req.ID, "client", req.Client)
	return w, nil
}

// certified is told by the door that a peer presented a valid certificate that this node did not know of yet.
func (n *Node) certified(c dht.Certificate, info []byte) error {
	if reg, ok := n.arbiter.Get(memberKey(c.Member)); ok {
		var rec wirev1.MemberRecord
		if err := proto.Unmarshal(reg.Body, &rec); err == nil && rec.GetRevoked() {
			return &dht.Refusal{Reason: dht.Revoked, Message: rec.GetRevokedWhy()}
		}
	}
	if c.Client {
		return nil // it reads by kad-dht and enters no view
	}
	m, err := members.DecodeInfo(info)
	if err != nil {
		return &dht.Refusal{Reason: dht.BadCertificate, Message: err.Error()}
	}
	if m.ID != c.Member {
		return &dht.Refusal{Reason: dht.BadCertificate, Message: "the description is another node's"}
	}
	n.members.Admit(m)
	return nil
}

// memberChanged follows the committed admissions and revocations.
func (n *Node) memberChanged(reg *arbiter.Register) {
	var rec wirev1.MemberRecord
	if err := proto.Unmarshal(reg.Body, &rec); err != nil {
		n.log.Error("member record is damaged", "key", reg.Key, "error", err)
		return
	}
	switch {
	case rec.GetClient():
	case rec.GetRevoked():
		id := peer.ID(rec.GetId())
		if id == n.id {
			n.Stop("this node was revoked: " + rec.GetRevokedWhy())
			return
		}
		n.members.Expel(id)
		n.faults.set("expel "+id.String(), n.overlay.Expel(id))
	default:
		info, err := members.DecodeInfo(rec.GetInfo())
		if err != nil {
			n.log.Error("member record is damaged", "key", reg.Key, "error", err)
			return
		}
		n.members.Admit(info)
	}
}

// expelled says whether it is committed, as far as this node knows, that a member must not come back.
func (n *Node) expelled(id peer.ID) bool {
	if n.arbiter == nil {
		return false // it is being made
	}
	reg, ok := n.arbiter.Get(memberKey(id))
	if !ok {
		return false
	}
	var rec wirev1.MemberRecord
	if err := proto.Unmarshal(reg.Body, &rec); err != nil {
		return false // memberChanged says so
	}
	return rec.GetRevoked()
}

// expel commits that a member is none any more and must not come back.
func (n *Node) expel(ctx context.Context, id peer.ID, why string) error {
	return n.update(ctx, memberKey(id), func(body []byte) ([]byte, error) {
		var rec wirev1.MemberRecord
		if err := proto.Unmarshal(body, &rec); err != nil {
			return nil, err
		}
		rec.Revoked, rec.RevokedWhy = true, why
		return proto.Marshal(&rec)
	})
}

// put sets a register's body.
func (n *Node) put(ctx context.Context, key string, body []byte) error {
	_, err := n.arbiter.Txn(ctx, arbiter.TxnRequest{Nonce: n.nonce(), Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: key, Body: body}}}})
	return err
}

// errCutOff says that nothing can be changed here: what the cluster wants is decided where the majority of the voters is.
var errCutOff = errors.New("this node has lost touch with the majority of the voters, and only they change what the cluster wants; what runs here goes on as its guarantee says: " +
	"try a node on the other side, or again when the cut is over")

// mayChange says at once what a command would otherwise wait for in vain.
func (n *Node) mayChange() error {
	if n.sup.CutOff() {
		return errCutOff
	}
	return nil
}

// errNoRegister says that a register is not there.
var errNoRegister = errors.New("there is no such record")

// update changes a register's body by f, against whoever else changes it. f returns nil to leave it as it is.
func (n *Node) update(ctx context.Context, key string, f func(body []byte) ([]byte, error)) error {
	if err := n.mayChange(); err != nil {
		return err
	}
	for range casTries {
		reg, ok, err := n.arbiter.Read(ctx, key)
		if err != nil {
			return err
		}
		if !ok {
			return fmt.Errorf("%s: %w", key, errNoRegister)
		}
		body, err := f(reg.Body)
		if err != nil || body == nil {
			return err
		}
		res, err := n.arbiter.Txn(ctx, arbiter.TxnRequest{
			Nonce: n.nonce(), Compares: []arbiter.Compare{{Key: key, Field: "revision", Equal: reg.Revision}},
			Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: key, Body: body}}},
		})
		if err != nil {
			return err
		}
		if res.Succeeded {
			return nil
		}
	}
	return fmt.Errorf("%s is changed by many at once; try again", key)
}
