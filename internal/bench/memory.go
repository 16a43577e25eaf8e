package bench

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
)

// cpu is the CPU time that all nodes' processes have used, without their components.
func (s *stand) cpu() (time.Duration, error) {
	var all time.Duration
	for _, n := range s.cluster.Alive() {
		use, err := cluster.UsageOf(n.PID())
		if err != nil {
			return 0, err
		}
		all += use.CPU
	}
	return all, nil
}

// memory watches how far the resident memory of the nodes' processes rises, without that of their components. The kernel keeps the peak.
type memory struct {
	nodes  []*cluster.Node
	before []uint64 // bytes
}

// watchMemory begins: the peak is counted from here on.
func (s *stand) watchMemory() (*memory, error) {
	m := &memory{nodes: s.cluster.Alive()}
	for _, n := range m.nodes {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", n.PID()), []byte("5"), 0); err != nil {
			return nil, fmt.Errorf("set back the peak of %s's memory: %w", n.Name, err)
		}
		use, err := cluster.UsageOf(n.PID())
		if err != nil {
			return nil, err
		}
		m.before = append(m.before, use.RSS)
	}
	return m, nil
}

// rise is by how many MiB each node's resident memory was higher at its peak than when watching began.
func (m *memory) rise() ([]float64, error) {
	var out []float64
	for i, n := range m.nodes {
		peak, err := peakRSS(n.PID())
		if err != nil {
			return nil, err
		}
		out = append(out, max(0, float64(peak)-float64(m.before[i]))/(1<<20))
	}
	return out, nil
}

// peakRSS is the highest resident memory of a process since its peak was set back, in bytes.
func peakRSS(pid int) (uint64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("measure process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("the kernel does not tell the peak of a process's memory (VmHWM)")
}
