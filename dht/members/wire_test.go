package members

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

var full = state{
	info: &Info{
		ID: "n1", Name: "one", Addrs: []string{"/ip4/10.0.0.1/tcp/7400"}, Zone: "west", Role: "full", Labels: map[string]string{"a": "b"},
		CPUMillis: 1, MemoryBytes: 2, DiskBytes: 3, Version: "v", Platform: "linux/amd64", Boot: 4, Counter: 5, StartedUnixMs: 6,
		Draining: true, NoVoter: true, NoHolder: true, MaxFormat: 7, Watchers: []peer.ID{"n2", "n3"},
		readmitted: version{6, 4, 3},
	},
	verdict: &verdict{kind: Dead, at: version{6, 4, 9}, evidence: "silent", by: []peer.ID{"n2"}, proof: true, since: time.Now()},
	unheard: true,
}

func TestWhatANodeSaysSurvivesTheWire(t *testing.T) {
	b, err := proto.Marshal(full.toWire())
	if err != nil {
		t.Fatal(err)
	}
	var w wirev1.MemberState
	if err := proto.Unmarshal(b, &w); err != nil {
		t.Fatal(err)
	}
	got, err := stateFromWire(&w)
	if err != nil {
		t.Fatal(err)
	}
	if !got.info.sameFor(*full.info) || got.info.version() != full.info.version() || !slices.Equal(got.info.Watchers, full.info.Watchers) ||
		got.info.readmitted != full.info.readmitted {
		t.Errorf("got %+v", got.info)
	}
	v := got.verdict
	if v.kind != Dead || v.at != full.verdict.at || v.evidence != "silent" || !v.proof || !slices.Equal(v.by, full.verdict.by) || !got.unheard {
		t.Errorf("got %+v", got)
	}
	if n := len(b); n > 250 {
		t.Errorf("%d bytes for one node", n)
	}
}

func TestWhatIsTooLargeIsRefusedOrClipped(t *testing.T) {
	long := strings.Repeat("x", maxText+1)
	for _, i := range []Info{
		{ID: ""},
		{ID: peer.ID(long)},
		{ID: "a", Name: long},
		{ID: "a", Addrs: []string{long}},
		{ID: "a", Labels: map[string]string{"k": long}},
		{ID: "a", Addrs: make([]string, maxAddrs+1)},
		{ID: "a", Watchers: make([]peer.ID, maxPeers+1)},
		{ID: "a", Watchers: []peer.ID{""}},
	} {
		if _, err := infoFromWire(infoToWire(i)); err == nil {
			t.Errorf("accepted %.80v", i)
		}
	}
	i := Info{ID: "a", Name: long + "\xff", Addrs: make([]string, 99), Labels: map[string]string{long: long}}
	if _, err := infoFromWire(infoToWire(sane(i))); err != nil {
		t.Errorf("clipped: %v", err)
	}
}

func TestOrderOfVersionsAndVerdicts(t *testing.T) {
	v := &verdict{kind: Dead, at: version{5, 1, 7}}
	for at, want := range map[version]bool{
		{5, 1, 7}: true, {5, 1, 6}: true, {5, 1, 8}: false, {5, 2, 1}: false, {6, 0, 0}: false, {4, 9, 9}: true,
	} {
		if v.covers(at) != want {
			t.Errorf("a verdict at %v covers %v: %v", v.at, at, !want)
		}
	}
	left := &verdict{kind: Left, at: v.at}
	if !left.newer(v) || v.newer(left) || v.newer(v) || !v.newer(nil) || (*verdict)(nil).newer(v) {
		t.Error("order of verdicts")
	}
}

func FuzzStates(f *testing.F) {
	b, err := proto.Marshal(&wirev1.ViewRequest{What: &wirev1.ViewRequest_Diff{Diff: &wirev1.ViewDiff{States: []*wirev1.MemberState{full.toWire()}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	for _, what := range []*wirev1.ViewRequest{
		{What: &wirev1.ViewRequest_Digest{Digest: &wirev1.ViewDigest{Buckets: make([]uint64, buckets), Self: full.toWire()}}},
		{What: &wirev1.ViewRequest_Ask{Ask: &wirev1.ViewAsk{Id: []byte("n9"), Boot: 1}}},
		{What: &wirev1.ViewRequest_Push{Push: &wirev1.ViewPush{States: []*wirev1.MemberState{{}}}}},
	} {
		if b, err = proto.Marshal(what); err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	net := peers.NewNet(1)
	end := net.Join("n0")
	net.Join("n9")
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := New(Config{Self: Info{ID: "n0", Boot: 1}, Peers: end, Links: end})
		if err != nil {
			t.Fatal(err)
		}
		m.Admit(Info{ID: "n1"})
		m.Admit(Info{ID: "n2"})
		m.cancel() // no message may make it talk here
		var req wirev1.ViewRequest
		if proto.Unmarshal(b, &req) == nil {
			_, _ = m.answer(m.ctx, "n1", &req)
		}
		var beat wirev1.WatchBeat
		if proto.Unmarshal(b, &beat) == nil {
			m.mu.Lock()
			m.takeBeat("n2", &watched{}, &beat)
			m.mu.Unlock()
		}
		if got := m.Self(); got.State != Alive || got.ID != "n0" {
			t.Fatalf("self became %+v", got)
		}
		if !m.IsMember("n1") || len(m.All()) != 3 {
			t.Fatal("a message changed who is a member")
		}
		m.mu.Lock()
		m.stopped = true
		m.mu.Unlock()
		m.wg.Wait()
	})
}

func FuzzBook(f *testing.F) {
	b, err := proto.Marshal(&wirev1.MemberBook{Format: 1, Entries: []*wirev1.MemberBook_Entry{{Info: infoToWire(*full.info), Admitted: true}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("garbage"))
	net := peers.NewNet(1)
	end := net.Join("n0")
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := New(Config{Self: Info{ID: "n0", Boot: 1}, Peers: end, Links: end, Book: &memBook{data: b}})
		if err != nil {
			t.Fatal(err)
		}
		if !m.IsMember("n0") || len(m.Alive()) != 1 {
			t.Fatal("nobody of the book is alive before it is met")
		}
	})
}

func TestABookOnDiskSurvivesACrashAndGarbageCostsOnlyTheBook(t *testing.T) {
	fs := vfs.NewCrashableMem()
	if err := fs.MkdirAll("data", 0o700); err != nil {
		t.Fatal(err)
	}
	book := FileBook(fs, "data/members")
	if b, err := book.Load(); b != nil || err != nil {
		t.Fatalf("of nothing: %v, %v", b, err)
	}
	for _, text := range []string{"one", "two"} {
		if err := book.Save([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := fs.OpenDir("")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		t.Fatal(err)
	}
	after := FileBook(fs.CrashClone(vfs.CrashCloneCfg{}), "data/members")
	if b, err := after.Load(); string(b) != "two" || err != nil {
		t.Errorf("after a crash: %q, %v", b, err)
	}
	end := peers.NewNet(1).Join("n0")
	m, err := New(Config{Self: Info{ID: "n0", Boot: 1}, Peers: end, Links: end, Book: after})
	if err != nil || m.Stats().BookErrors != 1 {
		t.Errorf("a damaged book: %v, %+v", err, m.Stats())
	}
}

func TestConfigIsChecked(t *testing.T) {
	_, err := New(Config{Profile: Profile{Name: "mine"}})
	for _, want := range []string{"Self.ID", "Self.Boot", "Peers and Links", "profile"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing in %v", want, err)
		}
	}
	if _, err := ProfileOf("mars"); err == nil {
		t.Error("an unknown profile")
	}
	for _, name := range []string{"lan", "wan", "local"} {
		if p, err := ProfileOf(name); err != nil || p.Name != name {
			t.Error(name, p, err)
		}
	}
}

func TestASlowSubscriberGetsOneChangeAMember(t *testing.T) {
	simulate(t, 20, 3, func(c *cluster) {
		n1 := c.nodes["n1"]
		gate := make(chan struct{})
		var got []Change
		cancel := n1.Subscribe(func(ch Change) {
			<-gate
			got = append(got, ch)
		})
		old := c.nodes["n2"].Self().Boot
		n1.UpdateSelf(func(i *Info) { i.Zone = "a" }) // occupies the subscriber
		time.Sleep(time.Second)
		for range 3 {
			c.kill("n2")
			time.Sleep(time.Second)
			c.start("n2")
			time.Sleep(2 * time.Second)
		}
		for range 5 {
			n1.UpdateSelf(func(i *Info) { i.Zone += "b" })
		}
		n1.UpdateSelf(func(i *Info) { i.Zone = "a" }) // as told: nothing to tell
		close(gate)
		time.Sleep(time.Second)
		cancel()
		c.kill("n3")
		time.Sleep(time.Second)
		if len(got) != 2 || got[1].New.ID != "n2" || got[1].Old.Boot != old || got[1].New.Boot == old || got[1].Trigger != "reboot" {
			for _, ch := range got {
				t.Errorf("%s %v/%d -> %v/%d %s", ch.New.ID, ch.Old.State, ch.Old.Boot, ch.New.State, ch.New.Boot, ch.Trigger)
			}
		}
	})
}

func TestStrangersAndGarbageAreDropped(t *testing.T) {
	simulate(t, 21, 2, func(c *cluster) {
		n1 := c.nodes["n1"]
		evil := c.net.Join("evil")
		caller := peers.NewCaller(evil)
		defer caller.Close()
		push := &wirev1.ViewRequest{What: &wirev1.ViewRequest_Push{Push: &wirev1.ViewPush{States: []*wirev1.MemberState{full.toWire()}}}}
		err := caller.Call(context.Background(), "n1", ViewProtocol, push, &wirev1.ViewReply{})
		if peers.CodeOf(err) != wirev1.Failure_NOT_MEMBER {
			t.Errorf("a stranger's push: %v", err)
		}
		for _, from := range []*peers.Endpoint{evil, c.nodes["n2"].end} {
			s, err := from.Open(context.Background(), "n1", WatchProtocol)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Write(bytes.Repeat([]byte{0xff}, 100)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(s); err == nil {
				t.Error("garbage on a watch stream is put up with")
			}
		}
		time.Sleep(5 * time.Second)
		if err := c.agree(c.ids); err != nil {
			t.Error(err)
		}
		if n1.Stats().BadMessages < 3 {
			t.Errorf("%+v", n1.Stats())
		}
	})
}

func TestACopiedIdentityMakesNoStorm(t *testing.T) {
	simulate(t, 22, 3, func(c *cluster) {
		n1 := c.nodes["n1"]
		for range 10000 { // somebody goes on claiming to be a newer life of n1
			n1.locked(func() {
				info := n1.self.info.clone()
				info.Boot, info.StartedUnixMs = 99, info.StartedUnixMs+1000
				n1.merge("n2", state{info: &info})
			})
			time.Sleep(time.Millisecond)
		}
		if s := n1.Stats(); s.Rivals < 5 || s.Rivals > 12 || s.Pushes > 200 {
			t.Errorf("%+v", s)
		}
		c.eventually(time.Minute, "the real one prevails", func() error { return c.agree(c.ids) })
	})
}

// However many were lost, only so many are looked for: those that were seen last.
func TestOnlyThoseLostLastAreLookedFor(t *testing.T) {
	m := &Members{entries: map[peer.ID]*entry{}}
	begun := time.Now()
	for i := range keepTail + 100 {
		e := &entry{id: peer.ID(fmt.Sprintf("n%05d", i)), info: &Info{}, admitted: true, unheard: true, seen: begun.Add(time.Duration(i) * time.Second)}
		m.order = append(m.order, e)
	}
	alive := &entry{id: "alive", info: &Info{}, admitted: true, met: true}
	m.order = append(m.order, alive)
	beyond := m.beyondTail()
	for i, e := range m.order {
		if beyond[e] != (i < 100) {
			t.Fatalf("number %d of %d: beyond the tail is %v", i, len(m.order), beyond[e])
		}
	}
	m.order = m.order[100:]
	if beyond := m.beyondTail(); len(beyond) != 0 {
		t.Errorf("%d are beyond a tail of %d", len(beyond), keepTail)
	}
}
