package components

import (
	"fmt"

	"cel.dev/cel-go/common/types"
)

// The types of node and component. They are structures to CEL, so that a misspelt field of component is an error at deploy.
const (
	nodeType      = "coppice.node"
	componentType = "coppice.component"
)

// provider tells CEL the fields of our types; the rest is CEL's own.
type provider struct{ *types.Registry }

func (p *provider) FindStructType(name string) (*types.Type, bool) {
	if name == nodeType || name == componentType || name == groupType || name == linkType {
		return types.NewTypeTypeWithParam(types.NewObjectType(name)), true
	}
	return p.Registry.FindStructType(name)
}

func (p *provider) FindStructFieldNames(name string) ([]string, bool) {
	switch name {
	case nodeType:
		return fieldNames(nodeFields), true
	case componentType:
		return fieldNames(componentFields), true
	case groupType:
		return fieldNames(groupFields), true
	case linkType:
		return fieldNames(linkFields), true
	}
	return p.Registry.FindStructFieldNames(name)
}

func (p *provider) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	switch name {
	case nodeType:
		if f, ok := find(nodeFields, field); ok {
			return f, true
		}
		return factField(field), true
	case componentType:
		return find(componentFields, field)
	case groupType:
		return find(groupFields, field)
	case linkType:
		return find(linkFields, field)
	}
	return p.Registry.FindStructFieldType(name, field)
}

type namedField struct {
	name string
	t    *types.FieldType
}

func find(fields []namedField, name string) (*types.FieldType, bool) {
	for _, f := range fields {
		if f.name == name {
			return f.t, true
		}
	}
	return nil, false
}

func fieldNames(fields []namedField) []string {
	out := make([]string, len(fields))
	for i, f := range fields {
		out[i] = f.name
	}
	return out
}

// fieldOf makes a field that is always there.
func fieldOf[T any](name string, t *types.Type, get func(*T) any) namedField {
	return namedField{name, &types.FieldType{
		Type:  t,
		IsSet: func(any) bool { return true },
		GetFrom: func(target any) (any, error) {
			v, ok := target.(*T)
			if !ok || v == nil {
				return nil, fmt.Errorf("%s is not known here", name)
			}
			return get(v), nil
		},
	}}
}

var nodeFields = []namedField{
	fieldOf("id", types.StringType, func(n *NodeFacts) any { return n.ID }),
	fieldOf("name", types.StringType, func(n *NodeFacts) any { return n.Name }),
	fieldOf("zone", types.StringType, func(n *NodeFacts) any { return n.Zone }),
	fieldOf("role", types.StringType, func(n *NodeFacts) any { return n.Role }),
	fieldOf("platform", types.StringType, func(n *NodeFacts) any { return n.Platform }),
	fieldOf("state", types.StringType, func(n *NodeFacts) any { return n.State }),
	fieldOf("draining", types.BoolType, func(n *NodeFacts) any { return n.Draining }),
	fieldOf("labels", types.NewMapType(types.StringType, types.StringType), func(n *NodeFacts) any { return n.Labels }),
	fieldOf("cpu", types.DoubleType, func(n *NodeFacts) any { return n.CPU }),
	fieldOf("memory_mib", types.DoubleType, func(n *NodeFacts) any { return n.MemoryMiB }),
	fieldOf("disk_mib", types.DoubleType, func(n *NodeFacts) any { return n.DiskMiB }),
}

var componentFields = []namedField{
	fieldOf("key", types.StringType, func(c *ComponentFacts) any { return c.Key }),
	fieldOf("application", types.StringType, func(c *ComponentFacts) any { return c.Application }),
	fieldOf("name", types.StringType, func(c *ComponentFacts) any { return c.Name }),
	fieldOf("artifact", types.StringType, func(c *ComponentFacts) any { return c.Artifact }),
	fieldOf("count", types.IntType, func(c *ComponentFacts) any { return c.Count }),
	fieldOf("cpu", types.DoubleType, func(c *ComponentFacts) any { return c.CPU }),
	fieldOf("memory_mib", types.DoubleType, func(c *ComponentFacts) any { return c.MemoryMiB }),
	fieldOf("disk_mib", types.DoubleType, func(c *ComponentFacts) any { return c.DiskMiB }),
}

// factField is a number somebody may have observed of the node. The set of facts is open: sensors are plugins.
func factField(name string) *types.FieldType {
	return &types.FieldType{
		Type: types.DoubleType,
		IsSet: func(target any) bool {
			n, ok := target.(*NodeFacts)
			if !ok || n == nil {
				return false
			}
			_, known := n.Facts[name]
			return known
		},
		GetFrom: func(target any) (any, error) {
			if n, ok := target.(*NodeFacts); ok && n != nil {
				if v, known := n.Facts[name]; known {
					return v, nil
				}
			}
			return nil, fmt.Errorf("fact %s is unknown", name)
		},
	}
}
