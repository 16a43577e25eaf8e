package supervisor

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
)

// Earlier is a state that an instance can go back to: an entry of its history, or a branch that is stored.
type Earlier struct {
	*componentsv1.HistoryEntry
	Name    string // c7, or @branch-n2-1
	Outcome string // of a branch, once that is decided: kept, merged or newest
}

// EarlierOf is an entry of a history as one.
func EarlierOf(e *componentsv1.HistoryEntry) Earlier {
	return Earlier{HistoryEntry: e, Name: components.CheckpointID(e.GetNumber())}
}

// IsBranch says that it is no entry of the history.
func (e Earlier) IsBranch() bool { return e.GetNumber() == 0 }

// Ledger is what an earlier state is looked up in.
type Ledger interface {
	Read(ctx context.Context, key string) (arbiter.Register, bool, error)
	List(prefix string) []arbiter.Register
}

// FindEarlier finds what a moment means, through the log.
func FindEarlier(ctx context.Context, in Ledger, instance string, at components.Moment) (Earlier, error) {
	key, branch, err := at.Branch(instance)
	switch {
	case err != nil:
		return Earlier{}, err
	case branch:
		return findBranch(ctx, in, instance, key)
	}
	h := &componentsv1.History{}
	reg, ok, err := in.Read(ctx, components.HistoryRegister(instance))
	if err == nil && ok {
		h, err = ReadHistory(reg)
	}
	if err != nil {
		return Earlier{}, err
	}
	e, err := components.Find(h, at)
	if err != nil {
		return Earlier{}, err
	}
	return EarlierOf(e), nil
}

func findBranch(ctx context.Context, in Ledger, instance, key string) (Earlier, error) {
	reg, ok, err := in.Read(ctx, key)
	if err != nil {
		return Earlier{}, err
	}
	if !ok {
		has := "none is stored"
		var ids []string
		for _, e := range Branches(in, instance) {
			ids = append(ids, e.Name)
		}
		if len(ids) > 0 {
			has = "stored are " + strings.Join(ids, " ")
		}
		return Earlier{}, fmt.Errorf("%w: %s is no branch of it; %s", components.ErrNoCheckpoint, branchID(instance, key), has)
	}
	b := &componentsv1.Branch{}
	if err := proto.Unmarshal(reg.Body, b); err != nil {
		return Earlier{}, fmt.Errorf("read %s: %w", reg.Key, err)
	}
	return storedBranch{reg, b}.earlier(), nil
}

// branchID is what people call a branch of an instance.
func branchID(instance, key string) string {
	return strings.TrimPrefix(key, components.BranchPrefix+instance)
}

// storedBranch is a branch with its register.
type storedBranch struct {
	reg arbiter.Register
	*componentsv1.Branch
}

func (b storedBranch) earlier() Earlier {
	e := components.EntryOfBranch(b.Branch)
	for _, id := range b.reg.Holders {
		e.Holders = append(e.Holders, id.String())
	}
	return Earlier{e, branchID(b.GetInstance(), b.reg.Key), b.GetOutcome()}
}

// storedBranches are an instance's, as the local view has them, in the order in which they were stored. One that cannot be read is left out.
func storedBranches(in Ledger, instance string) []storedBranch {
	var out []storedBranch
	for _, reg := range in.List(components.BranchesOf(instance)) {
		b := &componentsv1.Branch{}
		if proto.Unmarshal(reg.Body, b) == nil {
			out = append(out, storedBranch{reg, b})
		}
	}
	slices.SortFunc(out, func(x, y storedBranch) int {
		return cmp.Or(cmp.Compare(x.GetStoredUnixMs(), y.GetStoredUnixMs()), cmp.Compare(x.reg.Key, y.reg.Key))
	})
	return out
}

// Branches are the stored branches of an instance, as the local view has them, oldest first.
func Branches(in Ledger, instance string) []Earlier {
	var out []Earlier
	for _, b := range storedBranches(in, instance) {
		out = append(out, b.earlier())
	}
	return out
}
