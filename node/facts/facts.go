// Package facts observes the machine a node runs on: what it offers and how loaded it is. It only measures; the node publishes what
// it finds as records with an age.
//
// Goroutines: none; the caller samples as often as it likes.
package facts

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"time"

	"github.com/shirou/gopsutil/v4/cpu"
	"github.com/shirou/gopsutil/v4/disk"
	"github.com/shirou/gopsutil/v4/load"
	"github.com/shirou/gopsutil/v4/mem"
	"github.com/shirou/gopsutil/v4/net"
	"github.com/shirou/gopsutil/v4/process"
)

const mib = 1 << 20

// Facts are named numbers. The unit is the end of the name (_mib, _ghz, _percent, _per_s); load1, load5 and load15 have none.
type Facts map[string]float64

// Static is what does not change while the node runs.
type Static struct {
	CPUs        int
	GHz         float64 // of one CPU; 0 when the machine does not say
	MemoryBytes uint64
	DiskBytes   uint64
}

// Sensor measures one machine and this process. Not safe for concurrent use: rates are differences to the sample before.
type Sensor struct {
	dir    string
	static Static
	self   *process.Process

	at      time.Time
	busy    float64
	total   float64
	sent    uint64
	recv    uint64
	selfCPU float64
	avg     map[string]*averages
}

// New looks at the machine once. dir is the data folder, whose disk is measured. What cannot be read is left out, and said in err
// beside a sensor that still works.
func New(ctx context.Context, dir string) (*Sensor, error) {
	s := &Sensor{dir: dir, avg: map[string]*averages{}, static: Static{CPUs: runtime.NumCPU()}}
	var errs []error
	if info, err := cpu.InfoWithContext(ctx); err != nil {
		errs = append(errs, fmt.Errorf("cpu speed: %w", err))
	} else if len(info) > 0 {
		s.static.GHz = info[0].Mhz / 1000
	}
	if vm, err := mem.VirtualMemoryWithContext(ctx); err != nil {
		errs = append(errs, fmt.Errorf("memory: %w", err))
	} else {
		s.static.MemoryBytes = vm.Total
	}
	if du, err := disk.UsageWithContext(ctx, dir); err != nil {
		errs = append(errs, fmt.Errorf("disk of %s: %w", dir, err))
	} else {
		s.static.DiskBytes = du.Total
	}
	self, err := process.NewProcessWithContext(ctx, int32(os.Getpid()))
	if err != nil {
		errs = append(errs, fmt.Errorf("own process: %w", err))
	}
	s.self = self
	return s, errors.Join(errs...)
}

// Static returns what New found.
func (s *Sensor) Static() Static { return s.static }

// Sample measures now. It returns what it could read, and an error that names what it could not.
func (s *Sensor) Sample(ctx context.Context) (Facts, error) {
	f := Facts{"cpus": float64(s.static.CPUs)}
	var errs []error
	now := time.Now()
	elapsed := now.Sub(s.at).Seconds()
	first := s.at.IsZero()
	s.at = now
	if l, err := load.AvgWithContext(ctx); err != nil {
		errs = append(errs, fmt.Errorf("load: %w", err))
	} else {
		f["load1"], f["load5"], f["load15"] = l.Load1, l.Load5, l.Load15
	}
	if vm, err := mem.VirtualMemoryWithContext(ctx); err != nil {
		errs = append(errs, fmt.Errorf("memory: %w", err))
	} else {
		f["memory_mib"], f["free_mib"], f["memory_percent"] = float64(vm.Total)/mib, float64(vm.Available)/mib, vm.UsedPercent
	}
	if du, err := disk.UsageWithContext(ctx, s.dir); err != nil {
		errs = append(errs, fmt.Errorf("disk of %s: %w", s.dir, err))
	} else {
		f["disk_mib"], f["free_disk_mib"] = float64(du.Total)/mib, float64(du.Free)/mib
	}
	errs = append(errs, s.cpu(ctx, f, first), s.network(ctx, f, first, elapsed), s.own(ctx, f, first, elapsed))
	s.average(f, now)
	for k, v := range f {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			delete(f, k)
		} else {
			f[k] = rounded(v)
		}
	}
	return f, errors.Join(errs...)
}

// rounded keeps five digits that count: the rest is noise, and half of what telling it costs.
func rounded(v float64) float64 {
	if v == 0 {
		return 0
	}
	unit := math.Pow(10, math.Floor(math.Log10(math.Abs(v)))-4)
	if unit >= 1 {
		return math.Round(v/unit) * unit
	}
	return math.Round(v/unit) / math.Round(1/unit) // so that the quotient is the closest to the decimal
}

func (s *Sensor) cpu(ctx context.Context, f Facts, first bool) error {
	t, err := cpu.TimesWithContext(ctx, false)
	if err != nil || len(t) == 0 {
		return fmt.Errorf("cpu time: %w", err)
	}
	total := t[0].User + t[0].System + t[0].Idle + t[0].Nice + t[0].Iowait + t[0].Irq + t[0].Softirq + t[0].Steal
	busy := total - t[0].Idle - t[0].Iowait
	if !first && total > s.total {
		used := (busy - s.busy) / (total - s.total)
		f["cpu_percent"] = 100 * used
		if s.static.GHz > 0 {
			f["free_cpu_ghz"] = (1 - used) * s.static.GHz * float64(s.static.CPUs)
		}
	}
	s.busy, s.total = busy, total
	return nil
}

func (s *Sensor) network(ctx context.Context, f Facts, first bool, elapsed float64) error {
	io, err := net.IOCountersWithContext(ctx, false)
	if err != nil || len(io) == 0 {
		return fmt.Errorf("network counters: %w", err)
	}
	if !first && elapsed > 0 && io[0].BytesSent >= s.sent && io[0].BytesRecv >= s.recv {
		f["sent_bytes_per_s"], f["received_bytes_per_s"] = float64(io[0].BytesSent-s.sent)/elapsed, float64(io[0].BytesRecv-s.recv)/elapsed
	}
	s.sent, s.recv = io[0].BytesSent, io[0].BytesRecv
	return nil
}

// own measures the node's process itself.
func (s *Sensor) own(ctx context.Context, f Facts, first bool, elapsed float64) error {
	if s.self == nil {
		return nil
	}
	m, err := s.self.MemoryInfoWithContext(ctx)
	if err != nil {
		return fmt.Errorf("own memory: %w", err)
	}
	f["node_rss_mib"] = float64(m.RSS) / mib
	t, err := s.self.TimesWithContext(ctx)
	if err != nil {
		return fmt.Errorf("own cpu time: %w", err)
	}
	used := t.User + t.System
	if !first && elapsed > 0 {
		f["node_cpu_percent"] = 100 * (used - s.selfCPU) / elapsed
	}
	s.selfCPU = used
	return nil
}

// averaged facts get moving averages over 1, 5 and 15 minutes beside them, as load has from the kernel.
var averaged = []string{"cpu_percent", "free_mib"}

type averages struct {
	at time.Time
	v  [3]float64
}

func (s *Sensor) average(f Facts, now time.Time) {
	for _, name := range averaged {
		v, ok := f[name]
		if !ok {
			continue
		}
		a := s.avg[name]
		if a == nil {
			a = &averages{at: now, v: [3]float64{v, v, v}}
			s.avg[name] = a
		}
		dt := now.Sub(a.at).Minutes()
		for i, minutes := range []float64{1, 5, 15} {
			a.v[i] += (v - a.v[i]) * (1 - math.Exp(-dt/minutes))
			f[fmt.Sprintf("%s_avg%d", name, int(minutes))] = a.v[i]
		}
		a.at = now
	}
}

// Changed says whether b differs from a by enough to be told at once: a tenth of the value, or one whole unit for small numbers.
func Changed(a, b Facts) bool {
	for k, v := range b {
		old, ok := a[k]
		if !ok {
			return true
		}
		if math.Abs(v-old) > math.Max(1, math.Abs(old)/10) {
			return true
		}
	}
	return false
}
