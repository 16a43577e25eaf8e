package gateway

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// MaxRequests bounds the requests under way at one gateway, followed event streams of dashboards among them.
const MaxRequests = 4096

// Apps knows who answers for an application.
type Apps interface {
	// Handler returns what answers requests of an application for a path ("/" and what follows the application's own part). It is
	// called for each request. ErrNotFound: there is no such application, or nothing of it is exposed at that path. An
	// *UnavailableError: there is one, and it cannot answer now.
	Handler(application, path string) (http.Handler, error)
	// Names lists the applications that have something exposed.
	Names() []string
}

// ErrNotFound says that no application answers there.
var ErrNotFound = errors.New("no such application")

// UnavailableError says that an application cannot answer now, for example during a failover.
type UnavailableError struct {
	Why   string
	After time.Duration // when it is worth trying again; at least a second is told
}

func (e *UnavailableError) Error() string { return e.Why }

// Config is what a gateway needs. Nil handlers answer 404.
type Config struct {
	Apps    Apps
	API     http.Handler                // the token door of the control API; it gets paths that begin with /api/
	Metrics http.Handler                // Prometheus
	Health  func(context.Context) error // nil: always well. The text of the error is shown to anybody
	Log     *slog.Logger
}

//go:embed web
var web embed.FS

// New builds the handler of a gateway.
func New(cfg Config) (http.Handler, error) {
	if cfg.Apps == nil || cfg.Log == nil {
		return nil, errors.New("gateway: Apps and Log must be set")
	}
	files, err := fs.Sub(web, "web")
	if err != nil {
		return nil, fmt.Errorf("gateway: %w", err)
	}
	g := &gateway{Config: cfg, slots: make(chan struct{}, MaxRequests)}
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", dashboard(http.FileServerFS(files)))
	mux.Handle("GET /ui/", dashboard(http.StripPrefix("/ui", http.FileServerFS(files))))
	mux.HandleFunc("GET /healthz", g.healthz)
	mux.Handle("/api/", orMissing(cfg.API))
	mux.Handle("GET /metrics", orMissing(cfg.Metrics))
	mux.HandleFunc("/app/", g.byPath)
	mux.HandleFunc("/", g.missing)
	g.own = mux
	return g, nil
}

type gateway struct {
	Config
	own   http.Handler // everything that is not reached by the name of an application
	slots chan struct{}
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	select {
	case g.slots <- struct{}{}:
		defer func() { <-g.slots }()
	default:
		unavailable(w, r, fmt.Sprintf("this gateway is busy with %d requests", MaxRequests), time.Second)
		return
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if app := hostApp(r.Host); app != "" && g.byHost(w, r, app) {
		return
	}
	g.own.ServeHTTP(w, r)
}

// hostApp is the first label of a host name that has several: "shop" of shop.localhost:8080. An address has none.
func hostApp(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return ""
	}
	label, rest, ok := strings.Cut(host, ".")
	if !ok || rest == "" {
		return ""
	}
	return strings.ToLower(label)
}

// byHost answers a request that names an application by host; false when the host is no application's: it is then this node's own name.
func (g *gateway) byHost(w http.ResponseWriter, r *http.Request, app string) bool {
	h, err := g.Apps.Handler(app, r.URL.Path)
	if errors.Is(err, ErrNotFound) && !slices.Contains(g.Apps.Names(), app) {
		return false
	}
	if err != nil {
		g.refuse(w, r, app, r.URL.Path, err)
		return true
	}
	h.ServeHTTP(w, outside(r, ""))
	return true
}

// byPath answers /app/<application>/….
func (g *gateway) byPath(w http.ResponseWriter, r *http.Request) {
	app, rest, slash := strings.Cut(strings.TrimPrefix(r.URL.Path, "/app/"), "/")
	if app == "" {
		g.missing(w, r)
		return
	}
	if !slash { // relative links in its pages need the slash
		u := *r.URL
		u.Path, u.RawPath = u.Path+"/", ""
		http.Redirect(w, r, u.RequestURI(), http.StatusTemporaryRedirect)
		return
	}
	path := "/" + rest
	h, err := g.Apps.Handler(app, path)
	if err != nil {
		g.refuse(w, r, app, path, err)
		return
	}
	prefix := "/app/" + app
	r = outside(r, prefix)
	r.URL.Path = path
	r.URL.RawPath = strings.TrimPrefix(r.URL.RawPath, "/app/"+url.PathEscape(app))
	h.ServeHTTP(&sandboxed{ResponseWriter: w}, r)
}

// outside makes the request an application sees: it knows how it was reached, and nobody outside can speak for the system.
func outside(r *http.Request, prefix string) *http.Request {
	r = r.Clone(r.Context())
	for name := range r.Header {
		if strings.HasPrefix(name, "X-Coppice-") || strings.HasPrefix(name, "X-Forwarded-") || name == "Forwarded" || name == "X-Binding" {
			r.Header.Del(name)
		}
	}
	if ip, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		r.Header.Set("X-Forwarded-For", ip)
	}
	r.Header.Set("X-Forwarded-Host", r.Host)
	r.Header.Set("X-Forwarded-Proto", "http")
	if prefix != "" {
		r.Header.Set("X-Forwarded-Prefix", prefix)
	}
	return r
}

// refuse tells why an application does not answer.
func (g *gateway) refuse(w http.ResponseWriter, r *http.Request, app, path string, err error) {
	var away *UnavailableError
	switch {
	case errors.As(err, &away):
		unavailable(w, r, app+" cannot answer now: "+away.Why, away.After)
	case errors.Is(err, ErrNotFound):
		names := g.Apps.Names()
		if slices.Contains(names, app) {
			problem(w, r, http.StatusNotFound, fmt.Sprintf("%s has nothing at %s", app, path), nil)
			return
		}
		problem(w, r, http.StatusNotFound, fmt.Sprintf("there is no application %q here", app), appPaths(names))
	default:
		g.Log.Warn("gateway: an application could not be reached", "application", app, "path", path, "err", err)
		problem(w, r, http.StatusBadGateway, app+" could not be reached: "+err.Error(), nil)
	}
}

func (g *gateway) missing(w http.ResponseWriter, r *http.Request) {
	there := append([]string{"/", "/healthz", "/metrics", "/api/"}, appPaths(g.Apps.Names())...)
	switch r.URL.Path {
	case "/", "/healthz", "/metrics": // known, by another method
		w.Header().Set("Allow", "GET, HEAD")
		problem(w, r, http.StatusMethodNotAllowed, r.Method+" is not possible here", nil)
		return
	}
	problem(w, r, http.StatusNotFound, "there is nothing at "+r.URL.Path, there)
}

func appPaths(names []string) []string {
	var out []string
	for _, n := range names {
		out = append(out, "/app/"+n+"/")
	}
	slices.Sort(out)
	return out
}

func (g *gateway) healthz(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if g.Health != nil {
		if err := g.Health(r.Context()); err != nil {
			problem(w, r, http.StatusServiceUnavailable, "not well: "+err.Error(), nil)
			return
		}
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if _, err := w.Write([]byte("ok\n")); err != nil {
		g.Log.Debug("gateway: healthz was not sent", "err", err)
	}
}

func orMissing(h http.Handler) http.Handler {
	if h == nil {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			problem(w, r, http.StatusNotFound, "this node does not serve "+r.URL.Path, nil)
		})
	}
	return h
}

func unavailable(w http.ResponseWriter, r *http.Request, why string, after time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(after.Seconds())))))
	problem(w, r, http.StatusServiceUnavailable, why, nil)
}
