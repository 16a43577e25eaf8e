package members

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// TestStorm throws faults at a cluster for a minute, heals it, and wants: all agree in the end, and from five seconds after healing on
// nobody that runs is called dead. COPPICE_SEEDS=n runs so many storms, COPPICE_SEED one.
func TestStorm(t *testing.T) {
	seeds := 12
	if slowRun {
		seeds = 4
	}
	if s := os.Getenv("COPPICE_SEEDS"); s != "" {
		seeds, _ = strconv.Atoi(s)
	}
	first := seedOf(t, 1000)
	if os.Getenv("COPPICE_SEED") != "" {
		seeds = 1
	}
	for seed := first; seed < first+uint64(seeds); seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			size := 2 + int(seed%11)
			tune := func(cfg *Config) {
				if seed%4 == 3 {
					cfg.Profile = WAN
				}
			}
			simulateWith(t, seed, size, tune, func(c *cluster) { storm(c) })
		})
	}
}

// slowRun is set under the race detector.
var slowRun bool

type stormy struct {
	*cluster
	frozen map[peer.ID]bool
}

func storm(c *cluster) {
	s := &stormy{cluster: c, frozen: map[peer.ID]bool{}}
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		s.fault()
		time.Sleep(time.Duration(c.rng.Int64N(int64(3 * time.Second))))
	}
	c.net.Heal()
	c.net.SetLoss(0)
	c.jitter(0, 5*time.Millisecond)
	for _, id := range c.ids {
		if s.frozen[id] {
			s.thaw(id)
		}
		if c.nodes[id] == nil {
			c.start(id)
		}
	}
	time.Sleep(5 * time.Second)
	check := c.never(c.ids...)
	d := c.eventually(2*time.Minute, "all agree", func() error { return c.agree(c.ids) })
	c.t.Logf("%d nodes agree %v after healing", len(c.ids), d+5*time.Second)
	time.Sleep(time.Minute)
	check()
	if err := c.agree(c.ids); err != nil {
		c.t.Errorf("a minute later: %v", err)
	}
	if os.Getenv("COPPICE_LOG") != "" {
		for _, n := range c.nodes {
			fmt.Println(n.id, n.Stats())
		}
	}
}

func (s *stormy) pick() peer.ID { return s.ids[s.rng.IntN(len(s.ids))] }

func (s *stormy) fault() {
	a, b := s.pick(), s.pick()
	running := s.nodes[a] != nil
	switch what := s.rng.IntN(12); {
	case what < 2 && running:
		s.say("kill", a)
		delete(s.frozen, a)
		s.kill(a)
	case what < 4 && !running:
		s.say("start", a)
		s.start(a)
	case what == 4 && running && !s.frozen[a]:
		s.say("freeze", a)
		s.frozen[a] = true
		s.freeze(a)
	case what == 5 && s.frozen[a]:
		s.say("thaw", a)
		delete(s.frozen, a)
		s.thaw(a)
	case what == 6 && a != b:
		s.say("cut", a, b)
		s.net.Cut(a, b, s.rng.IntN(2) == 0)
	case what == 7:
		side := s.ids[:s.rng.IntN(len(s.ids))]
		s.say("partition", side...)
		for _, x := range s.ids {
			for _, y := range s.ids {
				if slices.Contains(side, x) && !slices.Contains(side, y) {
					s.net.Cut(x, y, true)
				}
			}
		}
	case what == 8:
		s.say("heal")
		s.net.Heal()
	case what == 9 && running:
		s.say("starve", a)
		s.nodes[a].clock.jump(time.Duration(s.rng.Int64N(int64(2 * time.Second))))
	case what == 10:
		s.say("loss")
		s.net.SetLoss(float64(s.rng.IntN(2)) * 0.005)
	case what == 11 && running:
		s.nodes[a].UpdateSelf(func(i *Info) { i.Labels = map[string]string{"at": time.Now().String()} })
	}
}

func (s *stormy) say(what string, ids ...peer.ID) {
	if os.Getenv("COPPICE_LOG") == "" {
		return
	}
	var text []string
	for _, id := range ids {
		text = append(text, string(id))
	}
	fmt.Println(time.Now().Format("04:05.000"), "FAULT", what, text)
}

func TestHundredNodesConverge(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	size := 100
	if slowRun {
		size = 40
	}
	simulate(t, seedOf(t, 100), size, func(c *cluster) {
		for _, n := range c.nodes {
			n.locked(func() {
				if few := len(n.partners); size > fanOut && (few < chosen || few > fanOut) {
					t.Errorf("%s keeps company with %d of %d", n.id, few, size)
				}
			})
		}
		for _, id := range c.ids[:20] {
			c.kill(id)
		}
		d := c.eventually(2*time.Second, "twenty deaths are seen by all", func() error { return c.agree(c.ids[20:]) })
		t.Logf("20 of %d killed: all know after %v", size, d)
		c.nodes["n30"].UpdateSelf(func(i *Info) { i.Version = "2" })
		d = c.eventually(time.Second, "an update is known to all", func() error {
			for id, n := range c.nodes {
				if m, _ := n.Member("n30"); m.Version != "2" {
					return fmt.Errorf("%s does not know it", id)
				}
			}
			return nil
		})
		t.Logf("an update: after %v", d)
	})
}
