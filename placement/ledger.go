package placement

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// What a Ledger keeps at most: the newest decisions, and of requests as many bytes as this, compressed. The oldest go first.
const (
	LedgerEntries = 128
	LedgerBytes   = 8 << 20
	whatLength    = 240
)

// Entry is what is told of a decision.
type Entry struct {
	Time      time.Time `json:"time"`
	Digest    string    `json:"digest,omitempty"` // of its request; "": there was none
	Feasible  bool      `json:"feasible"`
	Optimal   bool      `json:"optimal"`
	Before    float64   `json:"objective_before"`
	Objective float64   `json:"objective"`
	Bound     float64   `json:"bound"`
	Places    int       `json:"places"`
	Moves     int       `json:"moves"`
	Others    int       `json:"others"` // other actions
	What      string    `json:"what"`
	Problem   string    `json:"problem,omitempty"` // why the round was skipped, or desired state that cannot be read
}

// Ledger keeps the newest decisions of a coordinator with their requests, so that each can be solved again. It lives as long as its process.
type Ledger struct {
	mu    sync.Mutex // guards the rest
	kept  []kept
	bytes int
}

type kept struct {
	Entry
	request   []byte // compressed
	size      int    // of the request
	plan      [sha256.Size]byte
	planBytes int
}

// Add keeps a decision.
func (l *Ledger) Add(d Decision) error {
	k := kept{Entry: Entry{Time: d.Time, Digest: d.Digest, Problem: strings.Join(d.Problems, "; ")}}
	if d.Err != nil {
		k.Problem = d.Err.Error()
	}
	if d.Plan != nil {
		k.Feasible, k.Optimal = d.Plan.GetFeasible(), d.Plan.GetOptimal()
		k.Before, k.Objective, k.Bound = d.Plan.GetObjectiveBefore(), d.Plan.GetObjective(), d.Plan.GetBound()
		if err := k.encode(d); err != nil {
			return err
		}
	}
	k.Problem = k.Problem[:min(len(k.Problem), whatLength)]
	k.tell(d.Actions)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.kept = append(l.kept, k)
	l.bytes += len(k.request)
	for len(l.kept) > LedgerEntries || l.bytes > LedgerBytes && len(l.kept) > 1 {
		l.bytes -= len(l.kept[0].request)
		l.kept = slices.Delete(l.kept, 0, 1)
	}
	return nil
}

func (k *kept) encode(d Decision) error {
	marshal := proto.MarshalOptions{Deterministic: true}
	request, err := marshal.Marshal(d.Request)
	if err != nil {
		return fmt.Errorf("keep a decision: %w", err)
	}
	plan, err := marshal.Marshal(d.Plan)
	if err != nil {
		return fmt.Errorf("keep a decision: %w", err)
	}
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestSpeed)
	if err == nil {
		_, err = w.Write(request)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return fmt.Errorf("keep a decision: %w", err)
	}
	k.request, k.size, k.plan, k.planBytes = b.Bytes(), len(request), sha256.Sum256(plan), len(plan)
	return nil
}

// tell says in a line what was done.
func (k *kept) tell(actions []Action) {
	var parts []string
	length := 0
	for _, a := range actions {
		text := string(a.Kind) + " " + a.Instance
		switch a.Kind {
		case Place:
			k.Places++
			text += " on " + a.Node
		case Move:
			k.Moves++
			text += " to " + a.Node
		default:
			k.Others++
		}
		if length += len(text); length <= whatLength {
			parts = append(parts, text)
		}
	}
	k.What = strings.Join(parts, ", ")
	if more := len(actions) - len(parts); more > 0 {
		k.What += fmt.Sprintf(" and %d more", more)
	}
}

// List is what is told of the decisions, the newest first.
func (l *Ledger) List() []Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Entry, 0, len(l.kept))
	for _, k := range slices.Backward(l.kept) {
		out = append(out, k.Entry)
	}
	return out
}

// Replay solves the decision of a digest, or the newest whose digest begins so, again and compares what comes of it with what came of it then, byte for byte.
func (l *Ledger) Replay(ctx context.Context, digest string, s Solver) (*placementv1.ReplayReply, error) {
	k, candidates := l.find(digest)
	if k == nil {
		return &placementv1.ReplayReply{Candidates: candidates}, nil
	}
	request, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(k.request)), int64(k.size)+1))
	if err == nil && len(request) != k.size {
		err = errors.New("it does not have the length that it had")
	}
	var req placementv1.SolveRequest
	if err == nil {
		err = proto.Unmarshal(request, &req)
	}
	if err != nil {
		return nil, fmt.Errorf("read the decision %s: %w", k.Digest, err)
	}
	begun := time.Now()
	plan, err := s.Solve(ctx, &req)
	if err != nil {
		return nil, fmt.Errorf("solve the decision %s again: %w", k.Digest, err)
	}
	took := time.Since(begun)
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(plan)
	if err != nil {
		return nil, fmt.Errorf("replay %s: %w", k.Digest, err)
	}
	return &placementv1.ReplayReply{
		Found: true, Same: sha256.Sum256(again) == k.plan, Digest: k.Digest, UnixMs: uint64(max(k.Time.UnixMilli(), 0)), RequestBytes: uint64(k.size),
		PlanBytes: uint64(k.planBytes), TookMs: float64(took.Microseconds()) / 1000, Objective: plan.GetObjective(),
	}, nil
}

// find is the newest decision of a digest; when its beginning fits several different ones, those.
func (l *Ledger) find(digest string) (*kept, []string) {
	if !strings.HasPrefix(digest, "sha256:") {
		digest = "sha256:" + digest
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var found *kept
	var all []string
	for i := range slices.Backward(l.kept) {
		k := &l.kept[i]
		if k.request == nil || !strings.HasPrefix(k.Digest, digest) || slices.Contains(all, k.Digest) {
			continue
		}
		all = append(all, k.Digest)
		if found == nil {
			one := *k
			found = &one
		}
	}
	if len(all) > 1 {
		return nil, all[:min(len(all), 8)]
	}
	return found, nil
}
