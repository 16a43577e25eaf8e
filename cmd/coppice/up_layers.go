package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"go.yaml.in/yaml/v3"
)

// envName is the variable of a flag: log-level is COPPICE_LOG_LEVEL.
func envName(flag string) string {
	return "COPPICE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// maxConfig bounds a config file.
const maxConfig = 1 << 20

// globalFlags are the command line's, not the node's: neither the environment of a node nor its file sets them here.
var globalFlags = []string{"help", "output", "timeout", "token"}

// layer sets the flags that were not given from the environment, and those not there either from the file.
func layer(fs *pflag.FlagSet, getenv func(string) string) error {
	path, from := "", "--config"
	if fl := fs.Lookup("config"); fl != nil {
		if path = fl.Value.String(); path == "" {
			path, from = getenv(envName("config")), "$"+envName("config")
		}
	}
	file, err := readConfig(path, from, fs)
	if err != nil {
		return err
	}
	var bad error
	fs.VisitAll(func(fl *pflag.Flag) {
		if bad != nil || fl.Changed || fl.Name == "config" || slices.Contains(globalFlags, fl.Name) {
			return
		}
		v := getenv(envName(fl.Name))
		if fl.Name == "api" && !strings.Contains(v, "://") {
			v = "" // the name of a node: that is for the commands which talk to one
		}
		if v != "" {
			bad = set(fs, fl.Name, []string{v}, "$"+envName(fl.Name))
		} else if x, ok := file[fl.Name]; ok {
			bad = set(fs, fl.Name, x.values, x.at)
		}
	})
	return bad
}

func set(fs *pflag.FlagSet, name string, values []string, from string) error {
	for _, v := range values {
		if err := fs.Set(name, v); err != nil {
			return usagef("%s: %s", from, strings.TrimPrefix(err.Error(), "invalid argument "))
		}
	}
	return nil
}

// setting is a key of a config file.
type setting struct {
	values []string
	at     string // file:line:col: key
}

// readConfig reads a YAML file whose keys are names of flags. Lists are given for repeatable flags; maps become k=v.
func readConfig(path, from string, fs *pflag.FlagSet) (map[string]setting, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, usagef("%s: %v", from, err)
	}
	defer f.Close()
	raw, err := readAtMost(f, maxConfig)
	if err != nil {
		return nil, usagef("%s %s: %v", from, path, err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(raw, &doc); err != nil && !errors.Is(err, io.EOF) {
		return nil, usagef("%s: %s", path, oneLine(strings.TrimPrefix(err.Error(), "yaml: ")))
	}
	if len(doc.Content) == 0 {
		return nil, nil // an empty file
	}
	top := doc.Content[0]
	if top.Kind != yaml.MappingNode {
		return nil, usagef("%s:%d:%d: want keys and values", path, top.Line, top.Column)
	}
	return settings(path, top, fs)
}

func settings(path string, top *yaml.Node, fs *pflag.FlagSet) (map[string]setting, error) {
	out := map[string]setting{}
	for i := 0; i+1 < len(top.Content); i += 2 {
		k, v := top.Content[i], top.Content[i+1]
		at := fmt.Sprintf("%s:%d:%d: %s", path, k.Line, k.Column, k.Value)
		if fs.Lookup(k.Value) == nil || k.Value == "config" || slices.Contains(globalFlags, k.Value) {
			return nil, usagef("%s: there is no such key; keys are %s", at, strings.Join(keys(fs), ", "))
		}
		if _, twice := out[k.Value]; twice {
			return nil, usagef("%s: it is there twice", at)
		}
		values, err := scalars(v)
		if err != nil {
			return nil, usagef("%s: %v", at, err)
		}
		out[k.Value] = setting{values: values, at: at}
	}
	return out, nil
}

func scalars(v *yaml.Node) ([]string, error) {
	if v.Kind == yaml.AliasNode {
		v = v.Alias
	}
	var out []string
	switch v.Kind {
	case yaml.ScalarNode:
		if v.Tag == "!!null" {
			return nil, nil
		}
		return []string{v.Value}, nil
	case yaml.SequenceNode:
		for _, x := range v.Content {
			if x.Kind != yaml.ScalarNode {
				return nil, fmt.Errorf("want a list of simple values")
			}
			out = append(out, x.Value)
		}
		return out, nil
	case yaml.MappingNode:
		for i := 0; i+1 < len(v.Content); i += 2 {
			if v.Content[i+1].Kind != yaml.ScalarNode {
				return nil, fmt.Errorf("want simple values by key")
			}
			out = append(out, v.Content[i].Value+"="+v.Content[i+1].Value)
		}
		return []string{strings.Join(out, ",")}, nil
	}
	return nil, fmt.Errorf("want a value, a list or keys and values")
}

func keys(fs *pflag.FlagSet) []string {
	var out []string
	fs.VisitAll(func(fl *pflag.Flag) {
		if fl.Name != "config" && !slices.Contains(globalFlags, fl.Name) {
			out = append(out, fl.Name)
		}
	})
	return out
}
