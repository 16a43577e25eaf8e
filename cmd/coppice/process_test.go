package main

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// asCommand makes the test binary be coppice.
const asCommand = "COPPICE_TEST_AS_COMMAND"

func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	return cmd
}

func exitStatus(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

func TestProcessEndsWithItsStatus(t *testing.T) {
	newFixture(t)
	for args, want := range map[string]int{"nodes -o json": 0, "undo x": 1, "frob": 2, "__component": 2, "__exec": 2} {
		cmd := command(t, strings.Fields(args)...)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if got := exitStatus(cmd.Run()); got != want || want != 0 && (out.Len() > 0 || errs.Len() == 0) {
			t.Errorf("%s: status %d, want %d\n%s%s", args, got, want, &out, &errs)
		}
	}
}

func TestInterruptedStreamIsDoneInterruptedWorkIsNot(t *testing.T) {
	f := fixtureWith(t, &fake{hang: true, asking: make(chan struct{})})
	cmd := command(t, "events", "-f")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); err != nil || !strings.Contains(line, "failover") {
		t.Fatalf("%q %v", line, err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(r)
	if got := exitStatus(cmd.Wait()); got != 0 || errs.Len() > 0 || len(rest) > 0 || err != nil {
		t.Errorf("an interrupted stream: status %d %q %q %v", got, &errs, rest, err)
	}

	cmd = command(t, "nodes")
	errs.Reset()
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-f.fake.asking
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := exitStatus(cmd.Wait()); got != 1 || errs.String() != "coppice: nodes: interrupted\n" {
		t.Errorf("interrupted work: status %d %q", got, &errs)
	}
}
