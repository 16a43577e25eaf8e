package components

import (
	"fmt"
	"math"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	celast "cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
)

// NodeFacts is what an expression sees as node: what the node says of itself (id, name, zone, role, platform, state, draining, labels),
// what it offers (cpu in cores, memory_mib, disk_mib) and what was observed of it: any other name is a fact, a number, and unknown
// where nobody observed it.
type NodeFacts struct {
	ID, Name, Zone, Role, Platform, State string
	Draining                              bool
	Labels                                map[string]string
	CPU, MemoryMiB, DiskMiB               float64
	Facts                                 map[string]float64
}

// ComponentFacts is what an expression sees as component: key ("app/name"), application, name, artifact, count, and what an instance
// asks for (cpu in cores, memory_mib, disk_mib).
type ComponentFacts struct {
	Key, Application, Name, Artifact string
	Count                            int64
	CPU, MemoryMiB, DiskMiB          float64
}

// Expression is a compiled CEL expression over node and component, or over group, link and component. It is safe for concurrent use. There are no
// loops in it (of CEL's macros only has is there), and its cost is bounded before it runs.
type Expression struct {
	source  string
	program cel.Program
	group   bool
}

// Source is the expression as written.
func (e *Expression) Source() string { return e.source }

// ExpressionError is what is wrong with an expression: every error, with its place within the expression.
type ExpressionError struct {
	Source string
	Issues []ExpressionIssue
}

// ExpressionIssue is one error; Line and Col count from 1 within the expression.
type ExpressionIssue struct {
	Line, Col int
	Message   string
}

func (e *ExpressionError) Error() string {
	parts := make([]string, len(e.Issues))
	for i, is := range e.Issues {
		parts[i] = is.Message
	}
	return fmt.Sprintf("expression %q: %s", shorten(e.Source), strings.Join(parts, "; "))
}

// CompileConstraint compiles an expression that is true or false. The error is an *ExpressionError.
func CompileConstraint(source string) (*Expression, error) {
	return compile(source, "true or false", types.BoolKind)
}

// CompileTerm compiles an expression that is a number, or true or false for 1 and 0. The error is an *ExpressionError.
func CompileTerm(source string) (*Expression, error) {
	return compile(source, "a number", types.DoubleKind, types.IntKind, types.UintKind, types.BoolKind)
}

// Holds evaluates a constraint. An error says what is unknown of this node; a constraint that cannot be evaluated does not hold.
func (e *Expression) Holds(n *NodeFacts, c *ComponentFacts) (bool, error) {
	return e.holds(&activation{node: n, component: c})
}

func (e *Expression) holds(a *activation) (bool, error) {
	v, err := e.eval(a)
	if err != nil {
		return false, err
	}
	b, ok := v.(types.Bool)
	if !ok {
		return false, fmt.Errorf("%s is %s, not true or false", shorten(e.source), v.Type().TypeName())
	}
	return bool(b), nil
}

// Value evaluates a term. An error says what is unknown of this node.
func (e *Expression) Value(n *NodeFacts, c *ComponentFacts) (float64, error) {
	return e.value(&activation{node: n, component: c})
}

func (e *Expression) value(a *activation) (float64, error) {
	v, err := e.eval(a)
	if err != nil {
		return 0, err
	}
	switch x := v.(type) {
	case types.Double:
		if math.IsNaN(float64(x)) {
			return 0, fmt.Errorf("%s is not a number on this node", shorten(e.source))
		}
		return float64(x), nil
	case types.Int:
		return float64(x), nil
	case types.Uint:
		return float64(x), nil
	case types.Bool:
		if x {
			return 1, nil
		}
		return 0, nil
	}
	return 0, fmt.Errorf("%s is %s, not a number", shorten(e.source), v.Type().TypeName())
}

func (e *Expression) eval(a *activation) (ref.Val, error) {
	v, _, err := e.program.Eval(a)
	if err != nil {
		return nil, plainEvalError(err)
	}
	return v, nil
}

// plainEvalError says in our words what CEL says in its own.
func plainEvalError(err error) error {
	s := err.Error()
	if _, key, ok := strings.Cut(s, "no such key: "); ok {
		return fmt.Errorf("the node has no label %s", key)
	}
	return fmt.Errorf("%s", s)
}

// activation resolves the variables without a map.
type activation struct {
	node      *NodeFacts
	component *ComponentFacts
	group     *GroupFacts
}

func (a *activation) ResolveName(name string) (any, bool) {
	switch name {
	case "node":
		return a.node, true
	case "component":
		return a.component, true
	case "group", "link":
		return a.group, true
	}
	return nil, false
}

func (a *activation) Parent() cel.Activation { return nil }

// environment is built once: it is the same for every expression, and immutable.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	registry, err := types.NewRegistry()
	if err != nil {
		return nil, fmt.Errorf("build the expression environment: %w", err)
	}
	return cel.NewEnv(
		cel.CustomTypeProvider(&provider{Registry: registry}),
		cel.CustomTypeAdapter(registry),
		cel.Variable("node", cel.ObjectType(nodeType)),
		cel.Variable("component", cel.ObjectType(componentType)),
		cel.Variable("group", cel.ObjectType(groupType)),
		cel.Variable("link", cel.ObjectType(linkType)),
		cel.Function("count", cel.MemberOverload("group_count_string", []*cel.Type{cel.ObjectType(groupType), cel.StringType}, cel.IntType, cel.BinaryBinding(countValues))),
		cel.CrossTypeNumericComparisons(true),
		cel.ClearMacros(),
		cel.Macros(cel.HasMacro),
		cel.ParserExpressionSizeLimit(MaxExpression),
		cel.ParserRecursionLimit(maxDepth),
	)
})

func compile(source, want string, kinds ...types.Kind) (*Expression, error) {
	fail := func(message string) error {
		return &ExpressionError{Source: source, Issues: []ExpressionIssue{{Line: 1, Col: 1, Message: message}}}
	}
	if strings.TrimSpace(source) == "" {
		return nil, fail("found nothing, expected an expression over node, component, group or link")
	}
	if len(source) > MaxExpression {
		return nil, fail(fmt.Sprintf("found %d bytes, expected at most %d", len(source), MaxExpression))
	}
	env, err := environment()
	if err != nil {
		return nil, err
	}
	parsed, issues := env.Parse(source)
	if issues.Err() != nil {
		return nil, issuesError(source, issues)
	}
	checked, issues := env.Check(parsed)
	if issues.Err() != nil {
		// 1024 where 1024.0 is meant: people do not write numbers by type
		again, issuesAgain := env.Check(widened(env, source))
		if issuesAgain.Err() != nil {
			return nil, issuesError(source, issues)
		}
		checked = again
	}
	if out := checked.OutputType(); !oneOf(out.Kind(), kinds) {
		return nil, fail(fmt.Sprintf("found an expression that is %s, expected one that is %s", typeWord(out), want))
	}
	used := names(checked)
	group := used["group"] || used["link"]
	if group && used["node"] {
		return nil, fail("found node together with group or link, expected one of them: an expression is over each node or over all instances together")
	}
	cost, err := env.EstimateCost(checked, estimator{})
	if err != nil {
		return nil, fail(err.Error())
	}
	if cost.Max > maxCost {
		return nil, fail(fmt.Sprintf("found an expression that may cost %d, expected one of at most %d: it is evaluated for each node", cost.Max, maxCost))
	}
	program, err := env.Program(checked, cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, fail(err.Error())
	}
	return &Expression{source: source, program: program, group: group}, nil
}

// widened parses once more and makes each whole-number literal a double.
func widened(env *cel.Env, source string) *cel.Ast {
	parsed, issues := env.Parse(source)
	if issues.Err() != nil {
		return parsed
	}
	factory := celast.NewExprFactory()
	celast.PostOrderVisit(parsed.NativeRep().Expr(), celast.NewExprVisitor(func(e celast.Expr) {
		if e.Kind() != celast.LiteralKind {
			return
		}
		if n, ok := e.AsLiteral().(types.Int); ok {
			e.SetKindCase(factory.NewLiteral(e.ID(), types.Double(n)))
		}
	}))
	return parsed
}

func issuesError(source string, issues *cel.Issues) error {
	e := &ExpressionError{Source: source}
	for _, is := range issues.Errors() {
		e.Issues = append(e.Issues, ExpressionIssue{
			Line: max(is.Location.Line(), 1), Col: max(is.Location.Column()+1, 1), Message: plainIssue(is.Message),
		})
	}
	return e
}

// plainIssue says in our words what CEL says in its own.
func plainIssue(m string) string {
	if name, ok := strings.CutPrefix(m, "undeclared reference to '"); ok {
		name, _, _ = strings.Cut(name, "'")
		return fmt.Sprintf("found %q, expected node, component, group, link or a function of CEL", name)
	}
	return strings.TrimPrefix(m, "Syntax error: ")
}

func typeWord(t *types.Type) string {
	switch t.Kind() {
	case types.BoolKind:
		return "true or false"
	case types.StringKind:
		return "text"
	case types.DoubleKind, types.IntKind, types.UintKind:
		return "a number"
	case types.StructKind:
		return "the whole " + strings.TrimPrefix(t.TypeName(), "coppice.")
	}
	return t.String()
}

func oneOf(k types.Kind, kinds []types.Kind) bool {
	for _, x := range kinds {
		if k == x {
			return true
		}
	}
	return false
}
