package dht

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
)

// Protocols open to strangers.
const (
	JoinProtocol  protocol.ID = "/coppice/join/1"
	HelloProtocol protocol.ID = "/coppice/hello/1"
)

// Limits of the join and hello protocols.
const (
	maxRequest  = 64 << 10 // a request, with the newcomer's information in it
	maxInfo     = 32 << 10
	maxWelcome  = 16 << 20 // the member list of 10,000 nodes takes 2 MB
	maxJoins    = 8        // joins served at a time
	readWait    = 2 * time.Second
	admitWait   = 15 * time.Second // for the admission's commit
	answerWait  = 5 * time.Second  // for writing the answer
	joinDial    = 5 * time.Second
	joinAnswer  = admitWait + answerWait
	greetWait   = 2 * time.Second
	maxAdmitted = maxWelcome - 1<<20
)

// JoinRequest is what a newcomer asks for. Its identity is authenticated and its proof checked.
type JoinRequest struct {
	ID     peer.ID
	Secret [16]byte // SecretKey gives the name of its register
	// Info is the newcomer's own account of itself; the join protocol does not look into it. Proof is its signature over it.
	Info, Proof []byte
	// Client asks for a certificate that opens kad-dht's lookups only.
	Client bool
	// From is where it connects from.
	From ma.Multiaddr
}

// Welcome is the answer to an admitted newcomer.
type Welcome struct {
	Cluster     string
	Certificate []byte    // see SignCertificate
	Members     [][]byte  // opaque: what the newcomer starts its view with
	Arbiters    []peer.ID // voters, as hints
	// Observed is the address the newcomer was seen from, By the node that admitted it; both are set by the protocol.
	Observed ma.Multiaddr
	By       peer.ID
}

// Reason says why a join or a hello was refused.
type Reason uint8

// The reasons. Only Unavailable may pass by itself.
const (
	Unavailable Reason = iota
	Expired
	ForeignCluster
	UsedUp
	Revoked
	UnknownToken
	BadRequest
	BadCertificate
)

var reasonWords = [...]string{
	"not possible now", "the token has expired", "it is another cluster's", "the token is used up", "it was revoked",
	"the token is not known in this cluster", "the request was not understood", "the certificate does not prove membership",
}

var reasonTry = [...]string{
	"try again, or name another node", "try: coppice token (on a member) for a new one", "try: coppice token on a node of the cluster that you mean",
	"try: coppice token --uses N (on a member)", "ask who runs the cluster", "try: coppice token (on a member) for a new one",
	"are both sides of the same version?", "try: join again with a new token",
}

// String returns the reason in words.
func (r Reason) String() string {
	if int(r) < len(reasonWords) {
		return reasonWords[r]
	}
	return reasonWords[Unavailable]
}

// Refusal is a no of the other side, or, returned by Admit and OnCertified, to the other side. Admit's other errors are told as
// Unavailable.
type Refusal struct {
	Reason  Reason
	Message string  // details; may be empty
	By      peer.ID // who refused; set where the refusal arrives
}

func (r *Refusal) Error() string {
	s := r.Reason.String()
	if r.Message != "" {
		s += ": " + r.Message
	}
	if int(r.Reason) < len(reasonTry) {
		s += "; " + reasonTry[r.Reason]
	}
	return s
}

// final reports whether asking another node is useless.
func (r *Refusal) final() bool { return r.Reason != Unavailable }

func (r *Refusal) wire() *wirev1.Refusal {
	return &wirev1.Refusal{Reason: wirev1.Refusal_Reason(r.Reason), Message: r.Message}
}

func refusalFrom(m *wirev1.Refusal, by peer.ID) *Refusal {
	r := &Refusal{Message: m.Message, By: by}
	if m.Reason > 0 && int(m.Reason) < len(reasonWords) {
		r.Reason = Reason(m.Reason)
	}
	return r
}

// asRefusal makes any error one that can be told to the other side.
func asRefusal(err error, reason Reason) *Refusal {
	var r *Refusal
	if errors.As(err, &r) {
		return r
	}
	return &Refusal{Reason: reason, Message: err.Error()}
}

func readMessage(s peers.Stream, limit int64, m proto.Message) error {
	return protodelim.UnmarshalOptions{MaxSize: limit}.UnmarshalFrom(bufio.NewReader(s), m)
}

func writeMessage(s peers.Stream, m proto.Message) error {
	var b bytes.Buffer
	if _, err := protodelim.MarshalTo(&b, m); err != nil {
		return err
	}
	_, err := s.Write(b.Bytes())
	return err
}

// handleJoin serves one newcomer.
func (d *door) handleJoin(from peer.ID, s peers.Stream) {
	defer d.joining(from)()
	var at ma.Multiaddr
	if ns, ok := s.(network.Stream); ok {
		at = ns.Conn().RemoteMultiaddr()
	}
	req, err := d.readJoin(from, s)
	var w Welcome
	if err == nil {
		req.From = at
		w, err = d.admit(req)
	}
	reply := &wirev1.JoinReply{}
	if err != nil {
		r := asRefusal(err, Unavailable)
		reply.Reply = &wirev1.JoinReply_Refusal{Refusal: r.wire()}
		if d.sayOnce(from, r.Reason) {
			d.log.Warn("refused a join", "peer", from, "addr", at, "reason", r.Reason.String(), "detail", r.Message)
		}
	} else {
		reply.Reply = &wirev1.JoinReply_Welcome{Welcome: w.wire(at)}
	}
	if err := s.SetWriteDeadline(time.Now().Add(answerWait)); err != nil {
		d.log.Debug("join: deadline", "peer", from, "err", err)
	}
	if err := errors.Join(writeMessage(s, reply), s.Close()); err != nil {
		d.log.Warn("join: the answer did not get through; the newcomer will ask again", "peer", from, "err", err)
	}
}

func (d *door) readJoin(from peer.ID, s peers.Stream) (JoinRequest, error) {
	if err := s.SetReadDeadline(time.Now().Add(readWait)); err != nil {
		d.log.Debug("join: deadline", "peer", from, "err", err)
	}
	var m wirev1.JoinRequest
	if err := readMessage(s, maxRequest, &m); err != nil {
		return JoinRequest{}, &Refusal{Reason: BadRequest, Message: err.Error()}
	}
	return checkJoin(d.cfg.Cluster, from, &m)
}

// checkJoin is all that can be said of a request without the arbiter.
func checkJoin(cluster string, from peer.ID, m *wirev1.JoinRequest) (JoinRequest, error) {
	req := JoinRequest{ID: from, Info: m.Info, Proof: m.Proof, Client: m.Client}
	switch {
	case m.Cluster != cluster:
		return req, &Refusal{Reason: ForeignCluster, Message: fmt.Sprintf("the token is of cluster %q, this is %q", m.Cluster, cluster)}
	case len(m.Secret) != len(req.Secret):
		return req, &Refusal{Reason: BadRequest, Message: fmt.Sprintf("the secret has %d bytes, not %d", len(m.Secret), len(req.Secret))}
	case len(m.Info) > maxInfo:
		return req, &Refusal{Reason: BadRequest, Message: fmt.Sprintf("%d bytes of information, at most %d", len(m.Info), maxInfo)}
	}
	copy(req.Secret[:], m.Secret)
	if err := VerifyProof(m.Proof, cluster, from, m.Info, m.Client); err != nil {
		return req, &Refusal{Reason: BadRequest, Message: err.Error()}
	}
	return req, nil
}

func (d *door) admit(req JoinRequest) (Welcome, error) {
	select {
	case d.slots <- struct{}{}:
		defer func() { <-d.slots }()
	default:
		return Welcome{}, &Refusal{Message: "too many newcomers at once"}
	}
	if d.cfg.Admit == nil {
		return Welcome{}, &Refusal{Message: "this node admits nobody"}
	}
	ctx, cancel := context.WithTimeout(d.ctx, admitWait)
	defer cancel()
	w, err := d.cfg.Admit(ctx, req)
	if err != nil {
		return w, err
	}
	w.Cluster = d.cfg.Cluster
	if n := proto.Size(w.wire(nil)); n > maxAdmitted {
		return w, fmt.Errorf("the welcome has %d bytes, at most %d", n, maxAdmitted)
	}
	d.log.Info("admitted a newcomer", "peer", req.ID, "addr", req.From, "client", req.Client)
	return w, nil
}

func (w Welcome) wire(observed ma.Multiaddr) *wirev1.Welcome {
	m := &wirev1.Welcome{Cluster: w.Cluster, Certificate: w.Certificate, Members: w.Members}
	for _, id := range w.Arbiters {
		m.Arbiters = append(m.Arbiters, id.String())
	}
	if observed != nil {
		m.Observed = observed.String()
	}
	return m
}

func welcomeFrom(m *wirev1.Welcome, by peer.ID) (Welcome, error) {
	w := Welcome{Cluster: m.Cluster, Certificate: m.Certificate, Members: m.Members, By: by}
	for _, s := range m.Arbiters {
		id, err := peer.Decode(s)
		if err != nil {
			return w, fmt.Errorf("arbiter %q: %w", s, err)
		}
		w.Arbiters = append(w.Arbiters, id)
	}
	if m.Observed != "" {
		a, err := ma.NewMultiaddr(m.Observed)
		if err != nil {
			return w, fmt.Errorf("observed address %q: %w", m.Observed, err)
		}
		w.Observed = a
	}
	return w, nil
}

// JoinCluster asks the members that the token names, one after the other, until one answers. The key is the host's. An outside program
// may use it on a host of its own with client set; a node uses DHT.Join. A *Refusal in the error's chain says why it was refused;
// otherwise nobody could be asked.
//
// The admission may have been committed although the answer was lost: asking again with the same key is safe, also with a token that is
// used up by it.
func JoinCluster(ctx context.Context, h host.Host, token Token, info []byte, client bool) (Welcome, error) {
	targets, err := token.peers()
	if err != nil {
		return Welcome{}, fmt.Errorf("%w: %w", ErrBadToken, err)
	}
	proof, err := signProof(token.ClusterID, info, client, h.Peerstore().PrivKey(h.ID()))
	if err != nil {
		return Welcome{}, fmt.Errorf("join: %w", err)
	}
	req := &wirev1.JoinRequest{Cluster: token.ClusterID, Secret: token.Secret[:], Info: info, Proof: proof, Client: client}
	var failed []error
	for _, t := range targets {
		if t.ID == h.ID() {
			failed = append(failed, errors.New("the token names this node itself"))
			continue
		}
		w, err := joinAt(ctx, h, t, req)
		if err == nil {
			return w, nil
		}
		failed = append(failed, err)
		var r *Refusal
		if errors.As(err, &r) && r.final() || ctx.Err() != nil {
			break
		}
	}
	return Welcome{}, fmt.Errorf("join cluster %s: %w", token.ClusterID, errors.Join(failed...))
}

func joinAt(ctx context.Context, h host.Host, t peer.AddrInfo, req *wirev1.JoinRequest) (Welcome, error) {
	where := fmt.Sprintf("%s at %s", t.ID, addrList(t.Addrs))
	dctx, cancel := context.WithTimeout(network.WithForceDirectDial(ctx, "join"), joinDial)
	defer cancel()
	if err := h.Connect(dctx, t); err != nil {
		return Welcome{}, fmt.Errorf("cannot reach %s: %w; is that node up, and is its port open?", where, err)
	}
	actx, cancel := context.WithTimeout(ctx, joinAnswer)
	defer cancel()
	var reply wirev1.JoinReply
	if err := exchange(actx, h, t.ID, JoinProtocol, req, maxWelcome, &reply); err != nil {
		return Welcome{}, fmt.Errorf("%s gave no answer, which counts as a refusal: %w; is it a node of this cluster and of this version? "+
			"try again with a new token of another node", where, err)
	}
	switch r := reply.Reply.(type) {
	case *wirev1.JoinReply_Refusal:
		return Welcome{}, fmt.Errorf("%s refused: %w", where, refusalFrom(r.Refusal, t.ID))
	case *wirev1.JoinReply_Welcome:
		w, err := welcomeFrom(r.Welcome, t.ID)
		if err == nil {
			_, err = VerifyCertificate(w.Certificate, req.Cluster, h.ID(), func(peer.ID) bool { return true })
		}
		if err == nil && w.Cluster != req.Cluster {
			err = fmt.Errorf("it is of cluster %q", w.Cluster)
		}
		if err != nil {
			return Welcome{}, fmt.Errorf("%s sent an unusable welcome: %w", where, err)
		}
		return w, nil
	}
	return Welcome{}, fmt.Errorf("%s sent an empty answer; is it of the same version?", where)
}

// exchange sends one message on a new stream of an existing connection and reads one back.
func exchange(ctx context.Context, h host.Host, to peer.ID, p protocol.ID, req proto.Message, limit int64, resp proto.Message) error {
	s, err := h.NewStream(network.WithNoDial(ctx, "connected"), to, p)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { abandon(s) })
	defer func() {
		if stop() {
			abandon(s) // both messages are through, or it failed
		}
	}()
	if err := errors.Join(writeMessage(s, req), s.CloseWrite()); err != nil {
		return err
	}
	if err := readMessage(s, limit, resp); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%w (%w)", ctx.Err(), err)
		}
		return err
	}
	return nil
}

// abandon ends a stream that nothing more is expected of. A failed reset changes nothing: the stream is as dead as it can be.
func abandon(s peers.Stream) {
	_ = s.Reset() //nolint:errcheck // see above
}

func addrList(addrs []ma.Multiaddr) string {
	out := make([]string, len(addrs))
	for i, a := range addrs {
		out[i] = a.String()
	}
	return strings.Join(out, ", ")
}
