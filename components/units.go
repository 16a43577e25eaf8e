package components

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

var sizeUnits = []struct {
	suffix string
	bytes  float64
}{
	{"KiB", 1 << 10},
	{"MiB", 1 << 20},
	{"GiB", 1 << 30},
	{"TiB", 1 << 40},
	{"PiB", 1 << 50},
	{"kB", 1e3},
	{"KB", 1e3},
	{"MB", 1e6},
	{"GB", 1e9},
	{"TB", 1e12},
	{"PB", 1e15},
	{"B", 1},
}

// ParseSize reads a size: "256MiB", "1.5GiB", "10MB" or bytes as a bare number. "" is 0.
func ParseSize(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	number, unit := s, 1.0
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(s, u.suffix); ok {
			number, unit = n, u.bytes
			break
		}
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if err != nil || math.IsNaN(v) || v < 0 || v*unit >= 1<<63 {
		return 0, fmt.Errorf("found %q, expected a size such as 256MiB, 1.5GiB, 10MB or a number of bytes", shorten(s))
	}
	return uint64(v * unit), nil
}

// FormatSize is the shortest exact form ParseSize reads back, in binary units where the size is a multiple of one.
func FormatSize(b uint64) string {
	for i := 4; i >= 0; i-- {
		if u := uint64(sizeUnits[i].bytes); b >= u && b%u == 0 {
			return strconv.FormatUint(b/u, 10) + sizeUnits[i].suffix
		}
	}
	return strconv.FormatUint(b, 10) + "B"
}

// ParseDuration reads a positive duration such as "250ms", "5s" or "1m30s".
func ParseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("found %q, expected a duration above zero such as 250ms, 5s or 1m30s", shorten(s))
	}
	return d, nil
}

// ParseBackoff reads the bounds of a restart back-off: "100ms..30s".
func ParseBackoff(s string) (least, most time.Duration, err error) {
	a, b, ok := strings.Cut(s, "..")
	if ok {
		least, err = ParseDuration(a)
		if err == nil {
			most, err = ParseDuration(b)
		}
	}
	if !ok || err != nil || least > most {
		return 0, 0, fmt.Errorf("found %q, expected the least and the most, such as 100ms..30s", shorten(s))
	}
	return least, most, nil
}

// MilliCPU is cores in thousandths, rounded up, so that a share is never lost.
func MilliCPU(cores float64) uint64 {
	if cores <= 0 || math.IsNaN(cores) {
		return 0
	}
	return uint64(math.Ceil(cores*1000 - 1e-9))
}
