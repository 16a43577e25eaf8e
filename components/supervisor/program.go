package supervisor

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/plugins/contract/program"
)

// executable says what is executed for a generation: the artifact, a component that the binary brings along, or, for an ordinary program, the one that runs
// it. The caller closes the file, which is nil where there is none.
func (s *Supervisor) executable(ctx context.Context, g *generation, spec *runner.Spec, eff *components.Effective, phase func(components.State)) (*os.File, error) {
	g.run = proto.CloneOf(eff.Spec.GetRun())
	if b, ok := s.cfg.Builtins[g.digest]; ok {
		spec.Exec, spec.Args = b.Exec, b.Args
		if g.digest == components.ExecDigest {
			return nil, s.program(spec, eff, "")
		}
		return nil, nil
	}
	if isBuiltin(g.digest) {
		return nil, fmt.Errorf("start %s: this version of coppice has no %s; upgrade this node", g.instance, strings.TrimPrefix(g.digest, BuiltinPrefix))
	}
	phase(components.Fetching)
	file, art, err := s.cfg.Artifacts.Open(ctx, g.digest)
	if err != nil {
		return nil, err
	}
	g.artifact, g.version = art.GetName(), art.GetVersion()
	if err := s.ofArtifact(ctx, g, spec, eff, file, art); err != nil {
		file.Close() //nolint:errcheck // opened for reading
		return nil, err
	}
	return file, nil
}

func (s *Supervisor) ofArtifact(ctx context.Context, g *generation, spec *runner.Spec, eff *components.Effective, file *os.File, art *componentsv1.Artifact) (err error) {
	if art.GetKind() == components.KindProgram {
		b, ok := s.cfg.Builtins[components.ExecDigest]
		if !ok || g.run == nil {
			return fmt.Errorf("start %s: %s@%s is a program, not a component: its manifest needs a run, such as run: {port: 8080}", g.instance, art.GetName(), art.GetVersion())
		}
		spec.Exec, spec.Args = b.Exec, b.Args
		return s.program(spec, eff, file.Name())
	}
	if g.run != nil {
		return fmt.Errorf("start %s: %s@%s is a component, not a program: it takes no run", g.instance, art.GetName(), art.GetVersion())
	}
	spec.Exec = runner.ExecFile{File: file, Path: art.GetName() + "-" + art.GetVersion(), Digest: g.digest}
	g.desc, err = s.cfg.Artifacts.Description(ctx, g.digest)
	return err
}

// program tells the component that runs programs what to run, and opens what that needs. file is the program that its artifact brought.
func (s *Supervisor) program(spec *runner.Spec, eff *components.Effective, file string) error {
	text, err := eff.RunConfig(file).Text()
	if err != nil {
		return fmt.Errorf("start %s: %w", spec.Instance, err)
	}
	spec.Env = append(spec.Env, program.Env+"="+text)
	spec.Sandbox.System, spec.Sandbox.Exec = true, components.RunFiles(eff.Spec.GetRun())
	if file != "" {
		spec.Sandbox.Exec = append(spec.Sandbox.Exec, file)
	}
	return nil
}

// rerun starts the program anew: its manifest has another run. It is ended first, and what it leaves is saved, so nothing of its state is lost.
func (i *instance) rerun(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, restWithin)
	defer cancel()
	err := i.flush(ctx) // what cannot be saved is not to end the program
	if err == nil {
		err = i.quiesce(ctx, reasonSwap)
		if err == nil {
			err = i.flush(ctx)
		}
		if err != nil {
			err = i.goOn(ctx, err)
		}
	}
	if i.gen == nil || i.gen.dead() {
		return time.Millisecond
	}
	if i.unsaved(err) {
		i.sup.cfg.Log.Warn("the program goes on as it was: its state could not be saved before its run is changed; it is tried again", "instance", i.name, "error", err)
		return time.Second
	}
	return i.relaunch("its run was changed")
}

// saidLast is the last line that a process wrote, in which a component that ran a program says how that ended.
func saidLast(output string) string {
	f, err := os.Open(output)
	if err != nil {
		return ""
	}
	defer f.Close() //nolint:errcheck // opened for reading
	const most = 4 << 10
	b := make([]byte, most)
	at := int64(0)
	if info, err := f.Stat(); err == nil {
		at = max(0, info.Size()-most)
	}
	n, _ := f.ReadAt(b, at) // what could be read is said
	lines := strings.Split(strings.TrimSpace(string(b[:n])), "\n")
	return strings.ToValidUTF8(lines[len(lines)-1], "?")
}
