// Package conform is the conformance suite: it runs any component's binary as a node would, plays every rule of the contract
// (plugins/contract/component/v1/component.proto) with it, and says which hold. It is behind `coppice conform`.
//
// Each check has processes of its own, started by components/runner beside a node that the suite plays itself: it grants leases, and stops granting
// them. What a component does not offer is skipped, and said. Checks that need calls of the component's own services make those that the caller gives.
//
// Goroutines: those of the processes and of the played node, all ended when Run returns.
package conform

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Outcome of one check.
type Outcome string

// Outcomes.
const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped" // not offered, or nothing to try it with; Why says which
)

// Result of one check.
type Result struct {
	Group   string  `json:"group"`
	Check   string  `json:"check"`
	Outcome Outcome `json:"outcome"`
	Why     string  `json:"why,omitempty"`
}

// Call is one call of the component's own services, to try its promises with. It must be one that succeeds on an empty state.
type Call struct {
	Method string // Method, or Service.Method where two services have one of that name
	JSON   string // the request, in protobuf's JSON; "" is an empty one
}

// Config says what to try.
type Config struct {
	File  string // the component's binary or script
	Calls []Call
	// Each is told every result as it comes; may be nil.
	Each func(Result)
	// Only plays the checks that have this text in "group: check"; "" all.
	Only string
	// Patience bounds each single check; 0 = 30 s.
	Patience time.Duration
}

// skip is why a check was not made.
type skip string

func (s skip) Error() string { return string(s) }

// check is one rule. It gets a rig of its own.
type check struct {
	group, name string
	run         func(ctx context.Context, r *rig) error
}

// Report is what came out.
type Report struct {
	File        string                   `json:"file"`
	Type        string                   `json:"type"`
	Version     string                   `json:"version"`
	Features    []string                 `json:"features"`
	Results     []Result                 `json:"results"`
	Description *componentv1.Description `json:"-"`
}

// Count of the results with an outcome.
func (r *Report) Count(o Outcome) int {
	n := 0
	for _, x := range r.Results {
		if x.Outcome == o {
			n++
		}
	}
	return n
}

// Run plays the suite. The error says that it could not be played at all: the file does not start, or is no component; or the context's end.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if cfg.Patience <= 0 {
		cfg.Patience = 30 * time.Second
	}
	file, err := filepath.Abs(cfg.File) // processes have folders of their own
	if err != nil {
		return nil, fmt.Errorf("conform: %w", err)
	}
	cfg.File = file
	first, err := newRig(&cfg, nil)
	if err != nil {
		return nil, err
	}
	desc, err := first.describe(ctx)
	if err := errors.Join(err, first.close()); err != nil {
		return nil, err
	}
	if err := cfg.resolves(desc); err != nil {
		return nil, err
	}
	report := &Report{File: cfg.File, Type: desc.GetType(), Version: desc.GetVersion(), Features: desc.GetFeatures(), Description: desc}
	all := slices.DeleteFunc(suite(), func(c check) bool { return !strings.Contains(c.group+": "+c.name, cfg.Only) })
	if len(all) == 0 {
		return nil, fmt.Errorf("no check is about %q", cfg.Only)
	}
	// Several at once, for most of them wait for time to pass; told in their order.
	results := make([]chan Result, len(all))
	turn := make(chan struct{}, atOnce)
	for i, c := range all {
		results[i] = make(chan Result, 1)
		go func() {
			turn <- struct{}{}
			results[i] <- c.result(ctx, &cfg, desc)
			<-turn
		}()
	}
	for _, r := range results {
		res := <-r
		report.Results = append(report.Results, res)
		if cfg.Each != nil && ctx.Err() == nil {
			cfg.Each(res)
		}
	}
	if err := ctx.Err(); err != nil {
		return report, fmt.Errorf("conform: %w", err)
	}
	return report, nil
}

// atOnce is how many checks are played at the same time.
const atOnce = 4

// resolves says whether the calls that were given are calls of this component.
func (cfg *Config) resolves(desc *componentv1.Description) error {
	r := &rig{cfg: cfg, desc: desc}
	for _, readOnly := range []bool{false, true} {
		calls, err := r.given(readOnly)
		if err != nil {
			return err
		}
		for _, c := range calls {
			if err := protojson.Unmarshal([]byte(c.json), c.empty()); err != nil {
				return fmt.Errorf("--call %s: %w", c.name, err)
			}
		}
	}
	return nil
}

func (c *check) result(ctx context.Context, cfg *Config, desc *componentv1.Description) Result {
	res := Result{Group: c.group, Check: c.name, Outcome: Passed}
	var why skip
	switch err := c.play(ctx, cfg, desc); {
	case err == nil:
	case errors.As(err, &why):
		res.Outcome, res.Why = Skipped, string(why)
	default:
		res.Outcome, res.Why = Failed, err.Error()
	}
	return res
}

func (c *check) play(ctx context.Context, cfg *Config, desc *componentv1.Description) (err error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.Patience)
	defer cancel()
	r, err := newRig(cfg, desc)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := r.close(); cerr != nil && err == nil {
			err = cerr
		}
	}()
	return c.run(ctx, r)
}

func suite() []check {
	var all []check
	for _, part := range [][]check{descriptions(), processes(), lifecycles(), attributes(), states(), calls()} {
		all = append(all, part...)
	}
	return all
}
