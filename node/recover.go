package node

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/records"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	// lookupTime bounds the search for one newer checkpoint, adoptTime the fetching of one.
	lookupTime = 3 * time.Second
	adoptTime  = 2 * time.Minute
	// surveyTime bounds the asking of all nodes for the checkpoints they have.
	surveyTime = 30 * time.Second

	protoSurvey protocol.ID = "/coppice/survey/1"
)

// Recover makes one survivor the only voter of the next incarnation after most voters were lost (consistency.md §3.7). What it does not
// really do it only describes.
func (v *verbs) Recover(ctx context.Context, r *apiv1.RecoverRequest) (*apiv1.RecoverResponse, error) {
	n, begin := v.n, time.Now()
	all := n.arbiter.Survivors(ctx)
	from, err := n.recoverFrom(r.GetFrom(), all)
	if err != nil {
		return nil, err
	}
	if from.ID != n.id { // it knows best what its own log lacks
		c, err := api.Forward(ctx, n, from.ID.String())
		if err != nil {
			return nil, err
		}
		return c.Recover(ctx, &apiv1.RecoverRequest{From: from.ID.String(), Really: r.GetReally(), KeepOlder: r.GetKeepOlder()})
	}
	out := n.recoverReport(from, all)
	todo := arbiter.Recovery{Cluster: n.state.Cluster}
	if out.Possible {
		c := n.gatherCopies(ctx)
		todo.Known = c.known
		regs := n.afterwards(out, c)
		todo.Adopt, out.Adopted = n.newerCheckpoints(ctx, regs, r.GetReally() && !r.GetKeepOlder())
		if r.GetKeepOlder() {
			for _, x := range out.Adopted {
				x.Reason = "newer checkpoints are not to be adopted"
			}
		}
	}
	if !r.GetReally() {
		out.TookMs = ms(time.Since(begin))
		return out, nil
	}
	if !out.Possible {
		return nil, api.Fail(connect.CodeFailedPrecondition, "recover", out.Reason, "coppice status")
	}
	inc, err := n.arbiter.Recover(ctx, todo)
	switch {
	case errors.Is(err, arbiter.ErrMajority), errors.Is(err, arbiter.ErrNoLog):
		return nil, api.Fail(connect.CodeFailedPrecondition, "recover", err.Error(), "coppice recover")
	case err != nil:
		return nil, fail("recover", err)
	}
	out.Done, out.Incarnation, out.TookMs = true, inc, ms(time.Since(begin))
	n.log.Warn("recovered from the loss of most voters", "incarnation", inc, "adopted", len(todo.Adopt), "rebuilt", out.GetRebuild())
	return out, nil
}

// recoverFrom picks whose log, or view, is to count. Where nobody has either, this node puts the registers together.
func (n *Node) recoverFrom(name string, all []arbiter.Survivor) (arbiter.Survivor, error) {
	id := n.id
	if name == "" {
		if best := arbiter.Best(all); best.Incarnation > 0 || best.Shown > 0 {
			return best, nil
		}
	} else {
		m, err := n.findNode("recover from", name)
		if err != nil {
			return arbiter.Survivor{}, err
		}
		id = m.ID
	}
	for _, s := range all {
		if s.ID == id {
			return s, nil
		}
	}
	return arbiter.Survivor{}, api.Fail(connect.CodeFailedPrecondition, "recover from "+name, "it does not answer", "coppice recover")
}

// recoverReport says what would be done with what from has, and why not.
func (n *Node) recoverReport(from arbiter.Survivor, all []arbiter.Survivor) *apiv1.RecoverResponse {
	out := &apiv1.RecoverResponse{From: n.nameOf(from.ID), Incarnation: from.Incarnation, Rebuild: from.Incarnation == 0 || from.ShowsMore()}
	for _, s := range all {
		x := &apiv1.Survivor{
			Node: n.nameOf(s.ID), Id: s.ID.String(), Role: s.Role, Incarnation: s.Incarnation, Term: s.Term, LastIndex: s.Last, Committed: s.Committed,
			Applied: s.Applied, Registers: uint64(s.Registers), Halted: s.Halted,
			ShownIncarnation: s.ShownIncarnation, ShownIndex: s.Shown, ShownRegisters: uint64(s.ShownRegisters),
		}
		for _, v := range s.Voters {
			x.Voters = append(x.Voters, n.nameOf(v))
		}
		if s.Leader != "" {
			x.Leader = n.nameOf(s.Leader)
		}
		out.Survivors = append(out.Survivors, x)
	}
	voters := from.Voters
	if out.Rebuild {
		out.Incarnation, voters = from.ShownIncarnation, n.arbiter.Voters()
	}
	here, missing := arbiter.Reachable(from, voters, all)
	for _, id := range missing {
		x := &apiv1.Missing{Node: n.nameOf(id), Id: id.String(), State: "unknown"}
		if m, ok := n.members.Member(id); ok {
			x.State, x.Since = m.State.String(), timestamppb.New(m.Since)
		}
		out.Missing = append(out.Missing, x)
	}
	best := arbiter.Best(all)
	leader, leads := arbiter.Leading(all)
	switch {
	case from.Halted != "":
		out.Reason = out.From + " has stopped applying: " + from.Halted
	case out.Incarnation < max(best.Incarnation, best.ShownIncarnation):
		out.Reason = fmt.Sprintf("%s is of incarnation %d, and %s of %d: nothing of a lower one may come back", out.From, out.Incarnation, n.nameOf(best.ID), max(best.Incarnation, best.ShownIncarnation))
	case leads:
		out.Reason = fmt.Sprintf("%s leads the arbiter: a majority of the voters is there, and nothing needs to be recovered", n.nameOf(leader.ID))
	case len(here) > len(voters)/2:
		out.Reason = fmt.Sprintf("%d of %d voters answer: that is a majority, and nothing needs to be recovered", len(here), len(voters))
	default:
		out.Possible = true
		n.mayBeLost(out, from, best)
	}
	return out
}

// mayBeLost says what nobody can know any more.
func (n *Node) mayBeLost(out *apiv1.RecoverResponse, from, best arbiter.Survivor) {
	switch {
	case !out.Rebuild:
		out.Lost = append(out.Lost, fmt.Sprintf("what the arbiter committed after entry %d, if anything: only the missing voters know", from.Last))
		if best.ID != from.ID && best.Last > from.Last {
			out.Lost = append(out.Lost, fmt.Sprintf("entries %d to %d, which %s has", from.Last+1, best.Last, n.nameOf(best.ID)))
		}
	case from.Shown > 0:
		out.Lost = append(out.Lost, fmt.Sprintf("what the arbiter committed after entry %d and had not copied into the DHT: only the missing voters know", from.Shown))
	default:
		out.Lost = append(out.Lost, "what the arbiter committed last and had not copied into the DHT, and copies that only the missing nodes had",
			"all join tokens: they are not copied; make new ones with coppice token")
	}
}

// afterwards are the registers as they will be, by their keys, and tells where they come from.
func (n *Node) afterwards(out *apiv1.RecoverResponse, c copies) map[string]arbiter.Register {
	shown := n.arbiter.Shown()
	regs := map[string]arbiter.Register{}
	for _, reg := range shown.Registers {
		regs[reg.Key] = reg
	}
	what := &apiv1.Rebuilt{Asked: uint32(c.asked), Answered: uint32(c.answered)}
	newer := func(reg arbiter.Register, inc, index uint64) bool {
		return reg.Incarnation > inc || reg.Incarnation == inc && reg.Index > index
	}
	for _, reg := range c.known {
		old, ok := regs[reg.Key]
		switch {
		case !newer(reg, shown.Incarnation, shown.Complete), ok && !newer(reg, old.Incarnation, old.Index):
			continue
		case reg.Deleted:
			delete(regs, reg.Key)
			continue
		}
		regs[reg.Key] = reg
		what.FromDht++
	}
	for key := range regs {
		what.Registers++
		switch {
		case strings.HasPrefix(key, components.InstancePrefix):
			what.Instances++
		case strings.HasPrefix(key, components.ApplicationPrefix):
			what.Applications++
		case strings.HasPrefix(key, components.ArtifactPrefix):
			what.Artifacts++
		case strings.HasPrefix(key, memberPrefix):
			what.Members++
		}
	}
	what.FromView = what.Registers - what.FromDht
	for _, key := range c.damaged {
		out.Lost = append(out.Lost, key+": its copy is not whole")
	}
	if c.answered < c.asked && out.Rebuild {
		out.Lost = append(out.Lost, fmt.Sprintf("copies that only the %d members have that did not answer", c.asked-c.answered))
	}
	if out.Rebuild && what.Registers == 0 {
		out.Possible, out.Reason = false, "no survivor has a log or shows anything, and the DHT has no copies of the registers; coppice restore-cluster makes a new cluster from a backup"
	}
	out.Rebuilt = what
	return regs
}

// newerCheckpoints looks, for each instance, for a newer checkpoint than its register will know of: one that the process which made it
// still goes on from, that the index in the DHT names, or that lies whole with a survivor. With fetch what can be adopted is brought
// here first, so that its root is known to be whole.
func (n *Node) newerCheckpoints(ctx context.Context, regs map[string]arbiter.Register, fetch bool) (adopt []arbiter.Adoption, told []*apiv1.Adopted) {
	held := n.survey(ctx)
	var keys []string
	for key := range regs {
		if strings.HasPrefix(key, components.InstancePrefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		reg, name := regs[key], components.InstanceOfKey(key)
		a, found := n.newerCheckpoint(ctx, name, reg, held[name])
		if !found {
			continue
		}
		t := &apiv1.Adopted{Instance: name, RegisterSeq: reg.Seq, Seq: a.Seq}
		told = append(told, t)
		a.Holders = slices.DeleteFunc(a.Holders, func(id peer.ID) bool { return id == n.id || !n.isAlive(id) })
		for _, id := range a.Holders {
			t.Holders = append(t.Holders, n.nameOf(id))
		}
		root, err := blobs.ParseHash(a.Root)
		if err != nil {
			t.Reason = "the index names no root that can be read"
			continue
		}
		here := n.blobs.Complete(root)
		if !here && len(a.Holders) == 0 {
			t.Reason = "none of its holders is alive"
			continue
		}
		if fetch && !here {
			fctx, cancel := context.WithTimeout(ctx, adoptTime)
			err := n.blobs.Fetch(fctx, root, a.Holders)
			cancel()
			if err != nil {
				t.Reason = err.Error()
				continue
			}
			here = true
		}
		if here {
			a.Holders, t.Holders = append([]peer.ID{n.id}, a.Holders...), append([]string{n.cfg.Name}, t.Holders...)
		}
		adopt = append(adopt, a)
	}
	if !fetch {
		return nil, told
	}
	slices.SortStableFunc(told, func(a, b *apiv1.Adopted) int { return btoi(a.Reason != "") - btoi(b.Reason != "") })
	return adopt, told
}

// surveyed is a checkpoint that survivors told of, with those who have it.
type surveyed struct {
	*componentsv1.HeldCheckpoint
	by []peer.ID
}

// survey asks every node which checkpoints it knows, and returns the newest of each instance.
func (n *Node) survey(ctx context.Context) map[string]surveyed {
	ctx, cancel := context.WithTimeout(ctx, surveyTime)
	defer cancel()
	var mu sync.Mutex
	best := map[string]surveyed{}
	add := func(from peer.ID, held []*componentsv1.HeldCheckpoint) {
		mu.Lock()
		defer mu.Unlock()
		for _, x := range held {
			old := best[x.GetInstance()]
			switch {
			case old.HeldCheckpoint != nil && slices.Equal(old.GetRoot(), x.GetRoot()):
				old.by = append(old.by, from)
				if supervisor.NewerCheckpoint(x, old.HeldCheckpoint) {
					old.HeldCheckpoint = x
				}
				best[x.GetInstance()] = old
			case supervisor.NewerCheckpoint(x, old.HeldCheckpoint):
				best[x.GetInstance()] = surveyed{x, []peer.ID{from}}
			}
		}
	}
	var wg sync.WaitGroup
	for _, id := range n.aliveIDs() {
		wg.Go(func() {
			reply := &componentsv1.SurveyReply{}
			var err error
			if id == n.id {
				reply, err = n.serveSurvey(ctx, id, nil)
			} else {
				err = n.caller.Call(ctx, id, protoSurvey, &componentsv1.SurveyRequest{}, reply)
			}
			if err != nil {
				n.log.Warn("a node does not say which checkpoints it has", "node", n.nameOf(id), "error", err)
				return
			}
			add(id, reply.GetHeld())
		})
	}
	wg.Wait()
	return best
}

// serveSurvey answers another node's survey.
func (n *Node) serveSurvey(ctx context.Context, _ peer.ID, _ *componentsv1.SurveyRequest) (*componentsv1.SurveyReply, error) {
	held, err := n.sup.Survey(ctx)
	if err != nil {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%v", err)
	}
	return &componentsv1.SurveyReply{Held: held}, nil
}

// newerCheckpoint is the newest checkpoint of an instance that is known anywhere, when its register knows an older one. A checkpoint of an
// earlier epoch than the register's never counts: what was acknowledged of it was known when the epoch began.
func (n *Node) newerCheckpoint(ctx context.Context, name string, reg arbiter.Register, held surveyed) (arbiter.Adoption, bool) {
	a := arbiter.Adoption{Key: reg.Key, Seq: reg.Seq, Root: reg.Root, Holders: reg.Holders}
	found := false
	if x, ok := n.checkpointIndexOf(ctx, name); ok && x.Seq > a.Seq {
		found = true
		a.Seq, a.Holders = x.Seq, nil
		var err error
		if a.Root, err = hex.DecodeString(x.Root); err != nil {
			a.Root = nil // said where it is used
		}
		for _, s := range x.Holders {
			if id, err := peer.Decode(s); err == nil {
				a.Holders = append(a.Holders, id)
			}
		}
	}
	if held.HeldCheckpoint == nil || held.GetEpoch() < reg.Epoch {
		return a, found
	}
	if bytes.Equal(held.GetRoot(), a.Root) {
		a.Holders = append(a.Holders, held.by...)
		slices.Sort(a.Holders)
		a.Holders = slices.Compact(a.Holders)
		return a, found
	}
	switch {
	case held.GetSeq() > a.Seq:
		return arbiter.Adoption{Key: reg.Key, Seq: held.GetSeq(), Root: held.GetRoot(), Holders: held.by}, true
	case held.GetSeq() > 0:
		return a, found // its process has not got as far, or goes its own way
	case a.Seq > 0 && !n.supersedes(ctx, held, a):
		return a, found
	}
	return arbiter.Adoption{Key: reg.Key, Seq: a.Seq + 1, Root: held.GetRoot(), Holders: held.by}, true
}

// supersedes says whether what lies with a survivor is newer than the checkpoint that is known by its number. That of the latter has to be
// found to tell.
func (n *Node) supersedes(ctx context.Context, held surveyed, known arbiter.Adoption) bool {
	root, err := blobs.ParseHash(known.Root)
	if err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	if has, err := n.blobs.Has(root); err != nil || !has {
		if err := n.blobs.FetchPages(ctx, []blobs.Hash{root}, n.aliveIDs()); err != nil {
			n.log.Warn("the last checkpoint that is known is nowhere", "instance", held.GetInstance(), "seq", known.Seq, "error", err)
			return false
		}
	}
	at, err := n.sup.CheckpointOf(root)
	return err == nil && supervisor.NewerCheckpoint(held.HeldCheckpoint, at)
}

// checkpointIndexOf reads where the DHT says that the last checkpoint of an instance lies.
func (n *Node) checkpointIndexOf(ctx context.Context, name string) (x checkpointIndex, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	rec, _, err := n.records.Get(ctx, checkpointPrefix+name)
	if err != nil {
		if !errors.Is(err, records.ErrNotFound) {
			n.log.Warn("the checkpoint index cannot be read", "instance", name, "error", err)
		}
		return x, false
	}
	if err := json.Unmarshal(rec.Value, &x); err != nil {
		n.log.Warn("the checkpoint index cannot be read", "instance", name, "error", err)
		return x, false
	}
	return x, true
}
