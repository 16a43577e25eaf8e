package dht

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/libp2p/go-libp2p/core/peer"
	ma "github.com/multiformats/go-multiaddr"
	"google.golang.org/protobuf/proto"
)

// Token admits newcomers. Whoever holds it may join until it expires, is used up or is revoked; the arbiter's register decides, the
// token only carries what is needed to ask.
type Token struct {
	// ClusterID names the cluster.
	ClusterID string
	// Addrs are where members are dialled: multiaddrs that end in /p2p/<peer id>, so that nobody else can answer in their place.
	Addrs []string
	// Secret is what admits.
	Secret [16]byte
	// Expires is for people (milliseconds kept); the admitting side goes by its own register.
	Expires time.Time
}

const (
	tokenPrefix   = "coppice1."
	tokenMaxText  = 8192
	tokenMaxAddrs = 32
	tokenCheck    = 4 // bytes of SHA-256 before the message
)

// ErrBadToken is wrapped by all errors of DecodeToken.
var ErrBadToken = errors.New("not a valid join token")

var clusterID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckClusterID reports what is wrong with a cluster id: 1 to 64 letters, digits, dots, dashes and underscores. It becomes part of
// protocol names.
func CheckClusterID(id string) error {
	if !clusterID.MatchString(id) {
		return fmt.Errorf("cluster id %q: want 1 to 64 letters, digits, '.', '_' or '-'", id)
	}
	return nil
}

// NewSecret returns a random token secret.
func NewSecret() (s [16]byte, err error) {
	if _, err := rand.Read(s[:]); err != nil {
		return s, fmt.Errorf("make a token: %w", err)
	}
	return s, nil
}

// SecretKey is the name under which a token is registered, "token/<hex of SHA-256(secret)>": whoever reads the register cannot join.
func SecretKey(secret [16]byte) string {
	h := sha256.Sum256(secret[:])
	return "token/" + hex.EncodeToString(h[:])
}

// Encode returns the token as one line of text.
func (t Token) Encode() (string, error) {
	if err := t.check(); err != nil {
		return "", err
	}
	m, err := proto.MarshalOptions{Deterministic: true}.Marshal(&wirev1.Token{
		Cluster: t.ClusterID, Addrs: t.Addrs, Secret: t.Secret[:], ExpiresUnixMs: t.Expires.UnixMilli(),
	})
	if err != nil {
		return "", fmt.Errorf("encode token: %w", err)
	}
	sum := sha256.Sum256(m)
	text := tokenPrefix + base64.RawURLEncoding.EncodeToString(append(sum[:tokenCheck], m...))
	if len(text) > tokenMaxText {
		return "", fmt.Errorf("encode token: %d characters, at most %d: fewer addresses", len(text), tokenMaxText)
	}
	return text, nil
}

// DecodeToken reads a token's text, white space round and inside it ignored (mail and terminals break lines).
func DecodeToken(text string) (Token, error) {
	bad := func(format string, args ...any) (Token, error) {
		return Token{}, fmt.Errorf("%w: %w", ErrBadToken, fmt.Errorf(format, args...))
	}
	if len(text) > 2*tokenMaxText {
		return bad("%d characters long", len(text))
	}
	text = strings.Join(strings.Fields(text), "")
	if text == "" {
		return bad("it is empty; `coppice token` on any node prints one")
	}
	body, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok {
		if rest, found := strings.CutPrefix(text, "coppice"); found && rest != "" && rest[0] >= '2' && rest[0] <= '9' {
			return bad("it is of a newer version; upgrade this node")
		}
		return bad("it does not start with %q; `coppice token` on any node prints one", tokenPrefix)
	}
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(body, "="))
	if err != nil {
		return bad("damaged text (%w); copy the whole line", err)
	}
	if len(raw) < tokenCheck {
		return bad("cut short; copy the whole line")
	}
	sum := sha256.Sum256(raw[tokenCheck:])
	if !bytes.Equal(sum[:tokenCheck], raw[:tokenCheck]) {
		return bad("its checksum does not match: characters are missing or changed; copy the whole line")
	}
	var m wirev1.Token
	if err := proto.Unmarshal(raw[tokenCheck:], &m); err != nil {
		return bad("unreadable: %w", err)
	}
	t := Token{ClusterID: m.Cluster, Addrs: m.Addrs, Expires: time.UnixMilli(m.ExpiresUnixMs)}
	if copy(t.Secret[:], m.Secret) != len(t.Secret) || len(m.Secret) != len(t.Secret) {
		return bad("its secret has %d bytes, not %d", len(m.Secret), len(t.Secret))
	}
	if err := t.check(); err != nil {
		return bad("%w", err)
	}
	return t, nil
}

func (t Token) check() error {
	if err := CheckClusterID(t.ClusterID); err != nil {
		return err
	}
	_, err := t.peers()
	return err
}

// peers groups the addresses by peer, in the order of the token.
func (t Token) peers() ([]peer.AddrInfo, error) {
	if len(t.Addrs) == 0 || len(t.Addrs) > tokenMaxAddrs {
		return nil, fmt.Errorf("it names %d addresses, want 1 to %d", len(t.Addrs), tokenMaxAddrs)
	}
	var out []peer.AddrInfo
	at := map[peer.ID]int{}
	for _, s := range t.Addrs {
		a, err := ma.NewMultiaddr(s)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w", s, err)
		}
		info, err := peer.AddrInfoFromP2pAddr(a)
		if err != nil {
			return nil, fmt.Errorf("address %q: %w", s, err)
		}
		if len(info.Addrs) == 0 {
			return nil, fmt.Errorf("address %q: only a peer id", s)
		}
		if i, ok := at[info.ID]; ok {
			out[i].Addrs = append(out[i].Addrs, info.Addrs...)
			continue
		}
		at[info.ID] = len(out)
		out = append(out, *info)
	}
	return out, nil
}
