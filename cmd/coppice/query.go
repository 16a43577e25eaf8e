package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) queryCmd() *cobra.Command {
	var meta, linearizable bool
	var fresh time.Duration
	var limit uint32
	cmd := c.command(spec{
		group: groupKnow, use: "query SQL", short: "Ask the knowledge base in SQL",
		long: "Ask the knowledge base: nodes, components, instances, checkpoints, facts, events and more are tables (select name from sqlite_master).\n" +
			"Any node answers from what it knows; every row has age_ms and source. --fresh asks the sources, --linearizable the arbiter.",
		example: examples(
			`coppice query "select name, free_mib, age_ms from nodes"`, "",
			`coppice query "select node, count(*) n from instances group by node" --meta`, "with how many nodes answered",
			`coppice query --fresh 2s "select * from facts where name = 'load1'"`, "nothing older than two seconds"),
		min: 1, max: 1, timeout: actTimeout,
		run: func(ctx context.Context, args []string) error {
			cl, err := c.client()
			if err != nil {
				return err
			}
			res, err := cl.Query(ctx, &apiv1.QueryRequest{Sql: args[0], FreshMs: uint64(max(fresh, 0).Milliseconds()), Linearizable: linearizable, Limit: limit})
			if err != nil {
				return err
			}
			if res.Truncated {
				defer c.warn("there are more rows than %d; give --limit", len(res.Rows))
			}
			if c.json() {
				return c.document(queryJSON(res, meta))
			}
			return c.text(func(w io.Writer) { c.queryText(w, res, meta) })
		},
	})
	cmd.Flags().BoolVar(&meta, "meta", false, "say how old the answer is and how many nodes gave it")
	cmd.Flags().DurationVar(&fresh, "fresh", 0, "ask the sources of what is older")
	cmd.Flags().BoolVar(&linearizable, "linearizable", false, "go through the arbiter")
	cmd.Flags().Uint32Var(&limit, "limit", 0, "at most so many rows (default: the node's bound)")
	return cmd
}

// queryJSON is the answer as scripts read it: a list of objects whose keys are the columns in their order.
func queryJSON(res *apiv1.QueryResponse, meta bool) []byte {
	names := columnNames(res.Columns)
	rows := []byte{'['}
	for i, r := range res.Rows {
		if i > 0 {
			rows = append(rows, ',')
		}
		rows = append(rows, '{')
		for j, name := range names {
			if j > 0 {
				rows = append(rows, ',')
			}
			rows = append(api.AppendString(rows, name), ':')
			var v *apiv1.Value
			if j < len(r.Values) {
				v = r.Values[j]
			}
			rows = appendValue(rows, v)
		}
		rows = append(rows, '}')
	}
	rows = append(rows, ']')
	if !meta {
		return rows
	}
	out := append([]byte(`{"rows":`), rows...)
	out = append(out, `,"as_of":`...)
	if res.AsOf == nil {
		out = append(out, "null"...)
	} else {
		out = api.AppendString(out, res.AsOf.AsTime().Format(time.RFC3339Nano))
	}
	out = api.AppendFloat(append(out, `,"max_age_ms":`...), res.MaxAgeMs, 64)
	out = fmt.Appendf(out, `,"nodes_asked":%d,"nodes_answered":%d,"truncated":%t}`, res.NodesAsked, res.NodesAnswered, res.Truncated)
	return out
}

// columnNames makes names of columns differ: an object has each key once.
func columnNames(columns []string) []string {
	seen := map[string]bool{}
	out := make([]string, len(columns))
	for i, name := range columns {
		unique := name
		for n := 2; seen[unique]; n++ {
			unique = name + "_" + strconv.Itoa(n)
		}
		seen[unique] = true
		out[i] = unique
	}
	return out
}

func appendValue(b []byte, v *apiv1.Value) []byte {
	switch k := v.GetKind().(type) {
	case *apiv1.Value_Integer:
		return strconv.AppendInt(b, k.Integer, 10)
	case *apiv1.Value_Real:
		return api.AppendFloat(b, k.Real, 64)
	case *apiv1.Value_Text:
		return api.AppendString(b, k.Text)
	case *apiv1.Value_Blob:
		return api.AppendString(b, base64.StdEncoding.EncodeToString(k.Blob))
	case *apiv1.Value_Boolean:
		return strconv.AppendBool(b, k.Boolean)
	}
	return append(b, "null"...)
}

func (c *cli) queryText(w io.Writer, res *apiv1.QueryResponse, meta bool) {
	t := c.table(res.Columns...)
	for _, r := range res.Rows {
		row := make([]any, len(res.Columns))
		for j := range row {
			row[j] = cell{}
			if j < len(r.Values) {
				row[j] = valueCell(r.Values[j])
			}
		}
		t.row(row...)
	}
	t.write(w)
	if meta {
		fmt.Fprintf(w, "\n%s, the oldest %s, %d of %d nodes answered\n", plural(len(res.Rows), "row", "rows"), msText(res.MaxAgeMs), res.NodesAnswered, res.NodesAsked)
	}
}

func valueCell(v *apiv1.Value) cell {
	switch k := v.GetKind().(type) {
	case *apiv1.Value_Integer:
		return cell{strconv.FormatInt(k.Integer, 10), ""}
	case *apiv1.Value_Real:
		return cell{strconv.FormatFloat(k.Real, 'g', 6, 64), ""}
	case *apiv1.Value_Text:
		return cell{printable(k.Text), ""}
	case *apiv1.Value_Blob:
		return cell{"(" + bytesText(uint64(len(k.Blob))) + ")", dim}
	case *apiv1.Value_Boolean:
		return cell{strconv.FormatBool(k.Boolean), ""}
	}
	return cell{"null", dim}
}
