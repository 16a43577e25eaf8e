package dht

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	ma "github.com/multiformats/go-multiaddr"
)

// Answers says at which of some addresses a living process proves, by its key, to be id; nil: at none before ctx ended. The one who asks is a stranger
// there: it shows another key. With that a node finds out that somebody else goes by its own identity.
func Answers(ctx context.Context, id peer.ID, addrs []ma.Multiaddr) (at ma.Multiaddr, err error) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("ask who answers: %w", err)
	}
	h, err := newHost(&Config{Identity: key, Profile: ProfileLAN}, &advertiser{}, newTraffic())
	if err != nil {
		return nil, fmt.Errorf("ask who answers: %w", err)
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	h.Peerstore().AddAddrs(id, addrs, peerstore.TempAddrTTL)
	conn, err := h.Network().DialPeer(ctx, id)
	if err != nil {
		return nil, nil //nolint:nilerr // nobody does, which is the usual answer
	}
	return conn.RemoteMultiaddr(), nil
}
