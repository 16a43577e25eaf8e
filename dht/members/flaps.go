package members

import (
	"slices"
	"time"
)

// flaps is what is remembered of a node's deaths.
type flaps struct {
	deaths   []death
	until    time.Time // quarantined
	level    int       // quarantines in a row
	forgiven version   // the last readmission that was carried out
}

// death is the end of one life, or of what was taken for it.
type death struct {
	at time.Time
	of version // the last one known of that life
}

// countDeath notes a death, by verdict or by reboot, and quarantines who dies too often. Locked.
func (m *Members) countDeath(e *entry, old shown, now time.Time) {
	if e == m.self || old.info == nil || !old.state.Running() {
		return
	}
	died := e.verdict.covers(e.info.version()) && e.verdict.kind == Dead
	if !died && (old.info.Boot == 0 || old.info.Boot == e.info.Boot) {
		return
	}
	if e.flaps == nil {
		e.flaps = &flaps{}
	}
	f := e.flaps
	if n := len(f.deaths); n > 0 && now.Sub(f.deaths[n-1].at) > flapForget {
		f.level = 0
	}
	f.deaths = append(f.deaths, death{now, old.info.version()})
	for len(f.deaths) > 0 && now.Sub(f.deaths[0].at) > flapWindow {
		f.deaths = f.deaths[1:]
	}
	if m.cfg.FlapDeaths > 0 && len(f.deaths) > m.cfg.FlapDeaths {
		f.until = now.Add(min(flapMost, flapBackoff<<min(f.level, 8)))
		m.freeAt(f.until)
		f.level++
		m.log.Warn("node dies too often and is not used for a while", "node", m.name(e.id), "deaths", len(f.deaths), "until", f.until)
	}
}

// forgive carries out a readmission that is heard for the first time: deaths before it count no more, later ones do. Locked.
func (m *Members) forgive(e *entry) {
	f := e.flaps
	if f == nil || e.info.readmitted.compare(f.forgiven) <= 0 {
		return
	}
	f.forgiven = e.info.readmitted
	f.deaths = slices.DeleteFunc(f.deaths, func(d death) bool { return d.of.compare(f.forgiven) < 0 })
	f.level = min(f.level, 1)
	if len(f.deaths) <= m.cfg.FlapDeaths {
		f.until, f.level = time.Time{}, 0
	}
}

func (m *Members) endQuarantines(now time.Time) {
	if m.nextFree.IsZero() || now.Before(m.nextFree) {
		return
	}
	m.nextFree = time.Time{}
	for _, e := range m.order {
		switch {
		case e.flaps == nil || e.shown.state != Quarantined:
		case now.Before(e.flaps.until):
			m.freeAt(e.flaps.until)
		default:
			e.flaps.deaths = nil
			m.touch(e, "quarantine")
		}
	}
}

// Flapping says whether this node has died, or was taken for dead, so often of late that the others hold it quarantined, as far as it can tell. In
// its own view it is alive all the same: somebody has to be, where it is alone.
func (m *Members) Flapping() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Now().Before(m.flapping)
}

// ended counts an end of this node's own life. Locked.
func (m *Members) ended() {
	now := time.Now()
	m.ends = slices.DeleteFunc(append(m.ends, now.UnixMilli()), func(at int64) bool {
		return at > now.UnixMilli() || now.UnixMilli()-at > flapWindow.Milliseconds()
	})
	m.ends = m.ends[max(0, len(m.ends)-maxEnds):]
	if m.cfg.FlapDeaths > 0 && len(m.ends) > m.cfg.FlapDeaths {
		m.flapping = now.Add(flapBackoff)
		m.log.Warn("this node dies too often: the others do not use it for a while", "ends", len(m.ends), "until", m.flapping)
	}
	m.unsaved = true
}

// freeAt notes that a quarantine ends then. Locked.
func (m *Members) freeAt(at time.Time) {
	if m.nextFree.IsZero() || at.Before(m.nextFree) {
		m.nextFree = at
	}
}
