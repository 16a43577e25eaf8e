package components

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// checker checks what a manifest means: names, references, values, and what may not stand together.
type checker struct {
	*document
	names map[string]int       // component name -> index
	known map[string]*document // the applications of the file
}

// check reports everything in d that has the right shape and the wrong meaning.
func check(d *document, known map[string]*document) {
	c := &checker{document: d, names: map[string]int{}, known: known}
	m := d.manifest
	switch app := m.GetApplication(); {
	case app == "":
		c.problem("application", "found no application, expected a name: application: NAME")
	case app == SystemApplication:
		c.problem("application", "found %q, expected another name: the nodes bring that application along", app)
	default:
		c.wrap("application", CheckName(app))
	}
	c.requires(m.GetRequire(), "require")
	c.objective(m.GetObjective(), "objective")
	c.notNegative("cost.move", m.GetCost().GetMove())
	c.notNegative("cost.per_mib", m.GetCost().GetPerMib())
	c.notNegative("budget", m.GetBudget())
	all := m.GetComponents()
	if len(all) == 0 {
		c.problem("components", "found no components, expected a list of at least one: - name: NAME")
	}
	if len(all) > MaxComponents {
		c.problem("components", "found %d components, expected at most %d", len(all), MaxComponents)
		return
	}
	for i, spec := range all {
		c.name(spec, i)
	}
	exposed := map[string]string{}
	for i, spec := range all {
		c.component(spec, at(i))
		c.expose(spec, at(i), exposed)
	}
}

func at(i int) string { return fmt.Sprintf("components[%d]", i) }

// wrap reports err at a path that is in the file.
func (c *checker) wrap(path string, err error) {
	if err != nil {
		c.problem(path, "%s", err)
	}
}

func (c *checker) notNegative(path string, v float64) {
	if v < 0 {
		c.problem(path, "found %v, expected a number that is not negative", v)
	}
}

// oneOf reports a value outside a closed list; "" is always right.
func (c *checker) oneOf(path, value string, allowed ...string) bool {
	if value == "" && !c.said(path) || slices.Contains(allowed, value) {
		return true
	}
	c.problem(path, "found %q, expected %s", shorten(value), strings.Join(allowed, ", "))
	return false
}

func (c *checker) name(spec *componentsv1.ComponentSpec, i int) {
	path, name := at(i), spec.GetName()
	if name == "" {
		if !c.bad[path] {
			c.problem(path+".name", "found no name, expected name: NAME, unique in the application")
		}
		return
	}
	c.wrap(path+".name", CheckComponentName(name))
	if first, ok := c.names[name]; ok {
		c.problem(path+".name", "found %q a second time, expected a name unique in the application (the first is at line %d)",
			name, c.document.at(at(first)+".name").Line)
		return
	}
	c.names[name] = i
}

func (c *checker) component(spec *componentsv1.ComponentSpec, path string) {
	if c.bad[path] {
		return
	}
	if spec.GetArtifact() == "" && !c.said(path+".run") {
		c.problem(path+".artifact", "found no artifact, expected artifact: name@constraint, sha256:… or ./path")
	} else if spec.GetArtifact() == "" {
		// what is run is on the nodes
	} else if _, err := ParseArtifactRef(spec.GetArtifact()); err != nil {
		c.problem(path+".artifact", "%s", err)
	}
	_, eachNode, err := ParseCount(spec.GetCount())
	c.wrap(path+".count", err)
	if eachNode && spec.GetSpread() != "" {
		c.problem(path+".spread", "found spread with count: each-node, expected one of them: each node has one instance")
	}
	c.policies(spec, path)
	c.resources(spec.GetResources(), path+".resources")
	c.references(spec, path)
	c.requires(spec.GetRequire(), path+".require")
	c.objective(spec.GetObjective(), path+".objective")
	if s := spec.GetSpread(); s != "" && !labelName.MatchString(s) {
		c.problem(path+".spread", "found %q, expected node, zone or the name of a label", shorten(s))
	}
	c.placing(spec, path, eachNode)
	c.run(spec, path+".run")
	c.state(spec, path+".state")
	c.environment(spec.GetEnv(), path+".env")
	if spec.GetRestart() != nil && c.said(path+".restart.backoff") {
		_, _, err := ParseBackoff(spec.GetRestart().GetBackoff())
		c.wrap(path+".restart.backoff", err)
	}
	c.atLeastOne(path+".restart.quarantine_after", spec.GetRestart().GetQuarantineAfter())
	c.duration(path+".health.every", spec.GetHealth().GetEvery())
	c.duration(path+".health.timeout", spec.GetHealth().GetTimeout())
	c.atLeastOne(path+".health.misses", spec.GetHealth().GetMisses())
	c.sandbox(spec, path+".sandbox")
}

func (c *checker) duration(path, value string) {
	if c.said(path) {
		_, err := ParseDuration(value)
		c.wrap(path, err)
	}
}

func (c *checker) atLeastOne(path string, n uint32) {
	if c.said(path) && n == 0 {
		c.problem(path, "found 0, expected a whole number from 1")
	}
}

func (c *checker) resources(r *componentsv1.Resources, path string) {
	if v := r.GetCpu(); v < 0 || v > 4096 {
		c.problem(path+".cpu", "found %v, expected a number of cores such as 0.5, not negative", v)
	}
	for key, value := range map[string]string{"memory": r.GetMemory(), "disk": r.GetDisk()} {
		if c.said(path + "." + key) {
			_, err := ParseSize(value)
			if value == "" {
				err = errors.New(`found "", expected a size such as 256MiB`)
			}
			c.wrap(path+"."+key, err)
		}
	}
}

// references checks bindings and near: what they name has to be there.
func (c *checker) references(spec *componentsv1.ComponentSpec, path string) {
	for _, itf := range slices.Sorted(maps.Keys(spec.GetBindings())) {
		p := path + ".bindings." + shorten(itf)
		if !interfaceName.MatchString(itf) {
			c.problemAtKey(p, "found interface %q, expected the name of a required interface: letters, digits, -, _ and .", shorten(itf))
			continue
		}
		c.target(p, spec.GetBindings()[itf], true)
	}
	near := spec.GetNear()
	if near == nil {
		return
	}
	switch {
	case near.GetTo() == "":
		c.problem(path+".near.to", "found no component to be near to, expected near: {to: COMPONENT, rtt: 20ms}")
	case near.GetTo() == spec.GetName():
		c.problem(path+".near.to", "found the component itself, expected another one")
	default:
		c.target(path+".near.to", near.GetTo(), false)
	}
	_, err := ParseDuration(near.GetRtt())
	if err != nil {
		c.problem(path+".near.rtt", "%s", err)
	}
}

// target checks the name of a component: "store", "app/store", and "app/store-0" where one instance may be meant.
func (c *checker) target(path, value string, instance bool) {
	own := !strings.Contains(value, "/")
	t, err := ParseTargetIn("own", value) // a wrong name of the application is reported already
	if own {
		t.Application = c.manifest.GetApplication()
	}
	switch {
	case err != nil && own:
		c.wrap(path, CheckComponentName(value))
		return
	case err != nil:
		c.problem(path, "%s", err)
		return
	case t.IsInstance() && !instance:
		c.problem(path, "found the instance %q, expected a component", shorten(value))
		return
	}
	there, known := c.componentsOf(t.Application)
	if known && len(there) > 0 && !slices.Contains(there, t.Component) {
		c.problem(path, "found %q, expected a component of application %s: %s", shorten(value), t.Application, strings.Join(there, ", "))
	}
}

// componentsOf lists the components of an application that is in this file. Others are looked up at deploy.
func (c *checker) componentsOf(app string) (names []string, known bool) {
	d := c.known[app]
	if app == c.manifest.GetApplication() {
		d = c.document
	}
	if d == nil {
		return nil, false
	}
	for _, spec := range d.manifest.GetComponents() {
		if spec.GetName() != "" {
			names = append(names, spec.GetName())
		}
	}
	return names, true
}

var (
	labelName     = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$`)
	interfaceName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9._-]{0,62}$`)
	envName       = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
)

// expose checks the paths at the gateway; exposed holds those of the components before.
func (c *checker) expose(spec *componentsv1.ComponentSpec, component string, exposed map[string]string) {
	for _, itf := range slices.Sorted(maps.Keys(spec.GetExpose())) {
		p, value := component+".expose."+shorten(itf), spec.GetExpose()[itf]
		switch {
		case !interfaceName.MatchString(itf):
			c.problemAtKey(p, "found interface %q, expected the name of a provided interface: letters, digits, -, _ and .", shorten(itf))
		case !strings.HasPrefix(value, "/") || path.Clean(value) != strings.TrimSuffix(value, "/") && value != "/" || strings.ContainsAny(value, "?#%* \t{}"):
			c.problem(p, "found %q, expected a path such as / or /admin", shorten(value))
		case exposed[path.Clean(value)] != "":
			c.problem(p, "found the path %s a second time, expected one of its own (the first is %s)", value, exposed[path.Clean(value)])
		default:
			exposed[path.Clean(value)] = p
		}
	}
}

func (c *checker) requires(all []string, path string) {
	for i, source := range all {
		c.expression(fmt.Sprintf("%s[%d]", path, i), source, CompileConstraint)
	}
}

func (c *checker) objective(all []*componentsv1.Term, path string) {
	for i, t := range all {
		p := fmt.Sprintf("%s[%d]", path, i)
		if c.bad[p] {
			continue
		}
		c.expression(p+".value", t.GetValue(), CompileTerm)
		if t.GetFrom() >= t.GetTo() {
			c.problem(p+".to", "found from: %v and to: %v, expected from below to: between them the value counts from worst to best", t.GetFrom(), t.GetTo())
		}
		if t.GetWeight() <= 0 {
			c.problem(p+".weight", "found %v, expected a weight above zero", t.GetWeight())
		}
		if t.GetBetter() != "low" && t.GetBetter() != "high" {
			c.problem(p+".better", "found %q, expected low or high", shorten(t.GetBetter()))
		}
	}
}

// expression reports what CEL refuses, at the place in the file.
func (c *checker) expression(path, source string, compile func(string) (*Expression, error)) {
	if c.bad[path] {
		return
	}
	_, err := compile(source)
	if err == nil {
		return
	}
	var wrong *ExpressionError
	if !errors.As(err, &wrong) {
		c.problem(path, "%s", err)
		return
	}
	c.bad[path] = true
	for _, is := range wrong.Issues {
		line, col := c.within(c.document.at(path), is.Line, is.Col)
		c.add(line, col, path, "in the expression: %s", is.Message)
	}
}

// within is the place in the file of line and col of a scalar's text. Exact for plain and quoted text on one line (but for escapes) and
// for literal blocks; else the scalar's own place.
func (c *checker) within(n *yaml.Node, line, col int) (fileLine, fileCol int) {
	switch {
	case n.Kind != yaml.ScalarNode:
		return n.Line, n.Column
	case n.Style&yaml.LiteralStyle != 0:
		first := c.line(n.Line + 1)
		indent := len(first) - len(strings.TrimLeft(first, " "))
		return n.Line + line, indent + col
	case n.Style&yaml.FoldedStyle != 0 || line > 1:
		return n.Line, n.Column
	case n.Style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0:
		return n.Line, n.Column + col
	}
	return n.Line, n.Column + col - 1
}

// localPath tells whether s is a relative path that stays below where it starts.
func localPath(s string) bool {
	return s != "" && !path.IsAbs(s) && path.Clean(s) != "." && path.Clean(s) != ".." && !strings.HasPrefix(path.Clean(s), "../") && !strings.ContainsRune(s, 0)
}

func (c *checker) state(spec *componentsv1.ComponentSpec, path string) {
	s := spec.GetState()
	if s == nil {
		return
	}
	if c.said(path+".replicas") && (s.GetReplicas() < 1 || s.GetReplicas() > MaxReplicas) {
		c.problem(path+".replicas", "found %d, expected a whole number from 1 to %d", s.GetReplicas(), MaxReplicas)
	}
	replicas := cmp.Or(s.GetReplicas(), DefaultReplicas)
	if c.said(path+".min_replicas") && (s.GetMinReplicas() < 1 || s.GetMinReplicas() > replicas) {
		c.problem(path+".min_replicas", "found %d, expected a whole number from 1 to replicas (%d)", s.GetMinReplicas(), replicas)
	}
	if s.GetHistory() > MaxHistory {
		c.problem(path+".history", "found %d, expected a whole number from 0 (none are kept) to %d", s.GetHistory(), MaxHistory)
	}
	if _, err := parseAge(s.GetHistoryAge()); err != nil && c.said(path+".history_age") {
		c.problem(path+".history_age", "%s", err)
	}
	if !c.oneOf(path+".standby", s.GetStandby(), StandbyCold, StandbyWarm, StandbyHot) {
		return
	}
	if standsBy := s.GetStandby() == StandbyWarm || s.GetStandby() == StandbyHot; standsBy && spec.GetCount() == EachNode {
		c.problem(path+".standby", "found standby: %s with count: each-node, expected one of them: an instance of each node runs nowhere else", s.GetStandby())
	}
}

func (c *checker) environment(env map[string]string, path string) {
	for _, name := range slices.Sorted(maps.Keys(env)) {
		p := path + "." + shorten(name)
		switch {
		case !envName.MatchString(name):
			c.problemAtKey(p, "found %q, expected the name of a variable: letters, digits and _", shorten(name))
		case strings.HasPrefix(name, "COPPICE_") || strings.HasPrefix(name, "PLUGIN_"):
			c.problemAtKey(p, "found %s, expected a variable that does not begin with COPPICE_ or PLUGIN_: the node sets those", name)
		case strings.ContainsRune(env[name], 0):
			c.problem(p, "found a zero byte, expected text")
		}
	}
}

func (c *checker) sandbox(spec *componentsv1.ComponentSpec, where string) {
	s := spec.GetSandbox()
	if s == nil {
		return
	}
	c.oneOf(where+".network", s.GetNetwork(), "none", "own", "host")
	for i, p := range s.GetRead() {
		if !path.IsAbs(p) {
			c.problem(fmt.Sprintf("%s.read[%d]", where, i), "found %q, expected an absolute path", shorten(p))
		}
	}
}
