package node

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/node/gateway"
)

// webApps gives the gateway the http interfaces that applications expose.
type webApps struct{ n *Node }

// Names implements gateway.Apps.
func (w webApps) Names() []string {
	var out []string
	for _, a := range w.n.applications() {
		for _, c := range a.GetManifest().GetComponents() {
			if len(c.GetExpose()) > 0 && !slices.Contains(out, a.GetName()) {
				out = append(out, a.GetName())
			}
		}
	}
	return out
}

// Handler implements gateway.Apps: the component whose exposed path is the longest that path begins with.
func (w webApps) Handler(application, path string) (http.Handler, error) {
	a, ok := w.n.application(application)
	if !ok {
		return nil, gateway.ErrNotFound
	}
	best, target := "", ""
	for _, c := range a.GetManifest().GetComponents() {
		for _, at := range c.GetExpose() {
			if under(path, at) && len(at) >= len(best) {
				best, target = at, components.ComponentKey(application, c.GetName())
			}
		}
	}
	if target == "" {
		return nil, gateway.ErrNotFound
	}
	h := w.n.router.HTTP(target)
	if trimmed := strings.TrimSuffix(best, "/"); trimmed != "" {
		return http.StripPrefix(trimmed, rooted(h)), nil
	}
	return h, nil
}

// under says whether path lies at or below at.
func under(path, at string) bool {
	at = strings.TrimSuffix(at, "/")
	return path == at || strings.HasPrefix(path, at+"/") || (at == "" && strings.HasPrefix(path, "/"))
}

// rooted gives a request without a path the root's.
func rooted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "" {
			r.URL.Path = "/"
		}
		h.ServeHTTP(w, r)
	})
}

// metrics is what Prometheus reads of this node.
func (n *Node) metrics() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), &collector{n: n})
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}

// collector reads the node's counters when it is asked.
type collector struct{ n *Node }

var (
	descMembers   = prometheus.NewDesc("coppice_members", "Members by state, as this node sees them.", []string{"state"}, nil)
	descInstances = prometheus.NewDesc("coppice_instances", "Instances on this node by state.", []string{"state"}, nil)
	descIndex     = prometheus.NewDesc("coppice_arbiter_index", "Index of the arbiter's log this node has seen.", nil, nil)
	descLeader    = prometheus.NewDesc("coppice_arbiter_leader", "1 where this node leads the arbiter.", nil, nil)
	descCalls     = prometheus.NewDesc("coppice_calls_total", "Calls that this node's router carried, by outcome.", []string{"outcome"}, nil)
	descSeq       = prometheus.NewDesc("coppice_checkpoint_seq", "Sequence of the last acknowledged checkpoint of an instance here.", []string{"instance"}, nil)
	descAge       = prometheus.NewDesc("coppice_checkpoint_age_seconds", "Age of the last acknowledged checkpoint of an instance here.", []string{"instance"}, nil)
	descUnsaved   = prometheus.NewDesc("coppice_calls_since_checkpoint", "What an instance here has answered since its last acknowledged checkpoint.", []string{"instance"}, nil)
	descHolders   = prometheus.NewDesc("coppice_checkpoint_holders_alive", "Living nodes that hold the last acknowledged checkpoint of an instance here.", []string{"instance"}, nil)
	descCorrupt   = prometheus.NewDesc("coppice_pages_corrupt_total", "Pages found wrong on this node's disk since it started.", nil, nil)
	descRepaired  = prometheus.NewDesc("coppice_pages_repaired_total", "Of these, fetched again from other nodes.", nil, nil)
	descScrubbed  = prometheus.NewDesc("coppice_pages_scrubbed_bytes_total", "What the scrubber has read and checked since the node started.", nil, nil)
	descGate      = prometheus.NewDesc("coppice_gate_calls_total", "Calls that passed an instance's gate here.", []string{"instance", "result"}, nil)
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descMembers, descInstances, descIndex, descLeader, descCalls, descSeq, descAge, descUnsaved, descHolders, descCorrupt, descRepaired, descScrubbed, descGate} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	n := c.n
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	states := map[string]int{}
	for _, m := range n.members.All() {
		states[m.State.String()]++
	}
	for s, k := range states {
		gauge(descMembers, float64(k), s)
	}
	own := map[string]int{}
	for _, in := range n.sup.Infos() {
		own[string(in.State)]++
		gauge(descSeq, float64(in.Saved.Seq), in.Instance)
		if in.Saved.Seq > 0 {
			if !in.Saved.At.IsZero() {
				gauge(descAge, time.Since(in.Saved.At).Seconds(), in.Instance)
			}
			gauge(descHolders, float64(n.living(in.Saved.Holders)), in.Instance)
		}
		gauge(descUnsaved, float64(in.Unsaved), in.Instance)
		if m := n.router.Local(in.Instance); m != nil {
			st := m.Stats()
			count(descGate, float64(st.Calls-st.Errors), in.Instance, "ok")
			count(descGate, float64(st.Errors), in.Instance, "error")
		}
	}
	for s, k := range own {
		gauge(descInstances, float64(k), s)
	}
	pages := n.blobs.Usage()
	count(descCorrupt, float64(pages.Corrupt))
	count(descRepaired, float64(pages.Repaired))
	count(descScrubbed, float64(pages.Scrub.Bytes))
	st := n.arbiter.Status()
	gauge(descIndex, float64(st.Index))
	gauge(descLeader, float64(btoi(st.HasLeader && st.Leader == n.id)))
	rs := n.router.Stats()
	count(descCalls, float64(rs.Calls.Load()), "all")
	count(descCalls, float64(rs.Retried.Load()), "retried")
	count(descCalls, float64(rs.Redirected.Load()), "redirected")
	count(descCalls, float64(rs.Failed.Load()), "failed")
}
