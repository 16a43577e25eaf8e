package components

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// jsonOf writes a YAML value as JSON, with sorted keys, so that the same value is the same text. The tree's aliases are written out
// and its depth is bounded.
func jsonOf(n *yaml.Node) (string, error) {
	var b strings.Builder
	if err := writeJSON(&b, n); err != nil {
		return "", err
	}
	return b.String(), nil
}

func writeJSON(b *strings.Builder, n *yaml.Node) error {
	switch n.Kind {
	case yaml.ScalarNode:
		return writeScalar(b, n)
	case yaml.SequenceNode:
		b.WriteByte('[')
		for i, c := range n.Content {
			if i > 0 {
				b.WriteByte(',')
			}
			if err := writeJSON(b, c); err != nil {
				return err
			}
		}
		b.WriteByte(']')
		return nil
	case yaml.MappingNode:
		return writeObject(b, n)
	}
	return errors.New("found a value that has no JSON, expected text, a number, true, false, a list or a mapping")
}

func writeObject(b *strings.Builder, n *yaml.Node) error {
	type pair struct{ key, value *yaml.Node }
	var pairs []pair
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Kind != yaml.ScalarNode {
			return errors.New("found a key that is no text, expected text")
		}
		pairs = append(pairs, pair{n.Content[i], n.Content[i+1]})
	}
	slices.SortFunc(pairs, func(x, y pair) int { return strings.Compare(x.key.Value, y.key.Value) })
	b.WriteByte('{')
	for i, p := range pairs {
		if i > 0 {
			if pairs[i-1].key.Value == p.key.Value {
				return fmt.Errorf("found the key %q twice, expected it once", shorten(p.key.Value))
			}
			b.WriteByte(',')
		}
		if err := writeText(b, p.key.Value); err != nil {
			return err
		}
		b.WriteByte(':')
		if err := writeJSON(b, p.value); err != nil {
			return err
		}
	}
	b.WriteByte('}')
	return nil
}

func writeScalar(b *strings.Builder, n *yaml.Node) error {
	switch n.ShortTag() {
	case "!!null":
		b.WriteString("null")
		return nil
	case "!!bool":
		var v bool
		if err := n.Decode(&v); err != nil {
			return fmt.Errorf("found %q, expected true or false", shorten(n.Value))
		}
		fmt.Fprint(b, v)
		return nil
	case "!!int":
		var v any
		if err := n.Decode(&v); err != nil {
			return fmt.Errorf("found %q, expected a number", shorten(n.Value))
		}
		return writeValue(b, v)
	case "!!float":
		var v float64
		if err := n.Decode(&v); err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Errorf("found %q, expected a finite number", shorten(n.Value))
		}
		return writeValue(b, v)
	}
	return writeText(b, n.Value)
}

func writeText(b *strings.Builder, s string) error { return writeValue(b, s) }

func writeValue(b *strings.Builder, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("found a value that has no JSON: %w", err)
	}
	b.Write(text)
	return nil
}
