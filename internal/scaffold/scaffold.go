// Package scaffold makes the folder of a new component, for `coppice new`: it builds, passes its tests and can be deployed as it is.
package scaffold

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/plugins/kv/python"
)

//go:embed all:templates
var templates embed.FS

// Languages that there are.
var Languages = []string{"go", "python", "exec"}

// Config says what to make.
type Config struct {
	Name string // of the component, its type and its application
	Lang string // one of Languages
	Dir  string // to be made; it must not exist, or be empty
	// SDK is the folder of Coppice's sources for a component in Go that uses no released version; "" where it does.
	SDK string
	// Sum is the go.sum to begin with; Go adds what is missing.
	Sum []byte
	// Require is the version of Coppice that a component in Go requires.
	Require string
}

// names is what templates may use.
type names struct {
	Name, Module, Type, Interface string
	SDK, Require                  string
}

// taken are Python modules that a component's own must not hide.
var taken = []string{"component", "state", "version", "grpc", "google", "xxhash", "asyncio", "json", "signal", "time", "os", "sys"}

// New makes the folder and returns its files, by name. Nothing is left behind when it fails.
func New(cfg Config) (files []string, err error) {
	if err := components.CheckComponentName(cfg.Name); err != nil {
		return nil, err
	}
	if !slices.Contains(Languages, cfg.Lang) {
		return nil, fmt.Errorf("--lang %q: there are %s", cfg.Lang, strings.Join(Languages, ", "))
	}
	n := names{Name: cfg.Name, Module: strings.ReplaceAll(cfg.Name, "-", "_"), SDK: cfg.SDK, Require: cfg.Require}
	for _, part := range strings.Split(cfg.Name, "-") {
		if part != "" {
			n.Type += strings.ToUpper(part[:1]) + part[1:]
		}
	}
	n.Interface = strings.ToLower(n.Type)
	if cfg.Lang == "python" && slices.Contains(taken, n.Module) {
		return nil, fmt.Errorf("a component in Python cannot be called %s: its module would hide another of that name", cfg.Name)
	}
	made, err := render(cfg.Lang, n)
	if err != nil {
		return nil, err
	}
	if len(cfg.Sum) > 0 {
		made["go.sum"] = cfg.Sum
	}
	if have, err := os.ReadDir(cfg.Dir); err == nil && len(have) > 0 {
		return nil, fmt.Errorf("%s is there, and not empty", cfg.Dir)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for name := range made {
		files = append(files, name)
	}
	slices.Sort(files)
	for i, name := range files {
		if err := write(filepath.Join(cfg.Dir, filepath.FromSlash(name)), made[name]); err != nil {
			errs := []error{fmt.Errorf("make %s: %w", cfg.Dir, err)}
			for _, done := range files[:i] {
				errs = append(errs, os.Remove(filepath.Join(cfg.Dir, filepath.FromSlash(done))))
			}
			return nil, errors.Join(errs...)
		}
	}
	return files, nil
}

func write(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}

// render is the content of each file.
func render(lang string, n names) (map[string][]byte, error) {
	out := map[string][]byte{}
	dir := path.Join("templates", lang)
	entries, err := templates.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		raw, err := templates.ReadFile(path.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		t, err := template.New(e.Name()).Parse(string(raw))
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		if err := t.Execute(&b, n); err != nil {
			return nil, err
		}
		name := strings.TrimSuffix(e.Name(), ".tmpl")
		switch name {
		case "service.py":
			name = "src/" + n.Module + ".py"
		case "service.proto":
			name = n.Module + ".proto"
		case "__main__.py":
			name = "src/__main__.py"
		}
		out[name] = b.Bytes()
	}
	if lang == "python" {
		for _, name := range []string{"component.py", "state.py", "component_pb2.py", "component_pb2_grpc.py", "state_pb2.py"} {
			if out["src/"+name], err = python.Files.ReadFile(name); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}
