package facts

import (
	"strconv"
	"testing"
	"time"
)

func TestSampleMeasuresThisMachine(t *testing.T) {
	s, err := New(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sample(t.Context()); err != nil {
		t.Fatal(err)
	}
	f, err := s.Sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cpus", "load5", "free_mib", "free_disk_mib", "node_rss_mib"} {
		if _, ok := f[name]; !ok {
			t.Errorf("%s is missing in %v", name, f)
		}
	}
	if s.Static().MemoryBytes == 0 || s.Static().DiskBytes == 0 {
		t.Errorf("static: %+v", s.Static())
	}
}

func TestAveragesFollowSlowly(t *testing.T) {
	s := &Sensor{avg: map[string]*averages{}}
	start := time.Now()
	s.average(Facts{"cpu_percent": 0}, start)
	f := Facts{"cpu_percent": 100}
	s.average(f, start.Add(time.Minute))
	if !(f["cpu_percent_avg1"] > f["cpu_percent_avg5"] && f["cpu_percent_avg5"] > f["cpu_percent_avg15"] && f["cpu_percent_avg15"] > 0) {
		t.Errorf("averages %v", f)
	}
}

func TestChanged(t *testing.T) {
	if Changed(Facts{"free_mib": 1000, "load1": 0.1}, Facts{"free_mib": 1050, "load1": 0.9}) {
		t.Error("small changes are told")
	}
	if !Changed(Facts{"free_mib": 1000}, Facts{"free_mib": 800}) {
		t.Error("a change by a fifth is not told")
	}
}

func TestRounded(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 12.3456789: "12.346", 24105.26: "24105", 1234567: "1234600", 0.000123456: "0.00012346", -3.3333333: "-3.3333", 99999.7: "100000"} {
		if got := strconv.FormatFloat(rounded(v), 'f', -1, 64); got != want {
			t.Errorf("%v is told as %s, want %s", v, got, want)
		}
	}
}
