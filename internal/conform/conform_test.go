package conform_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	"github.com/coppice-project/coppice/internal/conform"
)

// Most of a check is waiting, so more of them run beside each other than there are processors.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

var kvCalls = []conform.Call{
	{Method: "Put", JSON: `{"key": "a", "value": "1"}`},
	{Method: "kv.v1.KV/Txn", JSON: `{"then": [{"put": {"key": "b", "value": "2"}}]}`},
	{Method: "KV.Scan", JSON: `{}`},
}

func play(t *testing.T, file, only string, calls ...conform.Call) *conform.Report {
	t.Helper()
	report, err := conform.Run(t.Context(), conform.Config{File: file, Calls: calls, Only: only})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// TestShippedComponentsConform: every rule holds for each component of this repository.
func TestShippedComponentsConform(t *testing.T) {
	bin := filepath.Join(filepath.Dir(clustertest.Binary(t)), "components")
	for _, c := range []struct {
		name  string
		calls []conform.Call
	}{
		{"counter", []conform.Call{{Method: "Add", JSON: `{"n": 5}`}, {Method: "Get", JSON: `{}`}}},
		{"kv", kvCalls},
		{"bank", []conform.Call{{Method: "Open", JSON: `{"name": "a", "balance": 5}`}, {Method: "Balances"}}},
		{"shop", nil},
		{"shopweb", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // it waits most of the time
			held(t, play(t, filepath.Join(bin, c.name), "", c.calls...))
		})
	}
	t.Run("kv in Python", func(t *testing.T) {
		t.Parallel() // it waits most of the time
		held(t, play(t, clustertest.PythonKV(t, "1.0.0"), "", kvCalls...))
	})
}

func held(t *testing.T, report *conform.Report) {
	t.Helper()
	for _, r := range report.Results {
		if r.Outcome == conform.Failed {
			t.Errorf("%s: %s: %s", r.Group, r.Check, r.Why)
		}
	}
	if n := report.Count(conform.Passed); n < 15 {
		t.Errorf("%d rules were tried and held", n)
	}
}

// TestConformFindsWhatIsWrong: each of these mistakes of an author is found, by the rule that is about it.
func TestConformFindsWhatIsWrong(t *testing.T) {
	for _, c := range []struct{ mistake, check, was, is string }{
		{
			"it answers everybody", "answers its node only",
			"if not self.credential or len(given) == 1", "if True or len(given) == 1",
		},
		{"it dies with the terminal", "ignores SIGINT", "signal.signal(signal.SIGINT, signal.SIG_IGN)", "signal.signal(signal.SIGINT, signal.SIG_DFL)"},
		{"it outlives its lease", "ends itself when its lease lapses", "os._exit(LEASE_LAPSED)", "return"},
		{"it begins without a lease", "begins nothing before its first lease", "await self.lease.granted.wait()", "pass"},
		{"it does not end", "ends with status 0 at Stop", "self.state = contract.STOPPED\n        self.stopped.set()", "self.state = contract.STOPPED"},
		{"it serves while it is frozen", "calls are served while it is started", "if self.state == contract.STARTED:", "if self.state in (contract.STARTED, contract.FROZEN):"},
		{"it takes an old token", "a heartbeat is answered with its number and the newest token", "if (token.incarnation, token.epoch) > (self.token.incarnation, self.token.epoch):", "if True:"},
		{"it takes an unknown attribute", "an unknown name", "if name not in self.attributes:\n                raise Refused", "if False:\n                raise Refused"},
		{"it forgets who asked", "a repeated key gets the same answer", "        if known is not None:", "        if False:"},
		{"it does not look what is asked", "a key that is used for another request", "if reply.fingerprint != fingerprint or reply.http_status:", "if False:"},
		{"it forgets answers over a restart", "answers are remembered by a process", "dedupe += [wire.Dedupe(reply=r) for r in self.replies.values()]", "pass"},
		{"it does not name marks", "each answer names the mark", "context.set_trailing_metadata(((META_MARK, str(mark)),))", "pass"},
		{"it takes damaged states", "a checkpoint that is damaged", "if f.xxh64 != digest(f):", "if False:"},
		{"it takes states that were cut off", "a checkpoint that is damaged", "if self.open or self.buffer:\n            self.fail(\"the stream ends", "if False:\n            self.fail(\"the stream ends"},
		{"it does not seal", "a checkpoint is a stream of frames", "frame.xxh64 = digest(frame)", "pass"},
		{"it is restored while it runs", "Restore is refused while it is started", "if self.state not in (contract.CREATED, contract.FROZEN):\n            await context.abort(Code.FAILED_PRECONDITION, \"cannot restore", "if False:\n            await context.abort(Code.FAILED_PRECONDITION, \"cannot restore"},
		{"its reads write", "a method without side effects changes nothing", "reply = handler(Txn(self.store, read_only=True), request)", "self.store.mark += 1; reply = handler(Txn(self.store, read_only=True), request)"},
		{"its journal leaves something out", "the journal streams each call", "self.journal.append((entry.mark, entry.schema, encoded))", "self.journal.append((entry.mark, entry.schema, encoded)) if entry.mark != 2 else None"},
	} {
		t.Run(c.mistake, func(t *testing.T) {
			t.Parallel() // it waits most of the time
			report := play(t, clustertest.PythonKV(t, "1.0.0", c.was, c.is), c.check, kvCalls...)
			if len(report.Results) != 1 || report.Results[0].Outcome != conform.Failed {
				t.Errorf("the rule %q does not fail: %+v", c.check, report.Results)
			}
		})
	}
}
