// Package gateway is the door for people and browsers: the dashboard at /, GET /healthz, GET /metrics, the control API under /api/, and
// each application's http interface at /app/<application>/… and at Host: <application>.<anything>.
//
// It is not a proxy: who answers for an application, on which node, is what Apps says. It keeps no state.
//
// # One origin
//
// Applications under /app/ share the dashboard's origin, and the dashboard's page holds a token. So what they answer there is put into
// a sandbox (Content-Security-Policy: sandbox): their scripts run, but cannot reach the dashboard or its storage, and have an origin of
// their own. An application that needs more is reached by its host name, which is an origin of its own anyway.
//
// # Goroutines
//
// None of its own; it is served by api.Serve.
//
// # Limits
//
// At most MaxRequests requests are under way; one more is answered with 503. Headers are bounded by api.MaxHeader. Bodies are not
// bounded: they are streamed to the application.
package gateway
