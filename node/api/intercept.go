package api

import (
	"context"
	"log/slog"
	"path"
	"strings"
	"time"

	"connectrpc.com/connect"
)

// interceptor bounds each call's time, gives each error a Problem, and logs: a call at debug, a fault of the node at warn.
type interceptor struct{ log *slog.Logger }

func (i *interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, MaxUnary)
		defer cancel()
		start := time.Now()
		res, err := next(ctx, req)
		if err = i.end(ctx, req.Spec(), start, err); err != nil {
			return nil, err
		}
		return res, nil
	}
}

func (i *interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if conn.Spec().StreamType == connect.StreamTypeClient {
			c, cancel := context.WithTimeout(ctx, MaxPush)
			defer cancel()
			ctx = c
		}
		start := time.Now()
		return i.end(ctx, conn.Spec(), start, next(ctx, conn))
	}
}

// WrapStreamingClient leaves clients alone.
func (i *interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (i *interceptor) end(ctx context.Context, spec connect.Spec, start time.Time, err error) error {
	attrs := []any{"method", path.Base(spec.Procedure), "took", time.Since(start)}
	if from := ForwardedFrom(ctx); from != "" {
		attrs = append(attrs, "from", from)
	}
	if err == nil {
		i.log.Debug("control API", attrs...)
		return nil
	}
	ce := asProblem(ctx, verbOf(spec), err)
	attrs = append(attrs, "code", ce.Code().String(), "err", err)
	level := slog.LevelDebug
	switch ce.Code() {
	case connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		level = slog.LevelWarn
	}
	i.log.Log(ctx, level, "control API", attrs...)
	return ce
}

// verbOf is the command behind a method: "/coppice.api.v1.Control/DhtClosest" is "dht closest".
func verbOf(spec connect.Spec) string {
	var b strings.Builder
	for i, r := range path.Base(spec.Procedure) {
		if r >= 'A' && r <= 'Z' {
			if i > 0 {
				b.WriteByte(' ')
			}
			r += 'a' - 'A'
		}
		b.WriteRune(r)
	}
	return b.String()
}
