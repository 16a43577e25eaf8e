package components

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func TestTargetsReadBackAsWritten(t *testing.T) {
	for s, want := range map[string]Target{
		"shop/store":        {"shop", "store", -1, ""},
		"shop/store-0":      {"shop", "store", 0, ""},
		"shop/store-12":     {"shop", "store", 12, ""},
		"shop/web-front":    {"shop", "web-front", -1, ""},
		"shop/web-front-7":  {"shop", "web-front", 7, ""},
		"shop/log@n1":       {"shop", "log", -1, "n1"},
		"shop/log@12D3KooW": {"shop", "log", -1, "12D3KooW"},
		"shop/store-01":     {"shop", "store-01", -1, ""}, // no instance is called so
	} {
		got, err := ParseTarget(s)
		if s == "shop/store-01" {
			if err != nil || got.Ordinal != -1 {
				t.Errorf("%s = %+v, %v", s, got, err)
			}
			continue
		}
		if err != nil || got != want || got.String() != s {
			t.Errorf("%s = %+v (%s), %v; want %+v", s, got, got, err, want)
		}
	}
	for _, s := range []string{"", "store", "/store", "shop/", "Shop/store", "shop/st ore", "shop/a/b", "shop/log@", "shop/log@a/b", "shop/-0", "shop/store-0-0", "shop/a-99999999999999999999"} {
		if got, err := ParseTarget(s); err == nil && got.String() != s {
			t.Errorf("%q is taken for %+v", s, got)
		} else if err == nil && s != "shop/a-99999999999999999999" {
			t.Errorf("%q is taken for %+v", s, got)
		}
	}
	if got, err := ParseTargetIn("shop", "store-1"); err != nil || got.Instance() != "shop/store-1" {
		t.Errorf("store-1 in shop = %+v, %v", got, err)
	}
	if InstanceOfKey(InstanceRegister("shop/store-0")) != "shop/store-0" || InstanceOfKey("app/shop") != "" {
		t.Error("the register of an instance does not lead back to it")
	}
}

func TestTokensCompareAsPairs(t *testing.T) {
	ordered := []Token{{}, {0, 9}, {1, 0}, {1, 2}, {1, 10}, {2, 1}}
	for i, a := range ordered {
		for j, b := range ordered {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := a.Compare(b); got != want {
				t.Errorf("%s against %s = %d, want %d", a, b, got, want)
			}
		}
		if back, err := ParseToken(a.String()); err != nil || back != a || TokenFrom(a.Proto()) != a {
			t.Errorf("%s reads back as %s, %v", a, back, err)
		}
	}
	for _, s := range []string{"", "1", "1.", ".1", "1.2.3", "-1.2", "01.2", "1.2x", "1.99999999999999999999"} {
		if got, err := ParseToken(s); err == nil {
			t.Errorf("%q is taken for %s", s, got)
		}
	}
}

func TestSizes(t *testing.T) {
	for s, want := range map[string]uint64{"": 0, "0": 0, "17": 17, "256MiB": 256 << 20, "1.5GiB": 3 << 29, "10MB": 10e6, "1kB": 1000, "5 KiB": 5 << 10, "2TiB": 2 << 40} {
		if got, err := ParseSize(s); err != nil || got != want {
			t.Errorf("%q = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"lots", "-1", "1Mib", "1e30GiB", "NaN", "MiB", "1 2MiB", "Inf"} {
		if got, err := ParseSize(s); err == nil {
			t.Errorf("%q is taken for %d", s, got)
		}
	}
	r := rand.New(rand.NewPCG(3, 3))
	for range 1000 {
		v := r.Uint64() >> (1 + r.UintN(60))
		if v > 1<<52 {
			continue // beyond a float's whole numbers; no disk is that large
		}
		if back, err := ParseSize(FormatSize(v)); err != nil || back != v {
			t.Errorf("%d is written %s and reads back as %d, %v", v, FormatSize(v), back, err)
		}
	}
}

func TestArtifactsResolve(t *testing.T) {
	var all []*componentsv1.Artifact
	digest := func(c string) string { return "sha256:" + strings.Repeat(c, 64) }
	add := func(name, version, d string) {
		all = append(all, &componentsv1.Artifact{Name: name, Version: version, Digest: digest(d)})
	}
	add("kv", "1.0.0", "0")
	add("kv", "1.2.0", "1")
	add("kv", "1.10.1", "2")
	add("kv", "2.0.0", "3")
	add("kv", "3.0.0-rc.1", "4")
	add("kv", "nightly", "5")
	add("web", "1.4.0", "6")
	for ref, want := range map[string]string{
		"kv": "2.0.0", "kv@^1": "1.10.1", "kv@^1.2": "1.10.1", "kv@~1.2.0": "1.2.0", "kv@1.0.0": "1.0.0", "kv@>=1.2, <2": "1.10.1",
		"kv@>=3.0.0-0": "3.0.0-rc.1", "kv@3.0.0-rc.1": "3.0.0-rc.1", "kv@*": "2.0.0", "web@1.x": "1.4.0", digest("5"): "nightly",
	} {
		for range 3 {
			rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			got, err := ResolveArtifact(ref, all)
			if err != nil || got.GetVersion() != want {
				t.Errorf("%s = %s, %v; want %s", ref, got.GetVersion(), err, want)
			}
		}
	}
	for ref, want := range map[string]string{
		"kv@^4":     "no version satisfies kv@^4: the registry has 3.0.0-rc.1, 2.0.0, 1.10.1, 1.2.0, 1.0.0, nightly",
		"db":        "the registry has no db: it has kv, web",
		"./bin/kv":  "push it first",
		"kv@^?":     "found version constraint",
		"":          "found nothing",
		"sha256:ab": "expected sha256: and 64",
		"a b":       "found artifact",
	} {
		if got, err := ResolveArtifact(ref, all); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s = %v, %v; want %q", ref, got, err, want)
		}
	}
	if _, err := ResolveArtifact("kv", nil); err == nil || !strings.Contains(err.Error(), "it is empty") {
		t.Errorf("an empty registry: %v", err)
	}
}

func app(t *testing.T, manifest string) *componentsv1.Application {
	t.Helper()
	all, err := ParseManifests("test.yaml", []byte(manifest))
	if err != nil {
		t.Fatal(err)
	}
	a, _ := Redeploy(nil, all[0], nil)
	return a
}

const shop = `
application: shop
components:
- {name: store, artifact: kv, attributes: {capacity: 10, mode: a}, bindings: {log: log}, require: [node.cpu > 1]}
- {name: web, artifact: web, count: 2, resources: {cpu: 0.25, memory: 64MiB}, objective: [{value: node.load5, from: 0, to: 1, weight: 1, better: low}]}
- {name: log, artifact: log, count: each-node}
require: [node.zone != "x"]
objective: [{value: node.cpu, from: 0, to: 8, weight: 1, better: high}]
cost: {move: 0.1}
`

func TestExpectedInstances(t *testing.T) {
	a := app(t, shop)
	nodes := []Node{{ID: "p3", Name: "n3", Role: RoleVoter}, {ID: "p2", Name: "same"}, {ID: "p1", Name: "same"}, {ID: "p4"}}
	got, err := Expected(a, nodes)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range got {
		names = append(names, s.Name+"="+s.Node)
	}
	want := "shop/store-0= shop/web-0= shop/web-1= shop/log@same=p1 shop/log@p2=p2 shop/log@p4=p4"
	if strings.Join(names, " ") != want {
		t.Errorf("expected %s, want %s", names, want)
	}
	a.Removing = true
	if got, err := Expected(a, nodes); err != nil || len(got) != 0 {
		t.Errorf("an application that is removed expects %v, %v", got, err)
	}
}

func TestEffectiveIsTheManifestWithWhatCommandsLaidOverIt(t *testing.T) {
	a := app(t, shop)
	a.Pinned = []*componentsv1.Pinned{{Component: "store", Digest: "sha256:1", Name: "kv", Version: "1.0.0", Platforms: []string{"linux/amd64"}, Durable: componentsv1.Durability_DURABILITY_INTERVAL}}
	a.Overlays = map[string]*componentsv1.Overlay{"store": {
		Digest: "sha256:2", Version: "1.1.0", Stopped: true, Nodes: map[string]string{"shop/store-0": "p2"},
		Attributes: map[string]string{"capacity": "20"}, Bindings: map[string]string{"log": "", "cache": "web"},
	}}
	before := proto.CloneOf(a)
	e, err := EffectiveOf(a, "store")
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(a, before) {
		t.Error("reading the effective component changed the desired state")
	}
	if e.Digest != "sha256:2" || e.Version != "1.1.0" || e.ArtifactName != "kv" || len(e.Platforms) != 1 || !e.Stopped || e.Interval != DefaultInterval || e.Guarantee != Safe {
		t.Errorf("effective %+v", e)
	}
	if at := e.Spec.GetAttributes(); at["capacity"] != "20" || at["mode"] != `"a"` {
		t.Errorf("attributes %v", at)
	}
	if b := e.Spec.GetBindings(); len(b) != 1 || b["cache"] != "web" {
		t.Errorf("bindings %v", b)
	}
	if len(e.Spec.GetRequire()) != 2 || e.Spec.GetRequire()[0] != `node.zone != "x"` || e.Spec.GetObjective()[0].GetValue() != "node.cpu" || e.Cost.GetMove() != 0.1 {
		t.Errorf("require %v, objective %v", e.Spec.GetRequire(), e.Spec.GetObjective())
	}
	web, err := EffectiveOf(a, "web")
	if err != nil || web.CPUMillis != 250 || web.MemoryBytes != 64<<20 || web.Spec.GetObjective()[0].GetValue() != "node.load5" {
		t.Errorf("web %+v, %v", web, err)
	}
	if none, err := EffectiveOf(a, "nobody"); none != nil || err != nil {
		t.Errorf("nobody = %v, %v", none, err)
	}
}

func TestADeployClearsTheOverlaysOfItsKeys(t *testing.T) {
	old := app(t, shop)
	old.Overlays = map[string]*componentsv1.Overlay{
		"store": {Digest: "sha256:2", Version: "1.1.0", Attributes: map[string]string{"capacity": "20", "extra": "1"}, Bindings: map[string]string{"log": "web"}, Stopped: true},
		"web":   {Nodes: map[string]string{"shop/web-0": "p1", "shop/web-1": "p2"}},
		"log":   {Digest: "sha256:9"},
	}
	all, err := ParseManifests("test.yaml", []byte("application: shop\ncomponents:\n- {name: store, artifact: kv, attributes: {capacity: 10}}\n- {name: web, artifact: web}\n"))
	if err != nil {
		t.Fatal(err)
	}
	next, cleared := Redeploy(old, all[0], nil)
	var gone, kept []string
	for _, it := range cleared {
		gone = append(gone, it.Component+" "+it.Key)
	}
	for _, it := range Overlays(next) {
		kept = append(kept, it.Component+" "+it.Key+" "+it.Value)
	}
	if got, want := strings.Join(gone, ", "), "shop/log version, shop/store attributes.capacity, shop/store version, shop/web node of shop/web-1"; got != want {
		t.Errorf("cleared %s, want %s", got, want)
	}
	if got, want := strings.Join(kept, ", "), "shop/store attributes.extra 1, shop/store bindings.log web, shop/store stopped true, shop/web node of shop/web-0 p1"; got != want {
		t.Errorf("kept %s, want %s", got, want)
	}
	if next.GetVersion() != old.GetVersion()+1 || len(old.GetOverlays()) != 3 || old.GetOverlays()["store"].GetDigest() == "" {
		t.Error("the version did not rise by one, or the old desired state changed")
	}
}

func TestDurabilityByDescription(t *testing.T) {
	sdk := &componentv1.Description{State: &componentv1.StateSpec{Stateful: true}, Features: []string{componentv1.FeatureTxnCalls}}
	opaque := &componentv1.Description{State: &componentv1.StateSpec{Stateful: true}}
	for _, c := range []struct {
		spec *componentsv1.ComponentSpec
		desc *componentv1.Description
		want string
	}{
		{&componentsv1.ComponentSpec{}, sdk, "each-call"},
		{&componentsv1.ComponentSpec{}, opaque, "5s"},
		{&componentsv1.ComponentSpec{}, &componentv1.Description{}, "none"},
		{&componentsv1.ComponentSpec{Durable: "on-demand"}, sdk, "on-demand"},
		{&componentsv1.ComponentSpec{Run: &componentsv1.Run{StateDir: "data"}}, nil, "5s"},
		{&componentsv1.ComponentSpec{Run: &componentsv1.Run{}}, nil, "none"},
		{&componentsv1.ComponentSpec{Guarantee: AlwaysOn}, opaque, "none"},
	} {
		got, err := ResolveDurability(c.spec, c.desc)
		if err != nil || DurableName(got, 0) != c.want {
			t.Errorf("%v = %s, %v; want %s", c.spec, DurableName(got, 0), err, c.want)
		}
	}
	if _, err := ResolveDurability(&componentsv1.ComponentSpec{Durable: "1ns"}, sdk); err == nil {
		t.Error("every nanosecond is taken for an interval")
	}
}

func TestTakeover(t *testing.T) {
	now := time.UnixMilli(1_000_000)
	body := &componentsv1.InstanceBody{Digest: "new", Version: "1.2.0", Fallback: &componentsv1.Fallback{Digest: "old", Version: "1.1.0"}, ClaimedUnixMs: 990_000, Successors: []string{"p2", "p3"}}
	d := OwnerDeath{Node: "p1", Name: "n1", Boot: 7, Evidence: "refused", Trigger: "placement", To: "p2", Now: now}
	next := Takeover(body, d)
	if next.GetDigest() != "old" || next.GetVersion() != "1.1.0" || next.GetFallback() != nil || len(next.GetDeaths()) != 1 || next.GetQuarantined() ||
		strings.Join(next.GetSuccessors(), " ") != "p3" || next.GetCause() != "n1 died: refused" || next.GetTrigger() != "placement" {
		t.Errorf("after the first death: %v", next)
	}
	if body.GetDigest() != "new" || len(body.GetSuccessors()) != 2 {
		t.Error("the old body changed")
	}
	again := d
	again.Node, again.Now = "p2", now.Add(20*time.Second)
	if second := Takeover(next, again); !second.GetQuarantined() || len(second.GetDeaths()) != 2 {
		t.Errorf("after the second death within the window: %v", second)
	}
	system := proto.CloneOf(next)
	system.Component = "system/placement"
	if second := Takeover(system, again); second.GetQuarantined() {
		t.Errorf("a component of the cluster's own is given up: %v", second)
	}
	settled := proto.CloneOf(next)
	settled.Settled = true
	if second := Takeover(settled, again); second.GetQuarantined() || len(second.GetDeaths()) != 0 {
		t.Errorf("a settled instance does not kill its nodes: %v", second)
	}
	again.Now = now.Add(31 * time.Second)
	if second := Takeover(next, again); second.GetQuarantined() || len(second.GetDeaths()) != 0 {
		t.Errorf("a death long after the start counts: %v", second)
	}
	measured := again
	measured.Lasted = time.Second // whatever the dates say
	if second := Takeover(next, measured); !second.GetQuarantined() {
		t.Errorf("a death that was measured to be soon after the start does not count: %v", second)
	}
	measured.Lasted, measured.Now = DeathWindow, now.Add(-time.Hour)
	if second := Takeover(next, measured); second.GetQuarantined() || len(second.GetDeaths()) != 0 {
		t.Errorf("a death that was measured to be long after the start counts: %v", second)
	}
	planned := again
	planned.Now, planned.Planned = now.Add(time.Second), true
	stopped := Takeover(next, planned)
	if stopped.GetQuarantined() || len(stopped.GetDeaths()) != 1 {
		t.Errorf("a node that said goodbye counts for or against: %v", stopped)
	}
	again.Now, again.Reboot = now.Add(time.Second), true
	if second := Takeover(next, again); second.GetQuarantined() {
		t.Errorf("a reboot counts: %v", second)
	}
}

// Every lifecycle is in the table's row of the state that StateOf gives for it, and every word of the contract is in the table.
func TestStatesAgreeWithTheirTable(t *testing.T) {
	rows := map[State]StateRow{}
	contract := map[componentv1.State]bool{}
	for _, r := range States {
		rows[r.State] = r
		for _, c := range r.Contract {
			contract[c] = true
		}
	}
	if len(contract) != len(componentv1.State_name) || len(rows) != 8 {
		t.Errorf("the table has %d states of ps and %d of the contract", len(rows), len(contract))
	}
	bools := []bool{false, true}
	for _, l := range []Lifecycle{LifecycleNone, LifecycleCreated, LifecycleStarting, LifecycleRunning, LifecycleFrozen, LifecycleStopped, LifecycleFailed} {
		for _, fetching := range bools {
			for _, stopped := range bools {
				for _, unmet := range []string{"", "two holders of three"} {
					got := StateOf(Observed{Lifecycle: l, Owned: true, Fetching: fetching, Stopped: stopped, Unmet: unmet})
					ok := false
					for _, x := range rows[got].Lifecycle {
						ok = ok || x == l
					}
					if !ok {
						t.Errorf("lifecycle %q is shown as %s, and the table does not have that", l, got)
					}
				}
			}
		}
	}
	for o, want := range map[Observed]State{
		{}:                            Pending,
		{Owned: true}:                 Pending,
		{Owned: true, Fetching: true}: Fetching,
		{Owned: true, Lifecycle: LifecycleRunning}:                      Running,
		{Owned: true, Lifecycle: LifecycleRunning, Unmet: "x"}:          Degraded,
		{Owned: true, BackingOff: true}:                                 Failed,
		{Quarantined: true}:                                             Failed,
		{Stopped: true}:                                                 Stopped,
		{Stopped: true, Owned: true, Lifecycle: LifecycleRunning}:       Running,
		{Owned: true, Lifecycle: LifecycleOf(componentv1.State_FROZEN)}: Frozen,
	} {
		if got := StateOf(o); got != want {
			t.Errorf("%+v is shown as %s, want %s", o, got, want)
		}
	}
}
