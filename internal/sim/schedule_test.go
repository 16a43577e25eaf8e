package sim

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coppice-project/coppice/internal/sim/history"
)

const (
	maxLog = 50_000          // lines of events kept of a schedule
	tail   = 80              // lines of them printed with a failure
	decide = 5 * time.Second // of porcupine for one history, outside the bubble
	slow   = 2 * time.Second // a schedule that takes longer is named
)

// kind is one way of setting up and stressing a cluster.
type kind struct {
	name string
	play func(s *schedule)
}

// schedule is one run of one kind from one seed: its dice, its log, and what went wrong.
type schedule struct {
	t     *testing.T
	kind  string
	seed  uint64
	begun time.Time
	over  bool // the bubble has ended, and with it the schedule's time

	mu       sync.Mutex // guards the rest
	rng      *rand.Rand
	log      []string
	failures []string
	checks   []func() (history.Verdict, string)
	count    counts
}

// counts is what a schedule had to do.
type counts struct {
	Schedules, Answers, InDoubt, Faults, Undecided int
	Standbys                                       int // that took over
	Simulated                                      time.Duration
	Played                                         time.Duration // of real time, histories not counted
	Heal, OwnedAfter                               time.Duration // the longest until all was well again
}

func (c *counts) add(o counts) {
	c.Schedules += o.Schedules
	c.Answers += o.Answers
	c.InDoubt += o.InDoubt
	c.Faults += o.Faults
	c.Undecided += o.Undecided
	c.Standbys += o.Standbys
	c.Simulated += o.Simulated
	c.Played += o.Played
	c.Heal = max(c.Heal, o.Heal)
	c.OwnedAfter = max(c.OwnedAfter, o.OwnedAfter)
}

func (c counts) String() string {
	return fmt.Sprintf("%d schedules, %.1f h simulated, %d faults, %d answers, %d in doubt, %d histories undecided, %d standbys took over; all is well at most %.1f s after healing",
		c.Schedules, c.Simulated.Hours(), c.Faults, c.Answers, c.InDoubt, c.Undecided, c.Standbys, c.Heal.Seconds())
}

// play runs one schedule. Nothing is reported to t, but for what Go itself finds (a deadlock, a leak).
func play(t *testing.T, k kind, seed uint64) *schedule {
	t.Helper()
	s := &schedule{kind: k.name, seed: seed, rng: rand.New(rand.NewPCG(seed, hashOf(k.name)))}
	began := time.Now()
	defer func() {
		if took := time.Since(began); took > slow {
			t.Logf("schedule %s took %s, %s of it in the bubble", s.id(), took.Round(time.Millisecond), s.count.Played.Round(time.Millisecond))
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		s.t, s.begun = t, time.Now()
		k.play(s)
		s.count.Simulated = time.Since(s.begun)
	})
	s.over = true
	s.count.Played = time.Since(began)
	for _, check := range s.checks {
		switch v, why := check(); v {
		case history.Impossible:
			s.failf("not linearizable: %s", why)
		case history.Undecided:
			s.count.Undecided++
		case history.Fits:
		}
	}
	s.count.Schedules = 1
	return s
}

func hashOf(s string) uint64 {
	h := uint64(14695981039346656037)
	for _, b := range []byte(s) {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h
}

func (s *schedule) id() string { return fmt.Sprintf("%s/%d", s.kind, s.seed) }

func (s *schedule) now() time.Duration {
	if s.over {
		return s.count.Simulated
	}
	return time.Since(s.begun)
}

// logf notes an event.
func (s *schedule) logf(format string, args ...any) {
	line := fmt.Sprintf("%9.4f %s", s.now().Seconds(), fmt.Sprintf(format, args...))
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.log) < maxLog {
		s.log = append(s.log, line)
	}
	if os.Getenv("COPPICE_SIM_LIVE") != "" {
		fmt.Println(s.id(), line)
	}
}

// failf notes that something that must hold does not.
func (s *schedule) failf(format string, args ...any) {
	s.logf("FAILED "+format, args...)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.failures) < 5 {
		s.failures = append(s.failures, fmt.Sprintf(format, args...))
	}
}

func (s *schedule) failed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.failures) > 0
}

// report says what failed, how to see it again, and the end of the log.
func (s *schedule) report() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log
	if len(log) > tail {
		log = log[len(log)-tail:]
	}
	return fmt.Sprintf("schedule %s: %s\nmake sim SEED=%s replays it; add the seed to internal/sim/testdata/corpus\nthe end of its events:\n%s",
		s.id(), strings.Join(s.failures, "\n  and "), s.id(), strings.Join(log, "\n"))
}

// ===== dice =====

func (s *schedule) draw() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rng.Uint64()
}

func (s *schedule) intn(n int) int { return int(s.draw() % uint64(n)) }

// oneIn is true once in n.
func (s *schedule) oneIn(n int) bool { return s.intn(n) == 0 }

// between draws a duration.
func (s *schedule) between(from, to time.Duration) time.Duration {
	return from + time.Duration(s.draw()%uint64(to-from+1))
}

// dice returns dice of its own for a goroutine, so that what it draws does not depend on when others draw.
func (s *schedule) dice() *rand.Rand { return rand.New(rand.NewPCG(s.draw(), s.seed)) }
