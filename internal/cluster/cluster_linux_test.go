package cluster

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestWaitForSaysWhy(t *testing.T) {
	err := WaitFor(t.Context(), 30*time.Millisecond, "the moon", func(ctx context.Context) (bool, error) {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		return false, errors.New("it is day")
	})
	if err == nil || err.Error() != "waited 30ms for the moon: it is day" {
		t.Errorf("%v", err)
	}
}

func TestLoopbackPortsDiffer(t *testing.T) {
	l, err := NewLoopback(20)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for i := 1; i <= 20; i++ {
		for _, a := range append(l.Args(i), l.HTTP(i)) {
			if strings.Contains(a, "127.0.0.1") && seen[a] && a != l.HTTP(i) {
				t.Errorf("%s twice", a)
			}
			seen[a] = true
		}
	}
	if err := l.Cut(1); !errors.Is(err, ErrNoCut) {
		t.Errorf("cut: %v", err)
	}
}

// What a killed process leaves behind becomes ours, is found and reaped.
func TestOrphansAreFound(t *testing.T) {
	if err := BecomeReaper(); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command("sh", "-c", "sleep 60 & echo $!; wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if _, err := out.Read(buf); err != nil {
		t.Fatal(err)
	}
	below, err := descendants(cmd.Process.Pid)
	if err != nil || len(below) != 1 {
		t.Fatalf("below the shell: %v %v", below, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the shell was not killed")
	}
	ours, err := descendants(os.Getpid())
	if err != nil || !slices.Contains(ours, below[0]) {
		t.Fatalf("ours: %v, want %d among them (%v)", ours, below[0], err)
	}
	if err := syscall.Kill(below[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	reap(below)
	if _, there := statFields(below[0]); there {
		t.Error("it is still in the process table")
	}
}

func TestNamespacesAreLinked(t *testing.T) {
	n, err := NewNamespaces(2)
	if err != nil && os.Getenv("CI") != "" && os.Getenv("COPPICE_NO_NETNS") == "" { // as clustertest.NotPermitted
		t.Fatal(err)
	}
	if err != nil {
		t.Skip(err)
	}
	defer func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Skip(err)
	}
	ping := func(from int, wait string) error {
		cmd := exec.Command(bash, "-c", "timeout "+wait+" bash -c '</dev/tcp/10.77.0.2/1'")
		var out strings.Builder
		cmd.Stderr = &out
		if err := n.Start(from, cmd); err != nil {
			return err
		}
		if err := cmd.Wait(); err != nil {
			return errors.New(out.String())
		}
		return nil
	}
	// A refusal has come from the other node's kernel: it is reached.
	for _, from := range []int{0, 1} {
		if err := ping(from, "20"); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("from %d: %v", from, err)
		}
	}
	if err := n.Cut(2); err != nil {
		t.Fatal(err)
	}
	if err := ping(1, "0.5"); err == nil || strings.Contains(err.Error(), "refused") {
		t.Errorf("over a cut link: %v", err)
	}
	if err := n.Heal(2); err != nil {
		t.Fatal(err)
	}
	if err := WaitFor(t.Context(), 20*time.Second, "the link", func(context.Context) (bool, error) {
		err := ping(1, "1")
		return err != nil && strings.Contains(err.Error(), "refused"), nil
	}); err != nil {
		t.Error(err)
	}
}
