package dht

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// SayHello presents a certificate to a connected member, which then treats the caller as what the certificate says. An error wraps a
// *Refusal when the other side said no.
func SayHello(ctx context.Context, h host.Host, to peer.ID, cluster string, certificate, info []byte) error {
	_, err := sayHello(ctx, h, to, &wirev1.Hello{Cluster: cluster, Certificate: certificate, Info: info})
	return err
}

func sayHello(ctx context.Context, h host.Host, to peer.ID, m *wirev1.Hello) (*wirev1.Hello, error) {
	var reply wirev1.Hello
	if err := exchange(ctx, h, to, HelloProtocol, m, maxRequest, &reply); err != nil {
		return nil, fmt.Errorf("hello to %s: %w", to, err)
	}
	if reply.Refusal != nil {
		return nil, fmt.Errorf("hello to %s: %w", to, refusalFrom(reply.Refusal, to))
	}
	return &reply, nil
}

// GreetEveryone says hello on each connection that the host dials from now on, and on those it has: an outside program calls it once
// after joining and then uses kad-dht as it likes. Refusals go to onRefused (nil: dropped). stop ends it.
func GreetEveryone(h host.Host, cluster string, certificate []byte, onRefused func(error)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	greet := func(c network.Conn) {
		go func() {
			hctx, done := context.WithTimeout(ctx, greetWait)
			defer done()
			err := SayHello(hctx, h, c.RemotePeer(), cluster, certificate, nil)
			if err != nil && onRefused != nil && ctx.Err() == nil {
				onRefused(err)
			}
		}()
	}
	b := &network.NotifyBundle{ConnectedF: func(_ network.Network, c network.Conn) {
		if c.Stat().Direction == network.DirOutbound {
			greet(c)
		}
	}}
	h.Network().Notify(b)
	for _, c := range h.Network().Conns() {
		greet(c)
	}
	return func() {
		cancel()
		h.Network().StopNotify(b)
	}
}

// hello is this node's own, or nil while it is no member.
func (d *door) hello() *wirev1.Hello {
	if d.cfg.Certificate == nil {
		return nil
	}
	cert := d.cfg.Certificate()
	if len(cert) == 0 {
		return nil
	}
	m := &wirev1.Hello{Cluster: d.cfg.Cluster, Certificate: cert}
	if d.cfg.Info != nil {
		m.Info = d.cfg.Info()
	}
	return m
}

// greet says hello to a peer and takes its hello in return.
func (d *door) greet(to peer.ID) {
	m := d.hello()
	if m == nil || !d.begin() {
		return
	}
	go func() {
		defer d.wg.Done()
		ctx, cancel := context.WithTimeout(d.ctx, greetWait)
		defer cancel()
		reply, err := sayHello(ctx, d.h, to, m)
		if err == nil && len(reply.Certificate) > 0 {
			err = d.certify(to, reply)
		}
		var r *Refusal
		switch {
		case err == nil || d.ctx.Err() != nil:
		case errors.As(err, &r):
			if d.sayOnce(to, r.Reason) {
				d.log.Warn("a peer does not accept this node", "peer", to, "err", err)
			}
		default:
			d.log.Debug("hello failed", "peer", to, "err", err)
		}
	}()
}

// handleHello serves one hello.
func (d *door) handleHello(from peer.ID, s peers.Stream) {
	if err := s.SetDeadline(time.Now().Add(readWait)); err != nil {
		d.log.Debug("hello: deadline", "peer", from, "err", err)
	}
	var m wirev1.Hello
	err := readMessage(s, maxRequest, &m)
	if err != nil {
		err = &Refusal{Reason: BadRequest, Message: err.Error()}
	} else {
		err = d.certify(from, &m)
	}
	reply := d.hello()
	if reply == nil {
		reply = &wirev1.Hello{Cluster: d.cfg.Cluster}
	}
	if err != nil {
		r := asRefusal(err, BadCertificate)
		reply = &wirev1.Hello{Cluster: d.cfg.Cluster, Refusal: r.wire()}
		if d.sayOnce(from, r.Reason) {
			d.log.Warn("refused a hello", "peer", from, "reason", r.Reason.String(), "detail", r.Message)
		}
	}
	if err := errors.Join(writeMessage(s, reply), s.Close()); err != nil {
		d.log.Debug("hello: answer", "peer", from, "err", err)
	}
}

// certify makes a peer known by its certificate. One that is a member already needs none.
func (d *door) certify(from peer.ID, m *wirev1.Hello) error {
	if m.Cluster != d.cfg.Cluster {
		return &Refusal{Reason: ForeignCluster, Message: fmt.Sprintf("you are of cluster %q, this is %q", m.Cluster, d.cfg.Cluster)}
	}
	if d.cfg.Member(from) {
		return nil
	}
	if len(m.Info) > maxInfo {
		return &Refusal{Reason: BadRequest, Message: fmt.Sprintf("%d bytes of information, at most %d", len(m.Info), maxInfo)}
	}
	c, err := VerifyCertificate(m.Certificate, d.cfg.Cluster, from, d.cfg.Signer)
	if err != nil {
		return &Refusal{Reason: BadCertificate, Message: err.Error()}
	}
	if d.cfg.OnCertified != nil {
		if err := d.cfg.OnCertified(c, m.Info); err != nil {
			return asRefusal(err, BadCertificate)
		}
	}
	if c.Client {
		d.addClient(from)
	}
	return nil
}
