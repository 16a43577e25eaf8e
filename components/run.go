package components

import (
	"path"
	"slices"
	"strings"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/plugins/contract/program"
)

// BuiltinPrefix begins the digest of a component that the node's binary brings along: "builtin:placement".
const BuiltinPrefix = "builtin:"

// ExecDigest is that of the component that runs ordinary programs, which are installed on the nodes. A program of the registry has its own digest.
const ExecDigest = BuiltinPrefix + "exec"

// KindProgram is the kind of an artifact that does not speak component.v1: any other executable.
const KindProgram = "program"

// ExecName is its name.
const ExecName = "exec"

// RunConfig is what the component that runs a program is told: the manifest's run, as it is now. file is the path of the program that its artifact brought, ""
// of an installed one.
func (e *Effective) RunConfig(file string) program.Config {
	r := e.Spec.GetRun()
	c := program.Config{
		Start: r.GetStart(), Stop: r.GetStop(), Health: r.GetHealth(), StateDir: r.GetStateDir(), Quiesce: r.GetQuiesce(), Resume: r.GetResume(), File: file,
		Unattended: e.Durable == componentsv1.Durability_DURABILITY_INTERVAL,
	}
	if r != nil && r.Port != nil {
		c.Port = r.Port
	}
	return c
}

// RunFiles are the programs that a run names by their absolute paths: they may be executed wherever they are.
func RunFiles(r *componentsv1.Run) []string {
	var out []string
	lines := []string{r.GetStart(), r.GetQuiesce(), r.GetResume()}
	if !isAsk(r.GetHealth()) {
		lines = append(lines, r.GetHealth())
	}
	for _, line := range lines {
		words, err := program.Words(line)
		if err == nil && path.IsAbs(words[0]) && !slices.Contains(out, words[0]) {
			out = append(out, words[0])
		}
	}
	return out
}

// isAsk says of a health that the component asks itself, without a command.
func isAsk(health string) bool {
	return health == "" || health == "tcp" || strings.HasPrefix(health, "GET ")
}

// run checks what is said about an ordinary program.
func (c *checker) run(spec *componentsv1.ComponentSpec, path string) {
	r := spec.GetRun()
	if r == nil {
		return
	}
	c.runStart(spec, path)
	if r.GetPort() > 65535 {
		c.problem(path+".port", "found %d, expected a port from 1 to 65535, or 0 for a free one", r.GetPort())
	}
	c.oneOf(path+".stop", r.GetStop(), stopSignals...)
	c.runHealth(r, path+".health")
	if s := r.GetStateDir(); c.said(path+".state_dir") && !localPath(s) {
		c.problem(path+".state_dir", "found %q, expected a folder below the program's own, such as data", shorten(s))
	}
	c.runHook(r, path+".quiesce", r.GetQuiesce())
	c.runHook(r, path+".resume", r.GetResume())
	if durable := spec.GetDurable(); durable == "each-call" {
		c.problem(strings.TrimSuffix(path, ".run")+".durable", "found each-call with run, expected an interval such as 5s, on-demand or none: "+
			"nobody is told when an ordinary program has written")
	}
	for _, itf := range []string{"attributes", "bindings"} {
		at := strings.TrimSuffix(path, "run") + itf
		if len(spec.GetAttributes()) > 0 && itf == "attributes" || len(spec.GetBindings()) > 0 && itf == "bindings" {
			c.problemAtKey(at, "found %s with run, expected none: an ordinary program has none; pass arguments in start, or env", itf)
		}
	}
}

func (c *checker) runStart(spec *componentsv1.ComponentSpec, path string) {
	start, artifact := spec.GetRun().GetStart(), spec.GetArtifact() != ""
	if start == "" && !c.said(path+".start") {
		if !artifact {
			c.problem(path+".start", `found no start, expected a command line such as start: "redis-server --port {port}", or an artifact to start`)
		}
		return
	}
	if !c.commandLine(path+".start", start) {
		return
	}
	switch names := strings.Contains(start, program.Program); {
	case names && !artifact:
		c.problem(path+".start", "found %s without an artifact, expected artifact: ./path, name@constraint or sha256:…", program.Program)
	case !names && artifact:
		c.problem(path+".start", "found no %s, expected it where the artifact's file goes: start: \"%s --flag\"", program.Program, program.Program)
	}
	c.needsPort(spec.GetRun(), path+".start", start)
}

// commandLine reports a line that cannot be split into words.
func (c *checker) commandLine(path, line string) bool {
	if _, err := program.Words(line); err != nil {
		c.problem(path, "found %s, expected a command line", err)
		return false
	}
	return true
}

// needsPort reports a {port} that nothing will stand for, and a {state_dir}.
func (c *checker) needsPort(r *componentsv1.Run, path, line string) {
	if strings.Contains(line, "{port}") && r.Port == nil {
		c.problem(path, "found {port} without port, expected port: 6379, or port: 0 for a free one")
	}
	if strings.Contains(line, "{state_dir}") && r.GetStateDir() == "" {
		c.problem(path, "found {state_dir} without state_dir, expected state_dir: data")
	}
}

func (c *checker) runHealth(r *componentsv1.Run, path string) {
	h := r.GetHealth()
	if !c.said(path) {
		return
	}
	switch get, asks := strings.CutPrefix(h, "GET "); {
	case h == "" || asks && (!strings.HasPrefix(get, "/") || strings.ContainsAny(get, " \t\r\n")):
		c.problem(path, "found %q, expected a request such as GET /healthz, tcp, or a command line", shorten(h))
	case isAsk(h):
		if r.Port == nil {
			c.problem(path, "found %s without port, expected port: 8080, or port: 0 for a free one", h)
		}
	case c.commandLine(path, h):
		c.needsPort(r, path, h)
	}
}

// runHook checks a hook around snapshots.
func (c *checker) runHook(r *componentsv1.Run, path, line string) {
	if !c.said(path) {
		return
	}
	if r.GetStateDir() == "" {
		c.problem(path, "found a hook without state_dir, expected state_dir: data: it runs around the snapshots of that")
	}
	if c.commandLine(path, line) {
		c.needsPort(r, path, line)
	}
}
