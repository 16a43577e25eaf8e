package kb

import (
	"context"
	"errors"
	"testing"
	"time"
)

func newEngine(t *testing.T) *Engine {
	t.Helper()
	e := New()
	err := e.Register(Table{
		Name: "nodes", Columns: []Column{{Name: "name", Type: "TEXT"}, {Name: "free_mib", Type: "REAL"}, {Name: "alive", Type: "INTEGER"}, {Name: "age_ms", Type: "REAL"}, {Name: "source", Type: "TEXT"}},
		List: func(context.Context, Freshness) (Rows, error) {
			return Rows{Rows: [][]any{{"n1", 512.0, true, 3.0, "n1"}, {"n2", nil, false, 900.0, "n2"}}, MaxAge: 900 * time.Millisecond, Asked: 2, Answered: 1}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestQueryAnswersWithItsAge(t *testing.T) {
	res, err := newEngine(t).Query(t.Context(), "select a.name, b.name as other, a.free_mib from nodes a join nodes b on a.name < b.name", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Rows) != 1 || res.Rows[0][0] != "n1" || res.Rows[0][1] != "n2" || res.Rows[0][2] != 512.0 {
		t.Fatalf("rows %v", res.Rows)
	}
	if res.MaxAge != 900*time.Millisecond || res.Asked != 2 || res.Answered != 1 {
		t.Fatalf("as of: %+v", res)
	}
}

func TestLimitIsSaid(t *testing.T) {
	res, err := newEngine(t).Query(t.Context(), "select name from nodes order by name", Options{Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Rows) != 1 || !res.Truncated {
		t.Fatalf("want one row and truncated, got %+v", res)
	}
}

func TestBadQueriesSayWhatToTry(t *testing.T) {
	e := newEngine(t)
	for _, q := range []string{"", "select * from nodez", "select nope from nodes", "delete from nodes", "create table t(a)", "selec", "attach 'x.db' as y; select 1", "select 1; attach 'x.db' as y", "select 1; vacuum into 'x.db'"} {
		_, err := e.Query(t.Context(), q, Options{})
		var bad *Error
		if !errors.As(err, &bad) {
			t.Errorf("%q: want a query error, got %v", q, err)
		}
	}
}

func TestAHugeJoinIsCut(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := newEngine(t).Query(ctx, "with recursive n(i) as (select 1 union all select i+1 from n) select count(*) from n", Options{})
	if err == nil {
		t.Fatal("an endless query ended")
	}
}
