package dht

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
	ds "github.com/ipfs/go-datastore"
	record "github.com/libp2p/go-libp2p-record"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
)

// Config is all that a DHT needs. Functions are called from many goroutines, also before New returns (except Admit and OnCertified),
// and must not block unless it says so.
type Config struct {
	// Cluster is the cluster's id (see CheckClusterID); a newcomer has it from its token.
	Cluster string
	// Identity is the node's key; see LoadIdentity.
	Identity crypto.PrivKey
	// Profile is lan (the default), wan or local.
	Profile string
	// Listen holds multiaddrs; empty: the profile's default. Advertise holds what others are told instead of the addresses listened on:
	// host, host:port or multiaddr.
	Listen, Advertise []string
	// NewHost builds the host, which must not listen yet; for simulations. nil: one over TCP.
	NewHost func(HostParams) (host.Host, error)

	// Datastore keeps kad-dht's records; Validator judges the records of namespace "kb".
	Datastore ds.Batching
	Validator record.Validator
	// AcceptPut, when set, has a say on each record that kad-dht's own PUT_VALUE brings, before the validator. nil: valid ones are taken.
	AcceptPut func(from peer.ID, key string, value []byte) bool
	// RPCTimeout bounds one kad-dht request on a warm connection. 0: 300 ms, wan 1.5 s.
	RPCTimeout time.Duration
	// RefreshPeriod is how often kad-dht refreshes its routing table by lookups. 0: never; right while Members names all members.
	RefreshPeriod time.Duration

	// Member says who is a member, Alive which members may be asked (nil: all), Members which ones are alive now (nil: unknown), Addrs
	// where a member is dialled (nil: only what libp2p learnt).
	Member  func(peer.ID) bool
	Alive   func(peer.ID) bool
	Members func() []peer.ID
	Addrs   func(peer.ID) []ma.Multiaddr
	// Signer says whose signature on a certificate counts. nil: Member.
	Signer func(peer.ID) bool

	// Certificate returns the node's own, empty while it is no member; Info the information it hands to peers with it.
	Certificate func() []byte
	Info        func() []byte
	// Admit commits the admission of a newcomer whose token it finds valid; it may block until ctx ends (15 s). A *Refusal is told to
	// the newcomer as it is; other errors as "not now". Admit must be idempotent in (ID, Secret): a newcomer whose answer was lost asks
	// again. nil: this node admits nobody.
	Admit func(ctx context.Context, req JoinRequest) (Welcome, error)
	// OnCertified admits a peer to the view that showed a verified certificate, with its own account of itself. It is where revocations
	// are checked; an error refuses. For a certificate with Client set it only agrees: a client enters no view. It may block for a moment.
	OnCertified func(c Certificate, info []byte) error

	Log *slog.Logger // nil: slog.Default()
}

// DHT is a node's place in the overlay: the host, its connections to members, kad-dht, and the door.
type DHT struct {
	cfg     Config
	listen  []ma.Multiaddr
	adv     *advertiser
	h       host.Host
	peers   *peers.Libp2p
	door    *door
	kad     *Kad
	traffic *traffic
}

func (cfg *Config) check() (listen []ma.Multiaddr, err error) {
	if err := CheckClusterID(cfg.Cluster); err != nil {
		return nil, err
	}
	switch {
	case cfg.Identity == nil:
		return nil, errors.New("no identity")
	case cfg.Datastore == nil:
		return nil, errors.New("no datastore")
	case cfg.Validator == nil:
		return nil, errors.New("no validator of records")
	case cfg.Member == nil:
		return nil, errors.New("no function that tells members")
	}
	if cfg.Profile == "" {
		cfg.Profile = ProfileLAN
	}
	t, ok := timings[cfg.Profile]
	if !ok {
		return nil, fmt.Errorf("profile %q: want lan, wan or local", cfg.Profile)
	}
	if cfg.RPCTimeout <= 0 {
		cfg.RPCTimeout = t.rpc
	}
	if cfg.Alive == nil {
		cfg.Alive = func(peer.ID) bool { return true }
	}
	if cfg.Addrs == nil {
		cfg.Addrs = func(peer.ID) []ma.Multiaddr { return nil }
	}
	if cfg.Signer == nil {
		cfg.Signer = cfg.Member
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	for _, a := range cfg.Advertise {
		if _, err := parseAdvertise(a, DefaultPort); err != nil {
			return nil, err
		}
	}
	addrs := cfg.Listen
	if len(addrs) == 0 {
		addrs = defaultListen(cfg.Profile)
	}
	return ParseAddrs(addrs)
}

// New builds a DHT that neither listens nor dials yet, so that whoever uses its Peers can register handlers first; Start opens it.
func New(cfg Config) (*DHT, error) {
	listen, err := cfg.check()
	if err != nil {
		return nil, fmt.Errorf("dht: %w", err)
	}
	d := &DHT{cfg: cfg, listen: listen, adv: &advertiser{fixed: cfg.Advertise}, traffic: newTraffic()}
	d.h, err = newHost(&d.cfg, d.adv, d.traffic)
	if err != nil {
		return nil, fmt.Errorf("dht: %w", err)
	}
	d.peers = peers.NewLibp2p(d.h, d.cfg.Member, d.cfg.Addrs, d.cfg.Log)
	d.door = newDoor(&d.cfg, d.h, d.peers)
	d.kad, err = newKad(&d.cfg, d.h, d.peers, d.door)
	if err != nil {
		d.door.close()
		return nil, fmt.Errorf("dht: %w", errors.Join(err, d.h.Close()))
	}
	return d, nil
}

// Start opens the ports. It is called once.
func (d *DHT) Start() error {
	if err := listen(d.h, d.listen, len(d.cfg.Listen) > 0); err != nil {
		return fmt.Errorf("dht: %w", err)
	}
	return nil
}

// Close ends everything: connections are closed, which the peers see at once. The datastore may be closed after it.
func (d *DHT) Close() error {
	d.door.close()
	err := d.kad.close()
	d.peers.Close()
	if err = errors.Join(err, d.h.Close()); err != nil {
		return fmt.Errorf("close dht: %w", err)
	}
	return nil
}

// ID returns the node's identity.
func (d *DHT) ID() peer.ID { return d.h.ID() }

// Host returns the libp2p host.
func (d *DHT) Host() host.Host { return d.h }

// Traffic tells what each protocol has moved since the node started, most sent first.
func (d *DHT) Traffic() []Traffic { return d.traffic.list() }

// Peers returns the node's connections to members: peers.Peers and peers.Links.
func (d *DHT) Peers() *peers.Libp2p { return d.peers }

// Kad returns the node's part of kad-dht.
func (d *DHT) Kad() *Kad { return d.kad }

// Addrs returns the addresses that others are told, as multiaddrs without /p2p; empty before Start.
func (d *DHT) Addrs() []string {
	var out []string
	for _, a := range d.h.Addrs() {
		out = append(out, a.String())
	}
	return out
}

// Token makes a join token that leads to this node.
func (d *DHT) Token(secret [16]byte, expires time.Time) Token {
	t := Token{ClusterID: d.cfg.Cluster, Secret: secret, Expires: expires}
	for _, a := range d.Addrs() {
		t.Addrs = append(t.Addrs, a+"/p2p/"+d.ID().String())
		if len(t.Addrs) == tokenMaxAddrs {
			break
		}
	}
	return t
}

// Join asks to be admitted as a node; see JoinCluster. It notes where the other side saw this node come from, which Addrs then tells.
// The caller starts its view from the welcome, makes Certificate return the welcome's, and then calls Greet.
func (d *DHT) Join(ctx context.Context, token Token, info []byte) (Welcome, error) {
	if token.ClusterID != d.cfg.Cluster {
		return Welcome{}, fmt.Errorf("join: %w", &Refusal{
			Reason: ForeignCluster, Message: fmt.Sprintf("the token is of cluster %q, this node is of %q", token.ClusterID, d.cfg.Cluster), By: d.ID(),
		})
	}
	w, err := JoinCluster(ctx, d.h, token, info, false)
	if err != nil {
		return w, err
	}
	d.adv.observe(w.Observed)
	return w, nil
}

// Greet says hello on all connections there are: the certificate is new. On later ones it is said by itself.
func (d *DHT) Greet() {
	for _, id := range d.h.Network().Peers() {
		d.door.greet(id)
	}
}

// Certify signs, as this member, what the arbiter committed about another (or about this node itself).
func (d *DHT) Certify(c Certificate) ([]byte, error) {
	c.Cluster = d.cfg.Cluster
	return SignCertificate(c, d.cfg.Identity)
}

// Expel drops a peer whose revocation was committed, after the view stopped counting it as a member: its connections are closed and
// the routing table forgets it.
func (d *DHT) Expel(id peer.ID) error {
	d.kad.Evict(id)
	if d.h.Network().Connectedness(id) == network.NotConnected {
		return nil
	}
	return d.peers.Disconnect(id)
}
