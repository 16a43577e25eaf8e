package peers

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
)

// TLS is libp2p's TLS, the same on the wire, with a certificate that is valid at any time. libp2p's own begins an hour before the clock
// of who makes it, and who checks it goes by another machine's clock: one that boots in 1970, or was set back by hours, would refuse everybody.
// The certificate proves nothing but the key of the peer; whether that is a member is said elsewhere, and never by a date.
type TLS struct {
	self     peer.ID
	identity *libp2ptls.Identity
	muxers   []string
}

var _ sec.SecureTransport = (*TLS)(nil)

// Every clock stands between these, whatever was set.
var (
	alwaysFrom  = time.Date(1950, 1, 1, 0, 0, 0, 0, time.UTC)
	alwaysUntil = time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)
)

// NewTLS makes it for a key. Without muxers none is offered.
func NewTLS(key crypto.PrivKey, muxers []upgrader.StreamMuxer) (*TLS, error) {
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	var numbers [2]*big.Int
	for i := range numbers {
		if numbers[i], err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
			return nil, fmt.Errorf("tls: draw a serial number: %w", err)
		}
	}
	identity, err := libp2ptls.NewIdentity(key, libp2ptls.WithCertTemplate(&x509.Certificate{
		SerialNumber: numbers[0], Subject: pkix.Name{SerialNumber: numbers[1].String()}, NotBefore: alwaysFrom, NotAfter: alwaysUntil,
	}))
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	t := &TLS{self: self, identity: identity}
	for _, m := range muxers {
		t.muxers = append(t.muxers, string(m.ID))
	}
	return t, nil
}

// ID implements sec.SecureTransport.
func (t *TLS) ID() protocol.ID { return libp2ptls.ID }

// SecureInbound implements sec.SecureTransport. The muxer is the first of the client's that this node knows, so that none has to be agreed on
// afterwards.
func (t *TLS) SecureInbound(ctx context.Context, c net.Conn, p peer.ID) (sec.SecureConn, error) {
	config, key := t.identity.ConfigForPeer(p)
	config.GetConfigForClient = func(info *tls.ClientHelloInfo) (*tls.Config, error) {
		for _, proto := range info.SupportedProtos {
			for _, m := range t.muxers {
				if m == proto {
					config.NextProtos = []string{proto}
					return config, nil
				}
			}
		}
		return config, nil
	}
	config.NextProtos = append(append([]string{}, t.muxers...), config.NextProtos...)
	return t.secure(ctx, tls.Server(c, config), key)
}

// SecureOutbound implements sec.SecureTransport. Whether the other side takes this node's certificate shows with the first read.
func (t *TLS) SecureOutbound(ctx context.Context, c net.Conn, p peer.ID) (sec.SecureConn, error) {
	config, key := t.identity.ConfigForPeer(p)
	config.NextProtos = append(append([]string{}, t.muxers...), config.NextProtos...)
	return t.secure(ctx, tls.Client(c, config), key)
}

func (t *TLS) secure(ctx context.Context, c *tls.Conn, key <-chan crypto.PubKey) (sec.SecureConn, error) {
	s, err := t.handshake(ctx, c, key)
	if err != nil {
		return nil, errors.Join(err, c.NetConn().Close())
	}
	return s, nil
}

func (t *TLS) handshake(ctx context.Context, c *tls.Conn, key <-chan crypto.PubKey) (sec.SecureConn, error) {
	if err := c.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	var remote crypto.PubKey
	select {
	case remote = <-key: // the handshake has sent it
	default:
	}
	if remote == nil {
		return nil, errors.New("tls: the peer has shown no key")
	}
	id, err := peer.IDFromPublicKey(remote)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	s := &tlsConn{Conn: c, self: t.self, remote: id, key: remote}
	if proto := c.ConnectionState().NegotiatedProtocol; proto != "libp2p" { // else: the other side does not know early muxers
		s.state = network.ConnectionState{StreamMultiplexer: protocol.ID(proto), UsedEarlyMuxerNegotiation: proto != ""}
	}
	return s, nil
}

// tlsConn implements sec.SecureConn.
type tlsConn struct {
	*tls.Conn
	self, remote peer.ID
	key          crypto.PubKey
	state        network.ConnectionState
}

func (c *tlsConn) LocalPeer() peer.ID                 { return c.self }
func (c *tlsConn) RemotePeer() peer.ID                { return c.remote }
func (c *tlsConn) RemotePublicKey() crypto.PubKey     { return c.key }
func (c *tlsConn) ConnState() network.ConnectionState { return c.state }
