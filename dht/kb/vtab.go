package kb

import (
	"fmt"
	"strings"

	"modernc.org/sqlite/vtab"
)

// module makes one of our tables a SQLite virtual table for the time of one query.
type module struct {
	table Table
	run   *run
}

func (m *module) Create(ctx vtab.Context, _ []string) (vtab.Table, error) {
	cols := make([]string, len(m.table.Columns))
	for i, c := range m.table.Columns {
		cols[i] = fmt.Sprintf("%q %s", c.Name, c.Type)
	}
	if err := ctx.Declare("create table x(" + strings.Join(cols, ", ") + ")"); err != nil {
		return nil, fmt.Errorf("declare table %s: %w", m.table.Name, err)
	}
	return m, nil
}

func (m *module) Connect(ctx vtab.Context, args []string) (vtab.Table, error) {
	return m.Create(ctx, args)
}

// BestIndex leaves filtering to SQLite: a listing is small and in memory.
func (m *module) BestIndex(info *vtab.IndexInfo) error {
	info.EstimatedCost, info.EstimatedRows = 1000, 1000
	return nil
}
func (m *module) Open() (vtab.Cursor, error) { return &cursor{m: m}, nil }
func (m *module) Disconnect() error          { return nil }
func (m *module) Destroy() error             { return nil }

type cursor struct {
	m    *module
	rows [][]any
	at   int
}

func (c *cursor) Filter(int, string, []vtab.Value) error {
	rows, err := c.m.run.rows(c.m.table)
	if err != nil {
		return err
	}
	c.rows, c.at = rows, 0
	return nil
}

func (c *cursor) Next() error { c.at++; return nil }
func (c *cursor) Eof() bool   { return c.at >= len(c.rows) }

func (c *cursor) Column(col int) (vtab.Value, error) {
	switch v := c.rows[c.at][col].(type) {
	case bool:
		if v {
			return int64(1), nil
		}
		return int64(0), nil
	case int:
		return int64(v), nil
	case uint64:
		return int64(v), nil
	case uint32:
		return int64(v), nil
	default:
		return v, nil
	}
}

func (c *cursor) Rowid() (int64, error) { return int64(c.at), nil }
func (c *cursor) Close() error          { return nil }
