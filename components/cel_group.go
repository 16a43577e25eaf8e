package components

import (
	"fmt"
	"math"
	"reflect"

	"cel.dev/cel-go/cel"
	celcheck "cel.dev/cel-go/checker"
	celast "cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// GroupFacts is what an expression sees as group, the instances of a component together: size, diameter_ms (the longest of the shortest ways
// between two of them, over instances), anchor_ms (from the worst served anchor to the nearest of them), price (of the nodes they use), and
// count(label), how many values of a label, of zone or of node they are spread over. As link it sees rtt_ms: from an instance to the nearest one
// that it calls, in the mean. What is not known is infinite here and an error to the expression.
type GroupFacts struct {
	Size                          int
	Diameter, Anchor, Price, Link float64
	Count                         func(label string) int
}

const (
	groupType = "coppice.group"
	linkType  = "coppice.link"
)

var groupFields = []namedField{
	fieldOf("size", types.IntType, func(g *GroupFacts) any { return g.Size }),
	finite("diameter_ms", "a round trip between its instances is not known", func(g *GroupFacts) float64 { return g.Diameter }),
	finite("anchor_ms", "the component has no anchors, or a round trip to one of them is not known", func(g *GroupFacts) float64 { return g.Anchor }),
	finite("price", "a node has no price", func(g *GroupFacts) float64 { return g.Price }),
}

var linkFields = []namedField{
	finite("rtt_ms", "it calls nothing, or a round trip to what it calls is not known", func(g *GroupFacts) float64 { return g.Link }),
}

func finite(name, unknown string, get func(*GroupFacts) float64) namedField {
	return namedField{name, &types.FieldType{
		Type:  types.DoubleType,
		IsSet: func(target any) bool { g, ok := target.(*GroupFacts); return ok && g != nil && !math.IsInf(get(g), 0) },
		GetFrom: func(target any) (any, error) {
			g, ok := target.(*GroupFacts)
			if !ok || g == nil || math.IsInf(get(g), 0) {
				return nil, fmt.Errorf("%s", unknown)
			}
			return get(g), nil
		},
	}}
}

// ConvertToNative implements ref.Val: it stays what it is.
func (g *GroupFacts) ConvertToNative(t reflect.Type) (any, error) {
	return nil, fmt.Errorf("a group is no %v", t)
}

// ConvertToType implements ref.Val.
func (g *GroupFacts) ConvertToType(t ref.Type) ref.Val {
	return types.NewErr("a group is no %s", t.TypeName())
}

// Equal implements ref.Val.
func (g *GroupFacts) Equal(other ref.Val) ref.Val { return types.Bool(ref.Val(g) == other) }

// Type implements ref.Val.
func (g *GroupFacts) Type() ref.Type { return cel.ObjectType(groupType) }

// Value implements ref.Val.
func (g *GroupFacts) Value() any { return g }

func countValues(group, label ref.Val) ref.Val {
	g, ok := group.(*GroupFacts)
	l, text := label.(types.String)
	if !ok || !text || g == nil || g.Count == nil {
		return types.NewErr("the group is not known here")
	}
	return types.Int(g.Count(string(l)))
}

// HoldsFor evaluates a constraint over group and link.
func (e *Expression) HoldsFor(g *GroupFacts, c *ComponentFacts) (bool, error) {
	return e.holds(&activation{group: g, component: c})
}

// ValueFor evaluates a term over group and link.
func (e *Expression) ValueFor(g *GroupFacts, c *ComponentFacts) (float64, error) {
	return e.value(&activation{group: g, component: c})
}

// OfGroup tells whether the expression is over group or link: over the instances together, not over a node.
func (e *Expression) OfGroup() bool { return e.group }

// names collects the variables of an expression.
func names(a *cel.Ast) map[string]bool {
	out := map[string]bool{}
	celast.PreOrderVisit(a.NativeRep().Expr(), celast.NewExprVisitor(func(e celast.Expr) {
		if e.Kind() == celast.IdentKind {
			out[e.AsIdent()] = true
		}
	}))
	return out
}

// maxCost of an evaluation, in CEL's units: about a microsecond for a hundred. It is estimated before anything runs, with text of at most longText
// letters and as many labels.
const (
	maxCost  = 5_000
	longText = 256
)

// estimator tells CEL how long things may be that it cannot know.
type estimator struct{}

func (estimator) EstimateSize(celcheck.AstNode) *celcheck.SizeEstimate {
	return &celcheck.SizeEstimate{Min: 0, Max: longText}
}

func (estimator) EstimateCallCost(string, string, *celcheck.AstNode, []celcheck.AstNode) *celcheck.CallEstimate {
	return nil
}
