// Package plantedtest shows that unit tests notice rules that are broken on purpose (internal/planted), as internal/sim shows it of schedules. It is
// for tests that are built with the tag "planted".
package plantedtest

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// Bug is one rule broken on purpose, and the test of the calling package that must fail then.
type Bug struct{ name, test, rule string }

// Fails says that a test fails with a bug, which breaks a rule.
func Fails(test, bug, rule string) Bug { return Bug{bug, test, rule} }

// within bounds one test with its bug: most of them wait in virtual time.
const within = 2 * time.Minute

// Caught fails for each bug with which its test passes. Each is tried in a process of its own: some of the bugs end it, or have it wait for ever.
func Caught(t *testing.T, bugs ...Bug) {
	t.Helper()
	if os.Getenv("COPPICE_PLANTED") != "" {
		t.Skip("a bug is switched on already")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	for _, b := range bugs {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			begun := time.Now()
			out, failed := run(t.Context(), exe, b)
			switch {
			case !failed:
				t.Errorf("%s: %s passes although it is not so that %s\n%s", b.name, b.test, b.rule, out)
			case !strings.Contains(out, "--- FAIL: "+b.test), strings.Contains(out, "test timed out"):
				t.Errorf("%s: %s did not come to an end, or was not found\n%s", b.name, b.test, out)
			default:
				t.Logf("%s: %s fails, after %s", b.name, b.test, time.Since(begun).Round(10*time.Millisecond))
			}
		})
	}
	wg.Wait()
}

// run runs a bug's test with the bug, and returns the end of what it says.
func run(ctx context.Context, exe string, b Bug) (out string, failed bool) {
	ctx, cancel := context.WithTimeout(ctx, within+10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "-test.run=^"+b.test+"$", "-test.v", "-test.timeout="+within.String())
	cmd.Env = append(os.Environ(), "COPPICE_PLANTED="+b.name)
	raw, err := cmd.CombinedOutput()
	const most = 8000
	return string(raw[max(0, len(raw)-most):]), err != nil
}
