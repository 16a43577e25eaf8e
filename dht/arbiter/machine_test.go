package arbiter

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// lab is a machine with short words for commands.
type lab struct {
	t     testing.TB
	m     *machine
	since uint64 // 0: what the machine has applied
}

func newLab(t testing.TB) *lab { return &lab{t: t, m: newMachine()} }

func (l *lab) do(cmds ...*wirev1.ArbiterCommand) []*wirev1.ArbiterResult {
	l.t.Helper()
	since := l.since
	if since == 0 {
		since = l.m.index
	}
	b, err := proto.Marshal(&wirev1.ArbiterEntry{Format: 1, Since: since, Commands: cmds})
	if err != nil {
		l.t.Fatal(err)
	}
	e, err := decodeEntry(b, MaxFormat)
	if err != nil {
		l.t.Fatal(err)
	}
	res, _ := l.m.apply(l.m.index+1, e)
	return res
}

func (l *lab) one(c *wirev1.ArbiterCommand) *wirev1.ArbiterResult { l.t.Helper(); return l.do(c)[0] }

func claimOf(key string, expect, nonce uint64) *wirev1.ArbiterClaim {
	return claimCommand(&ClaimRequest{Key: key, Expect: expect, Nonce: nonce, Owner: peer.ID(fmt.Sprint("n", nonce)), Boot: nonce})
}

func cClaim(c *wirev1.ArbiterClaim) *wirev1.ArbiterCommand {
	return &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Claim{Claim: c}}
}

func cCommit(key string, epoch, nonce, seq uint64, root string, holders int, w uint32) *wirev1.ArbiterCommand {
	c := &wirev1.ArbiterCommit{Key: key, Epoch: epoch, Nonce: nonce, Seq: seq, Root: []byte(root), W: w}
	for i := range holders {
		c.Holders = append(c.Holders, []byte{byte(i)})
	}
	return &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Commit{Commit: c}}
}

func cHolders(key string, seq uint64, holders ...string) *wirev1.ArbiterCommand {
	c := &wirev1.ArbiterSetHolders{Key: key, Seq: seq}
	for _, h := range holders {
		c.Holders = append(c.Holders, []byte(h))
	}
	return &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_SetHolders{SetHolders: c}}
}

func cRelease(key string, epoch, nonce uint64) *wirev1.ArbiterCommand {
	return &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Release{Release: &wirev1.ArbiterRelease{Key: key, Epoch: epoch, Nonce: nonce}}}
}

func (l *lab) txn(r TxnRequest) *wirev1.ArbiterResult {
	l.t.Helper()
	c, err := txnCommand(&r)
	if err != nil {
		l.t.Fatal(err)
	}
	return l.one(&wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Txn{Txn: c}})
}

func (l *lab) want(what string, r *wirev1.ArbiterResult, code wirev1.ArbiterResult_Code) {
	l.t.Helper()
	if r.GetCode() != code {
		l.t.Fatalf("%s: %s (%s), want %s", what, r.GetCode(), r.GetReason(), code)
	}
}

const (
	isOK      = wirev1.ArbiterResult_OK
	isRefused = wirev1.ArbiterResult_REFUSED
	isFenced  = wirev1.ArbiterResult_FENCED
	isTooOld  = wirev1.ArbiterResult_TOO_OLD
)

func TestMachineClaimAndCommit(t *testing.T) {
	l := newLab(t)
	l.want("claim of nothing with an epoch", l.one(cClaim(claimOf("a", 1, 9))), isRefused)
	r := l.one(cClaim(claimOf("a", 0, 10)))
	l.want("first claim", r, isOK)
	if g := r.GetRegister(); g.GetEpoch() != 1 || g.GetRevision() != 1 || g.GetBoot() != 10 || g.GetIncarnation() != 1 {
		t.Fatalf("%v", g)
	}
	l.want("the same again", l.one(cClaim(claimOf("a", 0, 10))), isOK)
	l.want("another with the same expectation", l.one(cClaim(claimOf("a", 0, 11))), isRefused)

	for _, c := range []struct {
		what string
		cmd  *wirev1.ArbiterCommand
		code wirev1.ArbiterResult_Code
	}{
		{"commit of nothing", cCommit("b", 1, 10, 1, "r", 2, 2), isFenced},
		{"wrong epoch", cCommit("a", 2, 10, 1, "r", 2, 2), isFenced},
		{"wrong nonce", cCommit("a", 1, 11, 1, "r", 2, 2), isFenced},
		{"gap", cCommit("a", 1, 10, 2, "r", 2, 2), isRefused},
		{"too few holders", cCommit("a", 1, 10, 1, "r", 1, 2), isRefused},
		{"no w", cCommit("a", 1, 10, 1, "r", 2, 0), isRefused},
		{"right", cCommit("a", 1, 10, 1, "r1", 2, 2), isOK},
		{"again", cCommit("a", 1, 10, 1, "r1", 2, 2), isOK},
		{"another root for the same seq", cCommit("a", 1, 10, 1, "rx", 2, 2), isRefused},
		{"next", cCommit("a", 1, 10, 2, "r2", 3, 2), isOK},
		{"the one before, late", cCommit("a", 1, 10, 1, "r1", 2, 2), isRefused},
		{"holders of an old seq", cHolders("a", 1, "x"), isRefused},
		{"holders", cHolders("a", 2, "x", "y"), isOK},
		{"holders again", cHolders("a", 2, "x", "y"), isOK},
		{"no holders", cHolders("a", 2), isRefused},
		{"second claim", cClaim(claimOf("a", 1, 20)), isOK},
		{"the old owner", cCommit("a", 1, 10, 3, "r3", 2, 2), isFenced},
		{"the new owner", cCommit("a", 2, 20, 3, "r3", 2, 2), isOK},
		{"release by the old owner", cRelease("a", 1, 10), isFenced},
		{"release", cRelease("a", 2, 20), isOK},
		{"release again", cRelease("a", 2, 20), isOK},
		{"commit after release", cCommit("a", 2, 20, 4, "r4", 2, 2), isFenced},
		{"claim after release", cClaim(claimOf("a", 2, 30)), isOK},
	} {
		l.want(c.what, l.one(c.cmd), c.code)
	}
	g := treeGet(l.m.tree, "a")
	if g.Epoch != 3 || g.Seq != 3 || string(g.Root) != "r3" || g.Revision != 4 {
		t.Fatalf("%+v", g)
	}
	// Holders counted once, however often they are named.
	c := cCommit("a", 3, 30, 4, "r4", 1, 2)
	c.GetCommit().Holders = append(c.GetCommit().Holders, c.GetCommit().Holders[0])
	l.want("one holder twice", l.one(c), isRefused)
	// Undo goes to another root with the claim.
	u := claimOf("a", 3, 40)
	u.SetRoot, u.Root = true, []byte("r1")
	r = l.one(cClaim(u))
	before := treeGet(l.m.tree, "a").Holders
	if g := r.GetRegister(); g.GetSeq() != 4 || string(g.GetRoot()) != "r1" || g.GetEpoch() != 4 || len(before) == 0 {
		t.Fatalf("undo: %v", g)
	}
	// Where it says who has that root, they and nobody else are its holders.
	u = claimOf("a", 4, 50)
	u.SetRoot, u.Root, u.Holders = true, []byte("r0"), [][]byte{[]byte("n7")}
	l.want("claim of a root with its holders", l.one(cClaim(u)), isOK)
	if g := treeGet(l.m.tree, "a"); g.Seq != 5 || len(g.Holders) != 1 || g.Holders[0] != "n7" {
		t.Fatalf("%+v", g)
	}
	u.SetRoot = false
	if err := checkCommand(cClaim(u)); err == nil {
		t.Fatal("a claim that names holders of no root was accepted")
	}
}

func TestMachineBodyNilKeeps(t *testing.T) {
	l := newLab(t)
	c := claimOf("a", 0, 1)
	c.Body = []byte("one")
	l.want("claim", l.one(cClaim(c)), isOK)
	l.want("claim without a body", l.one(cClaim(claimOf("a", 1, 2))), isOK)
	l.want("commit without a body", l.one(cCommit("a", 2, 2, 1, "r", 1, 1)), isOK)
	if g := treeGet(l.m.tree, "a"); string(g.Body) != "one" || g.Revision != 2 {
		t.Fatalf("%+v", g)
	}
	k := cCommit("a", 2, 2, 2, "r", 1, 1)
	k.GetCommit().Body = []byte{}
	l.want("commit with an empty body", l.one(k), isOK)
	if g := treeGet(l.m.tree, "a"); len(g.Body) != 0 || g.Revision != 3 {
		t.Fatalf("%+v", g)
	}
}

func TestMachineTxn(t *testing.T) {
	l := newLab(t)
	put := func(key, body string) Op { return Op{Put: &PutOp{Key: key, Body: []byte(body)}} }
	r := l.txn(TxnRequest{Nonce: 1, Compares: []Compare{{"a", "exists", 0}}, Then: []Op{put("a", "1"), put("b", "2")}})
	if !r.GetSucceeded() || len(r.GetRegisters()) != 2 {
		t.Fatalf("%v", r)
	}
	first := r
	if r = l.txn(TxnRequest{Nonce: 1, Compares: []Compare{{"a", "exists", 0}}, Then: []Op{put("a", "1"), put("b", "2")}}); !proto.Equal(r, first) {
		t.Fatalf("again: %v, first %v", r, first)
	}
	r = l.txn(TxnRequest{Nonce: 2, Compares: []Compare{{"a", "revision", 5}}, Then: []Op{put("a", "x")}})
	if r.GetSucceeded() || len(r.GetRegisters()) != 1 || string(r.GetRegisters()[0].GetBody()) != "1" {
		t.Fatalf("compare failed: %v", r)
	}
	r = l.txn(TxnRequest{Nonce: 3, Compares: []Compare{{"a", "revision", 5}}, Then: []Op{put("a", "x")}, Else: []Op{{Delete: "b"}, {Delete: "nothing"}}})
	if r.GetSucceeded() || !r.GetRegisters()[0].GetDeleted() || treeGet(l.m.tree, "b") != nil {
		t.Fatalf("else: %v", r)
	}
	// A claim that is refused undoes its branch.
	r = l.txn(TxnRequest{
		Nonce: 4, Then: []Op{put("c", "no"), {Claim: &ClaimRequest{Key: "a", Expect: 7, Nonce: 70, Owner: "n"}}},
		Else: []Op{put("d", "yes")},
	})
	if r.GetSucceeded() || treeGet(l.m.tree, "c") != nil || treeGet(l.m.tree, "d") == nil {
		t.Fatalf("claim in then: %v", r)
	}
	r = l.txn(TxnRequest{Nonce: 5, Compares: []Compare{{"a", "epoch", 9}}, Else: []Op{put("c", "no"), {Claim: &ClaimRequest{Key: "a", Expect: 7, Nonce: 70, Owner: "n"}}}})
	l.want("claim in else", r, isRefused)
	if treeGet(l.m.tree, "c") != nil {
		t.Fatal("half of a branch was done")
	}
	// Delete, then make anew within one transaction: the epoch goes on.
	l.want("claim", l.one(cClaim(claimOf("e", 0, 80))), isOK)
	r = l.txn(TxnRequest{Nonce: 6, Then: []Op{{Delete: "e"}, {Claim: &ClaimRequest{Key: "e", Nonce: 81, Owner: "n"}}}})
	if !r.GetSucceeded() || treeGet(l.m.tree, "e").Epoch != 2 {
		t.Fatalf("%v", r)
	}
}

func TestMachineNeverReusesAnEpoch(t *testing.T) {
	l := newLab(t)
	l.want("claim", l.one(cClaim(claimOf("a", 0, 1))), isOK)
	l.want("claim", l.one(cClaim(claimOf("a", 1, 2))), isOK)
	old := l.m.index
	if r := l.txn(TxnRequest{Nonce: 3, Then: []Op{{Delete: "a"}}}); !r.GetSucceeded() {
		t.Fatal(r)
	}
	// A repetition of the first claim from before the deletion must not bring the register back.
	l.since = old
	l.want("late claim", l.one(cClaim(claimOf("a", 0, 1))), isTooOld)
	l.since = 0
	r := l.one(cClaim(claimOf("a", 0, 4)))
	if r.GetRegister().GetEpoch() != 3 || r.GetRegister().GetRevision() != 3 {
		t.Fatalf("%v", r)
	}
}

func TestMachineLateSetHolders(t *testing.T) {
	l := newLab(t)
	l.want("claim", l.one(cClaim(claimOf("a", 0, 1))), isOK)
	l.want("commit", l.one(cCommit("a", 1, 1, 1, "r", 2, 2)), isOK)
	old := l.m.index
	l.want("holders", l.one(cHolders("a", 1, "x")), isOK)
	l.want("holders", l.one(cHolders("a", 1, "x", "y")), isOK)
	l.since = old
	l.want("late repetition", l.one(cHolders("a", 1, "x")), isTooOld)
}

func TestMachineForgetsTransactionsSafely(t *testing.T) {
	l := newLab(t)
	old := l.m.index + 1
	for i := range uint64(maxTxns + 10) {
		if r := l.txn(TxnRequest{Nonce: i + 1, Then: []Op{{Put: &PutOp{Key: "a", Body: []byte("x")}}}}); !r.GetSucceeded() {
			t.Fatal(r)
		}
	}
	l.since = old
	l.want("forgotten", l.txn(TxnRequest{Nonce: 1, Then: []Op{{Put: &PutOp{Key: "a"}}}}), isTooOld)
	if r := l.txn(TxnRequest{Nonce: maxTxns, Then: []Op{{Put: &PutOp{Key: "a"}}}}); !r.GetSucceeded() || r.GetIndex() != maxTxns {
		t.Fatalf("remembered: %v", r)
	}
	big := newLab(t)
	for i := range uint64(20) {
		big.txn(TxnRequest{Nonce: i + 1, Then: []Op{{Put: &PutOp{Key: "a", Body: make([]byte, MaxBody)}}}})
	}
	if big.m.txns.bytes > maxTxnBytes+MaxBody {
		t.Fatalf("%d bytes remembered", big.m.txns.bytes)
	}
}

// randomCommand draws commands that collide often.
func randomCommand(r *rand.Rand, m *machine) *wirev1.ArbiterCommand {
	key := string(rune('a' + r.IntN(3)))
	g := treeGet(m.tree, key)
	if g == nil {
		g = &Register{}
	}
	near := func(n uint64) uint64 { return n + uint64(r.IntN(4))/3 - min(n, uint64(r.IntN(8))/7) }
	nonce := g.Nonce
	if r.IntN(5) == 0 {
		nonce = uint64(r.IntN(50) + 1)
	}
	switch r.IntN(8) {
	case 0, 1:
		return cClaim(claimOf(key, near(g.Epoch), uint64(r.IntN(1000)+1)))
	case 2, 3, 4:
		return cCommit(key, near(g.Epoch), nonce, near(g.Seq+1), fmt.Sprint(r.IntN(1000)), r.IntN(4), uint32(r.IntN(3)))
	case 5:
		return cHolders(key, near(g.Seq), fmt.Sprint(r.IntN(9)))
	case 6:
		return cRelease(key, near(g.Epoch), nonce)
	}
	req := TxnRequest{Nonce: uint64(r.IntN(200) + 1), Compares: []Compare{{key, "epoch", near(g.Epoch)}}}
	req.Then = []Op{{Put: &PutOp{Key: key, Body: []byte(fmt.Sprint(r.IntN(99)))}}, {Claim: &ClaimRequest{Key: key, Expect: near(g.Epoch), Nonce: uint64(r.IntN(1000) + 1), Owner: "t"}}}
	if r.IntN(3) == 0 {
		req.Else = []Op{{Delete: key}}
	}
	c, err := txnCommand(&req)
	if err != nil {
		panic(err)
	}
	return &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Txn{Txn: c}}
}

// TestMachineProperties drives machines with random commands. I1: per key, each epoch has one nonce, and an epoch is the one before
// plus one unless the register was made anew. I2: an admitted commit has the current epoch and nonce and the next seq, and no seq is
// lost by a claim. Determinism: a second machine, restarted from snapshots on the way, does the same.
func TestMachineProperties(t *testing.T) {
	runs := 300
	if testing.Short() {
		runs = 50
	}
	for seed := range uint64(runs) {
		r := rand.New(rand.NewPCG(seed, 5))
		l, twin := newLab(t), newLab(t)
		nonces := map[string]uint64{}
		for range 200 {
			var cmds []*wirev1.ArbiterCommand
			for range 1 + r.IntN(3) {
				cmds = append(cmds, randomCommand(r, l.m))
			}
			l.since = l.m.index - min(l.m.index, uint64(r.IntN(5)))
			if l.since == 0 {
				l.since = l.m.index
			}
			twin.since = l.since
			before := l.m.tree
			results := l.do(cmds...)
			if got := twin.do(cmds...); !slices.EqualFunc(results, got, func(a, b *wirev1.ArbiterResult) bool { return proto.Equal(a, b) }) {
				t.Fatalf("seed %d: two machines differ:\n%v\n%v", seed, results, got)
			}
			for _, key := range []string{"a", "b", "c"} {
				checkStep(t, seed, treeGet(before, key), treeGet(l.m.tree, key), len(cmds), nonces)
			}
			if r.IntN(20) == 0 {
				twin.m = reread(t, twin.m)
			}
		}
		if !reflect.DeepEqual(l.m.freeze().header, twin.m.freeze().header) {
			t.Fatalf("seed %d: %v and %v", seed, l.m.freeze().header, twin.m.freeze().header)
		}
	}
}

func checkStep(t *testing.T, seed uint64, old, now *Register, commands int, nonces map[string]uint64) {
	t.Helper()
	if now == nil {
		return
	}
	if now.Epoch > 0 {
		k := fmt.Sprintf("%s/%d", now.Key, now.Epoch)
		if was, known := nonces[k]; known && was != now.Nonce {
			t.Fatalf("seed %d: I1: %s has the nonces %d and %d", seed, k, was, now.Nonce)
		}
		nonces[k] = now.Nonce
	}
	if old == nil {
		return
	}
	if now.Epoch < old.Epoch || now.Epoch > old.Epoch+uint64(commands) && old.Revision+uint64(commands) >= now.Revision {
		t.Fatalf("seed %d: I1: %s went from epoch %d to %d", seed, now.Key, old.Epoch, now.Epoch)
	}
	if now.Epoch == old.Epoch && (now.Nonce != old.Nonce || now.Seq < old.Seq || now.Seq > old.Seq+uint64(commands)) {
		t.Fatalf("seed %d: I2: %+v then %+v", seed, old, now)
	}
	if now.Epoch == old.Epoch && now.Seq == old.Seq && !bytes.Equal(now.Root, old.Root) {
		t.Fatalf("seed %d: I2: seq %d of %s has two roots", seed, now.Seq, now.Key)
	}
	if now.Revision < old.Revision || now.Revision == old.Revision && !bytes.Equal(now.Body, old.Body) {
		t.Fatalf("seed %d: revision %d then %d", seed, old.Revision, now.Revision)
	}
}

func reread(t testing.TB, m *machine) *machine {
	t.Helper()
	var b bytes.Buffer
	if err := m.freeze().write(&b); err != nil {
		t.Fatal(err)
	}
	out, err := readSnapshot(&b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSnapshotRefusesDamage(t *testing.T) {
	l := newLab(t)
	for i := range 50 {
		l.do(cClaim(claimOf(fmt.Sprint("k", i), 0, uint64(i+1))))
		l.txn(TxnRequest{Nonce: uint64(i + 1), Then: []Op{{Put: &PutOp{Key: fmt.Sprint("p", i)}}}})
	}
	l.m.voters(l.m.index+1, []peer.ID{"v1", "v2"})
	var b bytes.Buffer
	if err := l.m.freeze().write(&b); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	m, err := readSnapshot(bytes.NewReader(whole))
	if err != nil || m.tree.Len() != 100 || len(m.txns.order) != 50 || len(m.former) != 2 {
		t.Fatalf("%v %+v", err, m)
	}
	for n := range whole {
		if _, err := readSnapshot(bytes.NewReader(whole[:n])); err == nil {
			t.Fatalf("%d of %d bytes were taken for a snapshot", n, len(whole))
		}
	}
	f := l.m.freeze()
	f.header.Format = snapshotFormat + 1
	b.Reset()
	if err := f.write(&b); err != nil {
		t.Fatal(err)
	}
	if _, err := readSnapshot(&b); err == nil {
		t.Fatal("a newer snapshot was taken")
	}
}

func FuzzDecodeEntry(f *testing.F) {
	good, err := proto.Marshal(&wirev1.ArbiterEntry{Format: 1, Commands: []*wirev1.ArbiterCommand{
		cClaim(claimOf("a", 0, 1)), cCommit("a", 1, 1, 1, "r", 2, 2), cHolders("a", 1, "x"), cRelease("a", 1, 1),
		{Kind: &wirev1.ArbiterCommand_Txn{Txn: &wirev1.ArbiterTxn{
			Nonce: 3, Compares: []*wirev1.ArbiterCompare{{Key: "a", Field: wirev1.ArbiterCompare_EPOCH}},
			Then: []*wirev1.ArbiterOp{{Kind: &wirev1.ArbiterOp_Delete{Delete: "a"}}},
		}}},
	}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte{8, 2})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEntry(b, MaxFormat)
		if err != nil {
			return
		}
		// What is taken can be applied, whatever it is, and gives a state that can be kept.
		m := newMachine()
		res, _ := m.apply(1, e)
		if len(res) != len(e.GetCommands()) {
			t.Fatalf("%d results of %d commands", len(res), len(e.GetCommands()))
		}
		for _, r := range res {
			if r.GetCode() == wirev1.ArbiterResult_UNSPECIFIED {
				t.Fatalf("no code: %v", r)
			}
		}
		if checkEntry(e, len(b)) == nil {
			reread(t, m)
		}
	})
}

func FuzzReadSnapshot(f *testing.F) {
	l := newLab(f)
	l.do(cClaim(claimOf("a", 0, 1)))
	var b bytes.Buffer
	if err := l.m.freeze().write(&b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := readSnapshot(bytes.NewReader(b))
		if err == nil {
			reread(t, m)
		}
	})
}
