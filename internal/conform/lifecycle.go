package conform

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func lifecycles() []check {
	return []check{
		{"lifecycle", "Start, Quiesce, Resume and Stop lead from state to state", states1},
		{"lifecycle", "a verb that does not fit the state is refused, and changes nothing", illegal},
		{"lifecycle", "a verb that was carried out is answered again", repeated},
		{"lifecycle", "calls are served while it is started, and refused before and while it is frozen", servedWhen},
		{"lifecycle", "a heartbeat is answered with its number and the newest token", heartbeats},
		{"lifecycle", "the HTTP interface answers on its socket, its node only", httpSocket},
	}
}

// Verbs of the lifecycle, by the contract's names.
var verbs = map[string]func(context.Context, *process) (*componentv1.Status, error){
	"Start": func(ctx context.Context, p *process) (*componentv1.Status, error) {
		return p.control.Start(ctx, startRequest())
	},
	"Quiesce": func(ctx context.Context, p *process) (*componentv1.Status, error) {
		return p.control.Quiesce(ctx, &componentv1.QuiesceRequest{DeadlineMs: 5000})
	},
	"Resume": func(ctx context.Context, p *process) (*componentv1.Status, error) {
		return p.control.Resume(ctx, &componentv1.ResumeRequest{})
	},
	"Stop": func(ctx context.Context, p *process) (*componentv1.Status, error) {
		return p.control.Stop(ctx, &componentv1.StopRequest{GraceMs: 1000})
	},
}

// drive does verbs one after the other; each must lead to the state that is named after it.
func drive(ctx context.Context, p *process, steps ...any) error {
	for i := 0; i < len(steps); i += 2 {
		verb, want := steps[i].(string), steps[i+1].(componentv1.State)
		st, err := verbs[verb](ctx, p)
		if err != nil {
			if verb == "Quiesce" || verb == "Resume" {
				err = unimplemented(verb, err)
			}
			return fmt.Errorf("%s: %w", verb, err)
		}
		if st.GetState() != want {
			return fmt.Errorf("%s leads to %s, want %s", verb, st.GetState(), want)
		}
	}
	return nil
}

const (
	created = componentv1.State_CREATED
	started = componentv1.State_STARTED
	frozen  = componentv1.State_FROZEN
	stopped = componentv1.State_STOPPED
)

func states1(ctx context.Context, r *rig) error {
	p, err := r.launch(ctx)
	if err != nil {
		return err
	}
	beat, err := p.control.Heartbeat(ctx, &componentv1.Beat{})
	if err != nil {
		return err
	}
	if s := beat.GetStatus().GetState(); s != created {
		return fmt.Errorf("before Start it is %s, want CREATED", s)
	}
	return drive(ctx, p, "Start", started, "Quiesce", frozen, "Resume", started, "Quiesce", frozen, "Stop", stopped)
}

func illegal(ctx context.Context, r *rig) error {
	p, err := r.launch(ctx)
	if err != nil {
		return err
	}
	for _, verb := range []string{"Quiesce", "Resume"} {
		_, err := verbs[verb](ctx, p)
		if err := refused(verb+" before Start", err, codes.FailedPrecondition, codes.Unimplemented); err != nil {
			return err
		}
	}
	if err := drive(ctx, p, "Start", started); err != nil {
		return err
	}
	other := startRequest()
	other.Instance = "conform/other-0"
	_, err = p.control.Start(ctx, other)
	if err := refused("Start as another instance", err, codes.FailedPrecondition); err != nil {
		return err
	}
	beat, err := p.control.Heartbeat(ctx, &componentv1.Beat{})
	if err != nil {
		return err
	}
	if s := beat.GetStatus().GetState(); s != started {
		return fmt.Errorf("after verbs that were refused it is %s, want STARTED", s)
	}
	return nil
}

func repeated(ctx context.Context, r *rig) error {
	p, err := r.launch(ctx)
	if err != nil {
		return err
	}
	return drive(ctx, p, "Start", started, "Start", started, "Quiesce", frozen, "Quiesce", frozen, "Resume", started, "Resume", started)
}

func servedWhen(ctx context.Context, r *rig) error {
	m, ok := r.anyMethod()
	if !ok {
		return skip("no unary gRPC method")
	}
	p, err := r.launch(ctx)
	if err != nil {
		return err
	}
	call := func() error { return p.Conn().Invoke(ctx, m.full, m.empty(), m.reply()) }
	if err := refused(m.full+" before Start", call(), codes.FailedPrecondition, codes.Unavailable); err != nil {
		return err
	}
	if err := drive(ctx, p, "Start", started); err != nil {
		return err
	}
	// The empty request may be one that the component refuses; it must not be one that it does not serve.
	if err := refused(m.full, call(), codes.Unavailable, codes.Unimplemented); err == nil {
		return fmt.Errorf("%s is not served while it is started", m.full)
	}
	if err := drive(ctx, p, "Quiesce", frozen); err != nil {
		return err
	}
	if err := refused(m.full+" while it is frozen", call(), codes.Unavailable); err != nil {
		return err
	}
	return drive(ctx, p, "Resume", started)
}

func heartbeats(ctx context.Context, r *rig) error {
	p, err := r.start(ctx)
	if err != nil {
		return err
	}
	for seq, token := range []*componentv1.Token{{Incarnation: 1, Epoch: 4}, {Incarnation: 1, Epoch: 9}, {Incarnation: 1, Epoch: 4}, {Incarnation: 2, Epoch: 1}} {
		beat, err := p.control.Heartbeat(ctx, &componentv1.Beat{Seq: uint64(seq + 1), Token: token})
		if err != nil {
			return err
		}
		want := token
		if seq == 2 { // an older one does not count any more
			want = &componentv1.Token{Incarnation: 1, Epoch: 9}
		}
		if beat.GetSeq() != uint64(seq+1) || !proto.Equal(beat.GetToken(), want) {
			return fmt.Errorf("beat %d with token %v is answered with beat %d, token %v; want token %v", seq+1, token, beat.GetSeq(), beat.GetToken(), want)
		}
	}
	return nil
}

func httpSocket(ctx context.Context, r *rig) error {
	has := false
	for _, i := range r.desc.GetProvides() {
		has = has || i.GetKind() == componentv1.Kind_KIND_HTTP
	}
	if !has {
		return skip("no HTTP interface")
	}
	p, err := r.start(ctx)
	if err != nil {
		return err
	}
	beat, err := p.control.Heartbeat(ctx, &componentv1.Beat{})
	if err != nil {
		return err
	}
	path := beat.GetStatus().GetInfo()[componentv1.InfoHTTPSocket]
	if path == "" {
		return errors.New("its status names no " + componentv1.InfoHTTPSocket)
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	defer transport.CloseIdleConnections()
	for _, credential := range []string{"", p.Ident().Credential} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://component/", nil)
		if err != nil {
			return err
		}
		req.Header.Set(componentv1.HeaderCredential, credential)
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		if err := resp.Body.Close(); err != nil {
			return err
		}
		if known := credential != ""; known == (resp.StatusCode == http.StatusUnauthorized) {
			return fmt.Errorf("GET / with the credential: %v; the answer is %s", known, resp.Status)
		}
	}
	return nil
}
