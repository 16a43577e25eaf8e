package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const shopManifest = `application: shop
components:
  - name: store
    artifact: ./bin/store
  - name: cache
    artifact: ./bin/store
  - name: web
    artifact: web@^1.2
---
application: blog
components:
  - name: web
    artifact: ../other/blog
`

func writeFiles(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestDeployPushesLocalFilesFirst(t *testing.T) {
	f := newFixture(t)
	big := strings.Repeat("x", pushChunk*2+17)
	dir := writeFiles(t, map[string]string{"app/shop.yaml": shopManifest, "app/bin/store": big, "other/blog": "blog"})
	code, out, errs := f.run("deploy", filepath.Join(dir, "app", "shop.yaml"), "--wait")
	if code != 0 || !strings.Contains(out, "healthy after 812 ms") {
		t.Fatalf("%d %s %s", code, out, errs)
	}
	if !strings.Contains(errs, "waiting for shop/store-0 starting on n1 (restoring)") {
		t.Errorf("progress: %s", errs)
	}
	if got := f.fake.pushed["store"]; !bytes.Equal(got, []byte(big)) || string(f.fake.pushed["blog"]) != "blog" || len(f.fake.pushed) != 2 {
		t.Errorf("pushed %d bytes of store, %q of blog", len(got), f.fake.pushed["blog"])
	}
	d := f.fake.deployed
	if len(d.Artifacts) != 2 || d.Artifacts[0].Path != "./bin/store" || !strings.HasPrefix(d.Artifacts[0].Digest, "sha256:") || d.Artifacts[1].Path != "../other/blog" {
		t.Errorf("the deploy names %v", d.Artifacts)
	}
	if string(d.Manifest) != shopManifest || !d.Wait || d.TimeoutMs != 60_000 {
		t.Errorf("the deploy is %v", d)
	}
}

func TestDeployDoesNothingByHalves(t *testing.T) {
	f := newFixture(t)
	dir := writeFiles(t, map[string]string{"shop.yaml": shopManifest, "bin/store": "store"}) // ../other/blog is missing
	code, _, errs := f.run("deploy", filepath.Join(dir, "shop.yaml"))
	if code != exitFailed || !strings.Contains(errs, "../other/blog") || !strings.Contains(errs, "no such file") {
		t.Errorf("%d %s", code, errs)
	}
	if len(f.fake.pushed) != 0 || f.fake.deployed != nil {
		t.Errorf("pushed %d files, deployed %v", len(f.fake.pushed), f.fake.deployed)
	}
	f.in = "application: shop\ncomponents:\n  - name: store\n    artifact: ./kv\n    count: many\n    durable: perhaps\n"
	code, _, errs = f.run("deploy", "-")
	if code != exitFailed || !strings.Contains(errs, "2 errors in the manifest, nothing was changed\n  stdin:5:12: ") || !strings.Contains(errs, "stdin:6:14: ") {
		t.Errorf("two errors: %d %s", code, errs)
	}
	f.in = "application: shop\ncomponents:\n  - name: store\n"
	code, _, errs = f.run("deploy", "-")
	if code != exitFailed || strings.Count(errs, "\n") != 1 || !strings.HasPrefix(errs, "coppice: read stdin: stdin:3:5: ") {
		t.Errorf("one error: %d %s", code, errs)
	}
	if f.fake.deployed != nil {
		t.Error("a broken manifest was deployed")
	}
}

func TestDeployWaitSaysWhatItWaitedFor(t *testing.T) {
	f := newFixture(t)
	f.fake.unwell = true
	f.in = "application: shop\ncomponents:\n  - name: store\n    artifact: kv@^1\n"
	code, out, errs := f.run("deploy", "-", "--wait", "--timeout", "1s")
	if code != exitFailed || out != "" || !strings.Contains(errs, "waited 1s for shop/store-0: starting on n1 (never healthy: exit 3)") || !strings.Contains(errs, "try: coppice logs shop/store-0") {
		t.Errorf("%d %q %s", code, out, errs)
	}
	if f.fake.deployed.TimeoutMs != 1000 {
		t.Errorf("the server was told %d ms", f.fake.deployed.TimeoutMs)
	}
}

func TestPlanTellsAboutLocalFilesWithoutPushing(t *testing.T) {
	f := newFixture(t)
	dir := writeFiles(t, map[string]string{"shop.yaml": "application: shop\ncomponents:\n  - name: store\n    artifact: ./store\n"})
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Skip(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "store"), self, 0o755); err != nil {
		t.Fatal(err)
	}
	code, out, errs := f.run("plan", filepath.Join(dir, "shop.yaml"))
	if code != exitFailed || !strings.Contains(errs, "no node is feasible for shop/gpu-0") || !strings.Contains(out, "shop/gpu-0 was refused by") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if len(f.fake.pushed) != 0 {
		t.Error("plan pushed something")
	}
	r := asked[planRequest](t, f)
	if len(r.Artifacts) != 1 || !strings.HasPrefix(r.Artifacts[0].Platform, "linux/") || r.Artifacts[0].Bytes != uint64(len(self)) {
		t.Errorf("plan was told %v", r.Artifacts)
	}
}

func TestPlanAsksWhatIf(t *testing.T) {
	f := newFixture(t)
	dir := writeFiles(t, map[string]string{"n9.json": `{"name": "n9"}`})
	code, out, errs := f.run("plan", "--without", "n2,n3", "--with", filepath.Join(dir, "n9.json"), "--price", "n1=0.5")
	r := asked[planRequest](t, f)
	if code != exitFailed || len(r.Manifest) > 0 || !slices.Equal(r.Without, []string{"n2", "n3"}) || len(r.With) != 1 || string(r.With[0].Data) != `{"name": "n9"}` || r.Prices["n1"] != 0.5 {
		t.Errorf("%d %s: the node was asked %v", code, errs, r)
	}
	for _, want := range []string{
		`shop/gpu-0: no node holds together: capacity cpu + require node.labels.gpu == "yes"`, "it would be feasible without capacity cpu: n1 (cpu: 4 cores wanted, 2 cores left)",
		"objective 0.7500 (now 0.5000, no plan is better than 0.8000, a gap of 6.7 %)",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the answer lacks %q:\n%s", want, out)
		}
	}
	if code, out, errs := f.run("plan", "--replay", "abc"); code != 0 || !strings.Contains(out, "the same plan, byte for byte") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	if code, out, errs := f.run("plan", "--replay", "def"); code != exitFailed || !strings.Contains(out, "another plan") || !strings.Contains(errs, "is not what it was") {
		t.Errorf("%d %s %s", code, out, errs)
	}
	for _, args := range [][]string{{"plan"}, {"plan", "--replay", "abc", "--without", "n1"}, {"plan", "--price", "n1=much"}} {
		if code, _, errs := f.run(args...); code != exitUsage {
			t.Errorf("%v: %d %s", args, code, errs)
		}
	}
	if code, _, errs := f.run("plan", "--with", filepath.Join(dir, "missing.json")); code != exitFailed || !strings.Contains(errs, "missing.json") {
		t.Errorf("%d %s", code, errs)
	}
}

func TestPushReportsTheServersReason(t *testing.T) {
	f := newFixture(t)
	dir := writeFiles(t, map[string]string{"bad": "x", "empty": ""})
	code, _, errs := f.run("registry", "push", filepath.Join(dir, "bad"))
	if code != exitFailed || !strings.Contains(errs, "coppice: push bad: Describe did not answer within 5s") {
		t.Errorf("%d %s", code, errs)
	}
	for _, path := range []string{"empty", "missing", "."} {
		if code, _, errs := f.run("registry", "push", filepath.Join(dir, path)); code != exitFailed || !strings.HasPrefix(errs, "coppice: push ") {
			t.Errorf("%s: %d %s", path, code, errs)
		}
	}
	code, out, errs := f.run("registry", "push", filepath.Join(dir, "bad"), "-o", "json")
	if code != exitFailed || out != "" {
		t.Errorf("%d %q %q", code, out, errs)
	}
}

type planRequest = *apiv1.PlanRequest

// asked is the request that the fake got last.
func asked[R any](t *testing.T, f *fixture) R {
	t.Helper()
	r, ok := f.fake.asked.(R)
	if !ok {
		t.Fatalf("the node was asked %T", f.fake.asked)
	}
	return r
}
