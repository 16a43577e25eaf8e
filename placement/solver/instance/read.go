package instance

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Formats of instances.
const (
	groupFormat      = "placement-p1/1"
	assignmentFormat = "placement-p2/1"
)

// File is a problem as read: exactly one of the two is set.
type File struct {
	Group      *Group
	Assignment *Assignment
}

// Name of the instance.
func (f *File) Name() string {
	if f.Group != nil {
		return f.Group.Name
	}
	return f.Assignment.Name
}

// Read reads an instance, .json or .json.gz.
func Read(path string) (*File, error) {
	raw, err := content(path)
	if err != nil {
		return nil, err
	}
	return Parse(path, raw)
}

// content unpacks a file.
func content(path string) (_ []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the instance: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var r io.Reader = f
	if strings.HasSuffix(path, ".gz") {
		z, err := gzip.NewReader(f)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		r = z
	}
	var b bytes.Buffer
	if n, err := b.ReadFrom(io.LimitReader(r, maxFile+1)); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	} else if n > maxFile {
		return nil, fmt.Errorf("read %s: more than %d MiB", path, maxFile>>20)
	}
	return b.Bytes(), nil
}

// Parse reads an instance from memory; path is for messages only.
func Parse(path string, raw []byte) (f *File, err error) {
	defer catch(&err)
	s := &scanner{file: path, in: raw}
	common := map[string]bool{"format": true, "name": true, "n": true, "regions": true, "nodes": true, "latency": true, "current": true, "provenance": false}
	group := map[string]bool{"anchors": true, "constraints": true, "utility": true, "cost": true}
	assignment := map[string]bool{"components": true, "anti_affinity": true, "bindings": true, "quality": true, "price_coef": true}
	format := s.format()
	want := group
	switch format {
	case groupFormat:
	case assignmentFormat:
		want = assignment
	}
	for k, v := range common {
		want[k] = v
	}
	s.at = 0
	at := s.fields("the instance", want)
	s.end()
	if format == groupFormat {
		return &File{Group: s.group(at)}, nil
	}
	return &File{Assignment: s.assignment(at)}, nil
}

// format looks for the field format without judging the others.
func (s *scanner) format() string {
	s.expect('{', "the instance: an object")
	for first := true; s.peek() != '}'; first = false {
		if !first {
			s.expect(',', "the instance: a comma")
			s.peek()
		}
		name := s.text("the instance: a field name")
		s.expect(':', "the instance: a colon")
		s.peek()
		if name != "format" {
			s.skip(name, 0)
			continue
		}
		at := s.at
		v := s.text("format")
		if v != groupFormat && v != assignmentFormat {
			s.fail(at, "format %q, want %s or %s", v, groupFormat, assignmentFormat)
		}
		return v
	}
	s.fail(0, "the instance: field \"format\" is missing")
	return ""
}

// head reads what both problems have.
func (s *scanner) head(at map[string]int, assignment bool) (name string, n, regions int, nodes Nodes, l Latency) {
	s.at = at["name"]
	name = s.text("name")
	s.at = at["n"]
	n = s.whole("n", 1, MaxNodes)
	s.at = at["regions"]
	regions = s.whole("regions", 1, 1000)
	s.at = at["nodes"]
	nodes = s.nodes(n, regions, assignment)
	s.at = at["latency"]
	l = s.latency(n)
	return name, n, regions, nodes, l
}

func (s *scanner) nodes(n, regions int, assignment bool) Nodes {
	var out Nodes
	want := map[string]bool{
		"region": true, "alive": true, "blacklisted": true, "load5": true, "live_slices": true, "cpu_ghz": true, "free_cpu": true,
		"mem_pressure": true, "price": true, "quarantined": assignment, "cpu_m": assignment, "mem_mib": assignment,
	}
	s.object("nodes", want, func(name string) {
		switch name {
		case "region":
			out.Region = s.column(name, n, 1, regions)
			for i := range out.Region {
				out.Region[i]--
			}
		case "alive":
			out.Alive = s.flags(name, n)
		case "blacklisted":
			out.Blacklisted = s.flags(name, n)
		case "quarantined":
			out.Quarantined = s.flags(name, n)
		case "cpu_m":
			out.CPU = s.amounts(name, n)
		case "mem_mib":
			out.Memory = s.amounts(name, n)
		default:
			*map[string]*[]float64{
				"load5": &out.Load5, "live_slices": &out.LiveSlices, "cpu_ghz": &out.CPUGHz, "free_cpu": &out.FreeCPU,
				"mem_pressure": &out.MemPressure, "price": &out.Price,
			}[name] = s.floats(name, n)
		}
	})
	return out
}

func (s *scanner) amounts(what string, n int) []int64 {
	at := s.at
	out := make([]int64, 0, n)
	s.array(what, func(int) { out = append(out, int64(s.whole(what, 0, maxCapacity))) })
	if len(out) != n {
		s.fail(at, "%s: %d entries, want %d", what, len(out), n)
	}
	return out
}

// list reads whole numbers in [0, below).
func (s *scanner) list(what string, below int) []int32 {
	out := []int32{}
	s.array(what, func(int) { out = append(out, int32(s.whole(what, 0, below-1))) })
	return out
}

// term reads [x_min, x_max, weight].
func (s *scanner) term(what string) Term {
	at := s.at
	var v [3]float64
	n := 0
	s.array(what, func(i int) {
		if i > 2 {
			s.fail(s.at, "%s: want [x_min, x_max, weight]", what)
		}
		v[i] = s.number(what, [3]float64{-1e300, -1e300, 0}[i])
		n++
	})
	if n != 3 || v[1] <= v[0] {
		s.fail(at, "%s: want [x_min, x_max, weight] with x_min below x_max", what)
	}
	return Term{v[0], v[1], v[2]}
}
