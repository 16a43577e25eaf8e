package kb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"
	"sync"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

const (
	// DefaultLimit is how many rows an answer has at the most where the asker sets no other limit.
	DefaultLimit = 10_000
	// MaxTime bounds one query. SQL has no loops, but a join of everything with everything comes close.
	MaxTime = 10 * time.Second
)

// Column is one column of a table. Type is a SQLite type name: TEXT, INTEGER or REAL.
type Column struct{ Name, Type, Doc string }

// Rows is what a table has to say now.
type Rows struct {
	Rows     [][]any       // string, int64, float64, bool, []byte or nil; one value per column, age_ms and source included
	MaxAge   time.Duration // of the oldest row
	Asked    int           // nodes that were asked, this one included
	Answered int           // and how many of them answered
}

// Freshness is what the asker wants.
type Freshness struct {
	Within       time.Duration // ask the sources when what is here is older; 0: what is here
	Linearizable bool          // as of a point that no later query can undercut
}

// Table is registered by the package that owns its meaning.
type Table struct {
	Name    string
	Doc     string
	Columns []Column
	List    func(ctx context.Context, f Freshness) (Rows, error)
}

// Engine answers queries. It is safe for concurrent use.
type Engine struct {
	mu     sync.RWMutex // guards tables
	tables map[string]Table
}

// New returns an engine without tables.
func New() *Engine { return &Engine{tables: map[string]Table{}} }

// Register adds a table. A second of the same name is an error.
func (e *Engine) Register(t Table) error {
	if t.Name == "" || t.List == nil || len(t.Columns) == 0 {
		return fmt.Errorf("register table %q: it needs a name, columns and a list function", t.Name)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.tables[t.Name]; ok {
		return fmt.Errorf("register table %q: it is there already", t.Name)
	}
	e.tables[t.Name] = t
	return nil
}

// Tables lists what can be queried, by name.
func (e *Engine) Tables() []Table {
	e.mu.RLock()
	defer e.mu.RUnlock()
	out := make([]Table, 0, len(e.tables))
	for _, t := range e.tables {
		out = append(out, t)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// Options of one query.
type Options struct {
	Freshness
	Limit int // rows; 0: DefaultLimit
}

// Result is an answer with what it rests on.
type Result struct {
	Columns   []string
	Rows      [][]any // int64, float64, string, []byte or nil
	AsOf      time.Time
	MaxAge    time.Duration // of the oldest row that any table listed
	Asked     int
	Answered  int
	Truncated bool
}

// Error is a query that cannot be answered as asked; Try says what would help.
type Error struct {
	Why string
	Try string
}

func (e *Error) Error() string { return e.Why }

// Query runs one SELECT. It fails with *Error where the query is at fault.
func (e *Engine) Query(ctx context.Context, query string, opts Options) (Result, error) {
	if strings.TrimSpace(query) == "" {
		return Result{}, &Error{Why: "the query is empty", Try: "coppice query 'select * from nodes'"}
	}
	if !reads(query) {
		return Result{}, &Error{Why: "the knowledge base is read with SELECT (or WITH, VALUES, EXPLAIN)", Try: "coppice query 'select * from nodes'"}
	}
	ctx, cancel := context.WithTimeout(ctx, MaxTime)
	defer cancel()
	run := &run{ctx: ctx, opts: opts, res: Result{AsOf: time.Now()}}
	db, err := e.open(ctx, run)
	if err != nil {
		return Result{}, err
	}
	defer db.Close()
	if err := run.query(db, query); err != nil {
		return Result{}, e.explain(ctx, err)
	}
	return run.res, nil
}

// reads says whether a statement begins like one that only reads. What follows is held by the sealed engine.
func reads(query string) bool {
	q := strings.ToLower(strings.TrimLeft(query, " \t\r\n("))
	for _, w := range []string{"select", "with", "values", "explain"} {
		if strings.HasPrefix(q, w) {
			return true
		}
	}
	return false
}

// run is one query under way.
type run struct {
	ctx    context.Context
	opts   Options
	mu     sync.Mutex // guards res and listed
	res    Result
	listed map[string]Rows
}

// open gives the query a SQLite engine of its own with every table in it.
func (e *Engine) open(ctx context.Context, r *run) (*sql.DB, error) {
	drv := &sqlite.Driver{}
	tables := e.Tables()
	for _, t := range tables {
		if err := drv.RegisterModule("coppice_"+t.Name, &module{table: t, run: r}); err != nil {
			return nil, fmt.Errorf("open the query engine: %w", err)
		}
	}
	db := sql.OpenDB(connector{drv})
	db.SetMaxOpenConns(1)
	for _, t := range tables {
		if _, err := db.ExecContext(ctx, fmt.Sprintf("create virtual table %q using coppice_%s", t.Name, t.Name)); err != nil {
			return nil, errors.Join(fmt.Errorf("open table %s: %w", t.Name, err), db.Close())
		}
	}
	if err := seal(ctx, db); err != nil {
		return nil, errors.Join(fmt.Errorf("open the query engine: %w", err), db.Close())
	}
	return db, nil
}

// seal makes the engine read-only and keeps it off the disk: nothing can be attached, and nothing written.
func seal(ctx context.Context, db *sql.DB) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := sqlite.Limit(conn, sqlite3.SQLITE_LIMIT_ATTACHED, 0); err != nil {
		return err
	}
	_, err = conn.ExecContext(ctx, "pragma query_only = on")
	return err
}

type connector struct{ drv *sqlite.Driver }

func (c connector) Connect(context.Context) (driver.Conn, error) {
	return c.drv.Open("file::memory:?mode=memory")
}
func (c connector) Driver() driver.Driver { return c.drv }

func (r *run) query(db *sql.DB, query string) error {
	rows, err := db.QueryContext(r.ctx, query)
	if err != nil {
		return err
	}
	defer rows.Close()
	if r.res.Columns, err = rows.Columns(); err != nil {
		return err
	}
	limit := r.opts.Limit
	if limit <= 0 {
		limit = DefaultLimit
	}
	for rows.Next() {
		if len(r.res.Rows) == limit {
			r.res.Truncated = true
			break
		}
		row := make([]any, len(r.res.Columns))
		ptrs := make([]any, len(row))
		for i := range row {
			ptrs[i] = &row[i]
		}
		if err := rows.Scan(ptrs...); err != nil {
			return err
		}
		r.res.Rows = append(r.res.Rows, row)
	}
	return rows.Err()
}

// rows lists a table once for the whole query, so that a self-join sees one state.
func (r *run) rows(t Table) ([][]any, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if got, ok := r.listed[t.Name]; ok {
		return got.Rows, nil
	}
	got, err := t.List(r.ctx, r.opts.Freshness)
	if err != nil {
		return nil, fmt.Errorf("table %s: %w", t.Name, err)
	}
	for i, row := range got.Rows {
		if len(row) != len(t.Columns) {
			return nil, fmt.Errorf("table %s: row %d has %d values for %d columns", t.Name, i, len(row), len(t.Columns))
		}
	}
	if r.listed == nil {
		r.listed = map[string]Rows{}
	}
	r.listed[t.Name] = got
	r.res.MaxAge = max(r.res.MaxAge, got.MaxAge)
	r.res.Asked, r.res.Answered = max(r.res.Asked, got.Asked), max(r.res.Answered, got.Answered)
	return got.Rows, nil
}

// explain turns what SQLite says into what a user can act on.
func (e *Engine) explain(ctx context.Context, err error) error {
	msg := strings.TrimPrefix(err.Error(), "SQL logic error: ")
	var names []string
	for _, t := range e.Tables() {
		names = append(names, t.Name)
	}
	switch {
	case ctx.Err() != nil:
		return &Error{Why: fmt.Sprintf("the query took longer than %s", MaxTime), Try: "a narrower join, or a limit on rows"}
	case strings.Contains(msg, "no such table"):
		return &Error{Why: msg, Try: "one of " + strings.Join(names, ", ")}
	case strings.Contains(msg, "no such column"):
		return &Error{Why: msg, Try: "coppice query \"select name, type from pragma_table_info('nodes')\""}
	case strings.Contains(msg, "readonly"), strings.Contains(msg, "read-only"), strings.Contains(msg, "may not be modified"):
		return &Error{Why: "the knowledge base is read with SQL, not written", Try: "coppice deploy, attr, swap … change desired state"}
	case errors.Is(err, io.EOF):
		return err
	}
	return &Error{Why: msg}
}
