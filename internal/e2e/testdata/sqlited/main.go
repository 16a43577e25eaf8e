// Command sqlited is an ordinary program with a SQLite database in a file: it knows nothing of Coppice. POST /put?k=K&v=V stores, GET /get?k=K reads, GET /count
// counts, GET /healthz says that it is well.
package main

import (
	"database/sql"
	"errors"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"

	_ "modernc.org/sqlite"
)

func main() {
	addr := flag.String("listen", "127.0.0.1:"+os.Getenv("PORT"), "where to listen")
	file := flag.String("db", "data/main.db", "the database")
	name := flag.String("name", "sqlited", "what GET /name answers")
	flag.Parse()
	db, err := sql.Open("sqlite", "file:"+*file+"?_pragma=journal_mode(WAL)&_pragma=synchronous(NORMAL)&_pragma=busy_timeout(5000)")
	if err != nil {
		log.Fatal(err)
	}
	if _, err := db.Exec("create table if not exists kv (k text primary key, v text) without rowid"); err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("POST /put", func(w http.ResponseWriter, r *http.Request) {
		_, err := db.Exec("insert into kv values (?, ?) on conflict (k) do update set v = excluded.v", r.URL.Query().Get("k"), r.URL.Query().Get("v"))
		answer(w, "ok", err)
	})
	http.HandleFunc("GET /get", func(w http.ResponseWriter, r *http.Request) {
		var v string
		err := db.QueryRow("select v from kv where k = ?", r.URL.Query().Get("k")).Scan(&v)
		answer(w, v, err)
	})
	http.HandleFunc("GET /count", func(w http.ResponseWriter, _ *http.Request) {
		var n, whole string
		err := db.QueryRow("select count(*) from kv").Scan(&n)
		if err == nil {
			err = db.QueryRow("pragma integrity_check").Scan(&whole)
		}
		answer(w, n+" "+whole, err)
	})
	http.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, "well", db.Ping()) })
	http.HandleFunc("GET /name", func(w http.ResponseWriter, _ *http.Request) { answer(w, *name, nil) })
	http.HandleFunc("POST /crash", func(http.ResponseWriter, *http.Request) {
		fmt.Fprintln(os.Stderr, "sqlited: told to crash")
		os.Exit(3)
	})
	log.Fatal(http.ListenAndServe(*addr, nil))
}

func answer(w http.ResponseWriter, text string, err error) {
	switch {
	case errors.Is(err, sql.ErrNoRows):
		http.Error(w, "no such key", http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		fmt.Fprint(w, text)
	}
}
