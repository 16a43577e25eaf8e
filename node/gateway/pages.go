package gateway

import (
	"encoding/json"
	"net/http"
	"strings"
)

// problem answers with an error: as JSON to who asks for it, else as text.
func problem(w http.ResponseWriter, r *http.Request, status int, why string, there []string) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		raw, err := json.Marshal(struct {
			Error string   `json:"error"`
			There []string `json:"there,omitempty"`
		}{why, there})
		if err == nil {
			h.Set("Content-Type", "application/json")
			w.WriteHeader(status)
			send(w, raw)
			return
		}
	}
	text := http.StatusText(status) + ": " + strings.ToValidUTF8(why, "\uFFFD") + "\n"
	if len(there) > 0 {
		text += "\nthere are:\n  " + strings.Join(there, "\n  ") + "\n"
	}
	h.Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	send(w, []byte(text))
}

// send writes the end of an answer; that the client has gone is its own business.
func send(w http.ResponseWriter, b []byte) {
	if _, err := w.Write(b); err != nil {
		return
	}
}

// dashboard serves our own pages: nothing from elsewhere runs in them, and nobody frames them.
func dashboard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "+
			"frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cache-Control", "no-cache")
		next.ServeHTTP(w, r)
	})
}

// sandboxPolicy lets an application's page do what a page does, but in an origin of its own.
const sandboxPolicy = "sandbox allow-scripts allow-forms allow-popups allow-modals allow-downloads"

// sandboxed adds sandboxPolicy to an answer at the moment its headers are sent, whatever the application set: several policies hold
// together. Unwrap lets a proxy flush and hijack.
type sandboxed struct {
	http.ResponseWriter
	sent bool
}

func (s *sandboxed) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (s *sandboxed) WriteHeader(status int) {
	if !s.sent && status >= 200 {
		s.sent = true
		s.Header().Add("Content-Security-Policy", sandboxPolicy)
		s.Header().Del("Service-Worker-Allowed")
	}
	s.ResponseWriter.WriteHeader(status)
}

func (s *sandboxed) Write(b []byte) (int, error) {
	if !s.sent {
		s.WriteHeader(http.StatusOK)
	}
	return s.ResponseWriter.Write(b)
}

// FlushError sends what there is, headers first.
func (s *sandboxed) FlushError() error {
	if !s.sent {
		s.WriteHeader(http.StatusOK)
	}
	return http.NewResponseController(s.ResponseWriter).Flush()
}
