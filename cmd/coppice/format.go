package main

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// bytesText is a size for people, in binary units.
func bytesText(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	f, units := float64(n), "KMGTPE"
	i := -1
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	prec := 1
	if f >= 100 {
		prec = 0
	}
	return strconv.FormatFloat(f, 'f', prec, 64) + " " + units[i:i+1] + "iB"
}

// msText is a measured time for people.
func msText(ms float64) string {
	switch {
	case math.IsNaN(ms) || math.IsInf(ms, 0):
		return ""
	case ms == 0:
		return "0 ms"
	case ms < 10:
		return strconv.FormatFloat(ms, 'g', 2, 64) + " ms"
	case ms < 10_000:
		return strconv.FormatFloat(ms, 'f', 0, 64) + " ms"
	}
	return durationText(time.Duration(ms * float64(time.Millisecond)))
}

// durationText is an age or a life for people: two units at most.
func durationText(d time.Duration) string {
	switch s := int64(d.Seconds()); {
	case d < 0:
		return "0s"
	case d < 10*time.Second:
		return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + "s"
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	default:
		return fmt.Sprintf("%dd%02dh", s/86400, s/3600%24)
	}
}

func uptimeText(ms uint64) string { return durationText(time.Duration(ms) * time.Millisecond) }

// optMS and optAge show what may be unknown.
func optMS(ms *float64) string {
	if ms == nil {
		return ""
	}
	return msText(*ms)
}

func optAge(ms *uint64) string {
	if ms == nil {
		return ""
	}
	return uptimeText(*ms)
}

// sinceText is how long ago by this machine's clock.
func (c *cli) sinceText(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return durationText(c.now().Sub(t.AsTime()))
}

// clockText is a moment for people who read a log.
func clockText(t *timestamppb.Timestamp) string {
	if t == nil {
		return "             "
	}
	return t.AsTime().Local().Format("15:04:05.000")
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

// shortID is the end of a peer id, which is where ids differ.
func shortID(id string) string {
	if len(id) <= 12 {
		return id
	}
	return "…" + id[len(id)-10:]
}

// shortDigest is the beginning of a digest.
func shortDigest(d string) string {
	if h, ok := strings.CutPrefix(d, "sha256:"); ok && len(h) > 12 {
		return "sha256:" + h[:12]
	}
	return d
}

func join(s []string) string { return strings.Join(s, " ") }

// pairs is a map as k=v, by key.
func pairs(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	return strings.Join(out, ",")
}

func cpuText(millis uint64) string {
	if millis == 0 {
		return ""
	}
	return strconv.FormatFloat(float64(millis)/1000, 'g', 4, 64)
}

// sizeOr is a size, or nothing for 0, which is not known.
func sizeOr(n uint64) string {
	if n == 0 {
		return ""
	}
	return bytesText(n)
}

// printable keeps what a component wrote from steering the terminal: control characters are shown as U+FFFD.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return r
		}
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '\uFFFD'
		}
		return r
	}, s)
}
