package dht

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"
)

const somePeer = "12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5"

func someToken() Token {
	return Token{
		ClusterID: "grove-1", Addrs: []string{"/ip4/192.0.2.1/tcp/7400/p2p/" + somePeer, "/dns4/n2.example/tcp/7400/p2p/" + somePeer},
		Secret: [16]byte{1, 2, 3}, Expires: time.UnixMilli(1_800_000_000_000),
	}
}

func TestTokenTextAndBack(t *testing.T) {
	want := someToken()
	text, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(text, " \n\t") || !strings.HasPrefix(text, "coppice1.") {
		t.Fatalf("not one plain line: %q", text)
	}
	for _, variant := range []string{text, "  " + text + "\n", text[:30] + "\n" + text[30:], text + "=="} {
		got, err := DecodeToken(variant)
		if err != nil {
			t.Fatal(err)
		}
		if got.ClusterID != want.ClusterID || !slices.Equal(got.Addrs, want.Addrs) || got.Secret != want.Secret || !got.Expires.Equal(want.Expires) {
			t.Fatalf("got %+v", got)
		}
	}
}

// Every damage is noticed and the message says what to do.
func TestDamagedTokens(t *testing.T) {
	text, err := someToken().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for bad, say := range map[string]string{
		"":                          "empty",
		"hello":                     "coppice token",
		"coppice2" + text[8:]:       "newer version",
		text[:len(text)-6]:          "copy the whole line",
		text[:12]:                   "copy the whole line",
		"coppice1.":                 "copy the whole line",
		"coppice1.!!!!":             "copy the whole line",
		strings.Repeat("a", 1e6):    "characters long",
		strings.ToUpper(text):       "does not start",
		text[:40] + "x" + text[40:]: "copy the whole line",
	} {
		if _, err := DecodeToken(bad); !errors.Is(err, ErrBadToken) || !strings.Contains(err.Error(), say) {
			t.Errorf("%.30q: %v", bad, err)
		}
	}
	for i := len(tokenPrefix); i < len(text); i++ {
		b := []byte(text)
		b[i] = 'A' + (b[i]-'A'+1)%26
		if string(b) == text {
			continue
		}
		if got, err := DecodeToken(string(b)); err == nil && got.Secret != someToken().Secret {
			t.Fatalf("character %d changed and nobody noticed", i)
		}
	}
	for what, change := range map[string]func(*Token){
		"no address":   func(t *Token) { t.Addrs = nil },
		"no peer id":   func(t *Token) { t.Addrs = []string{"/ip4/192.0.2.1/tcp/7400"} },
		"only peer id": func(t *Token) { t.Addrs = []string{"/p2p/" + somePeer} },
		"no cluster":   func(t *Token) { t.ClusterID = "" },
		"bad cluster":  func(t *Token) { t.ClusterID = "../x" },
		"too many":     func(t *Token) { t.Addrs = slices.Repeat(t.Addrs, 40) },
	} {
		tok := someToken()
		change(&tok)
		if text, err := tok.Encode(); err == nil {
			t.Errorf("%s: encoded as %s", what, text)
		}
	}
}

func FuzzDecodeToken(f *testing.F) {
	text, err := someToken().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add("coppice1.")
	f.Add("coppice1.AAAAAAAA")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := DecodeToken(text)
		if err != nil {
			if !errors.Is(err, ErrBadToken) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		again, err := tok.Encode() // what was accepted is well-formed
		if err != nil {
			t.Fatal(err)
		}
		if back, err := DecodeToken(again); err != nil || back.Secret != tok.Secret || back.ClusterID != tok.ClusterID {
			t.Fatalf("%v: %+v", err, back)
		}
	})
}

// Whatever a stranger sends as a request, a certificate or a welcome, it is judged without a panic.
func FuzzJoinMessages(f *testing.F) {
	key := newKey(f)
	id, err := IDOf(key)
	if err != nil {
		f.Fatal(err)
	}
	proof, err := signProof(testCluster, []byte("info"), false, key)
	if err != nil {
		f.Fatal(err)
	}
	cert, err := SignCertificate(Certificate{Cluster: testCluster, Member: id}, key)
	if err != nil {
		f.Fatal(err)
	}
	for _, m := range []proto.Message{
		&wirev1.JoinRequest{Cluster: testCluster, Secret: make([]byte, 16), Info: []byte("info"), Proof: proof},
		&wirev1.Welcome{Cluster: testCluster, Certificate: cert, Arbiters: []string{id.String()}, Observed: "/ip4/1.2.3.4/tcp/5"},
		&wirev1.Hello{Cluster: testCluster, Certificate: cert, Refusal: &wirev1.Refusal{Reason: 99}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(cert)
	f.Add(proof)
	f.Fuzz(func(t *testing.T, b []byte) {
		var req wirev1.JoinRequest
		if proto.Unmarshal(b, &req) == nil {
			if r, err := checkJoin(testCluster, id, &req); err == nil && (r.ID != id || string(r.Info) != "info" && VerifyProof(r.Proof, testCluster, id, r.Info, r.Client) != nil) {
				t.Fatalf("accepted %+v", r)
			}
		}
		var w wirev1.Welcome
		if proto.Unmarshal(b, &w) == nil {
			_, _ = welcomeFrom(&w, id)
		}
		var h wirev1.Hello
		if proto.Unmarshal(b, &h) == nil && h.Refusal != nil {
			if refusalFrom(h.Refusal, id).Error() == "" {
				t.Fatal("a refusal without words")
			}
		}
		if c, err := VerifyCertificate(b, testCluster, id, func(peer.ID) bool { return true }); err == nil && (c.Member != id || c.Cluster != testCluster) {
			t.Fatalf("accepted %+v", c)
		}
		_ = VerifyProof(b, testCluster, id, []byte("info"), false)
	})
}

func TestIdentityIsMadeOnceAndKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	k1, fresh, err := LoadIdentity(vfs.Default, dir)
	if err != nil || !fresh {
		t.Fatal(fresh, err)
	}
	k2, fresh, err := LoadIdentity(vfs.Default, dir)
	if err != nil || fresh || !k1.Equals(k2) {
		t.Fatal(fresh, err)
	}
	path := filepath.Join(dir, identityName)
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st.Mode(), err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LoadIdentity(vfs.Default, dir); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Fatalf("a key open to all: %v", err)
	}
	if err := os.WriteFile(path, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LoadIdentity(vfs.Default, dir); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Fatalf("a damaged key: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "garbage" {
		t.Fatal("the damaged key was touched")
	}
}

// A crash at any moment leaves either no identity or the one that was returned.
func TestIdentitySurvivesACrash(t *testing.T) {
	fs := vfs.NewCrashableMem()
	k, _, err := LoadIdentity(fs, "data")
	if err != nil {
		t.Fatal(err)
	}
	again, fresh, err := LoadIdentity(fs.CrashClone(vfs.CrashCloneCfg{}), "data")
	if err != nil || fresh || !k.Equals(again) {
		t.Fatalf("after the crash: fresh=%v %v", fresh, err)
	}
}
