package membrane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/components/runner"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Backend is one process of an instance, before, while or after it serves behind the membrane. During a replacement there are two.
type Backend struct {
	proc    runner.Process
	desc    *componentv1.Description
	methods *Methods
	client  componentv1.ComponentClient

	inflight atomic.Int64
	draining atomic.Bool
	zero     chan struct{} // a drain is told that inflight may be 0
	streams  atomic.Int64
	slots    chan struct{} // nil: no limit of concurrent calls
	retired  atomic.Bool   // replaced after a drain: its open streams may end in peace
	marks    marks
	unsaved  unsaved
	newest   newest

	http      atomic.Pointer[string] // its http socket, once it has told
	listen    atomic.Pointer[string] // where what it runs listens by itself, once it has told
	transport *http.Transport
	beats     atomic.Uint64
}

func newBackend(proc runner.Process, desc *componentv1.Description) *Backend {
	b := &Backend{
		proc: proc, desc: desc, methods: NewMethods(desc), client: componentv1.NewComponentClient(proc.Conn()), zero: make(chan struct{}, 1),
	}
	if n := desc.GetResources().GetMaxConcurrentCalls(); n > 0 {
		b.slots = make(chan struct{}, n)
	}
	b.transport = &http.Transport{
		DialContext: b.dialHTTP, MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second, DisableCompression: true,
	}
	return b
}

// Process returns what runs it.
func (b *Backend) Process() runner.Process { return b.proc }

// Description returns what the component told about itself.
func (b *Backend) Description() *componentv1.Description { return b.desc }

// Methods returns what is known of its calls.
func (b *Backend) Methods() *Methods { return b.methods }

// Client calls the component past the gate: for the contract's own calls, not for the user's.
func (b *Backend) Client() componentv1.ComponentClient { return b.client }

// Streams returns how many of its streaming calls are open: after a replacement it should live until they end or their grace is over.
func (b *Backend) Streams() int64 { return b.streams.Load() }

// Listen is where what the component runs listens by itself, beside the gate, as it told; "" nowhere.
func (b *Backend) Listen() string {
	if at := b.listen.Load(); at != nil {
		return *at
	}
	return ""
}

// Inside returns how many calls are inside it.
func (b *Backend) Inside() int64 { return b.inflight.Load() }

// SetCommitted says that everything the process did up to mark is durable: answers that waited for it are given. After a restore it is
// told the mark of the committed checkpoint that was restored. Marks are this process's own; they are not carried over to another.
func (b *Backend) SetCommitted(mark uint64) { b.marks.set(mark) }

// Committed returns the last mark that SetCommitted was told.
func (b *Backend) Committed() uint64 { return b.marks.committed.Load() }

func (b *Backend) dead() bool {
	select {
	case <-b.proc.Done():
		return true
	default:
		return false
	}
}

// takeSlot waits for room below max_concurrent_calls.
func (b *Backend) takeSlot(ctx context.Context) error {
	if b.slots == nil {
		return nil
	}
	select {
	case b.slots <- struct{}{}:
		return nil
	default:
	}
	select {
	case b.slots <- struct{}{}:
		return nil
	case <-b.proc.Done():
		return refuse(untouched, codes.Unavailable, "its process ended while the call waited for its turn")
	case <-ctx.Done():
		return refuse(final, status.FromContextError(ctx.Err()).Code(), "%d calls are inside, which is the component's limit", cap(b.slots))
	}
}

func (b *Backend) giveSlot() {
	if b.slots != nil {
		<-b.slots
	}
}

// errUnimplemented: the component does not offer an optional call of the contract.
var errUnimplemented = errors.New("the component does not offer it")

func optional(err error) error {
	if status.Code(err) == codes.Unimplemented {
		return errUnimplemented
	}
	return err
}

// IsUnimplemented reports whether an error of this package says that the component does not offer an optional call.
func IsUnimplemented(err error) bool { return errors.Is(err, errUnimplemented) }

// start runs the contract's Start.
func (b *Backend) start(ctx context.Context, req *componentv1.StartRequest) error {
	st, err := b.client.Start(ctx, req)
	if err != nil {
		return fmt.Errorf("start: %s", status.Convert(err).Message())
	}
	return b.told(st)
}

// told takes what a Status says about the process.
func (b *Backend) told(st *componentv1.Status) error {
	if st.GetState() == componentv1.State_FAILED {
		return fmt.Errorf("the component says it failed: %s", st.GetDetail())
	}
	if at, ok := st.GetInfo()[componentv1.InfoListen]; ok {
		b.listen.Store(&at)
	}
	sock := st.GetInfo()[componentv1.InfoHTTPSocket]
	if sock == "" {
		return nil
	}
	// Only a socket of its own folder: a component must not make us talk to another one, the control API's for example.
	if dir := b.proc.Ident().SocketDir; dir != "" && !strings.HasPrefix(filepath.Clean(sock), filepath.Clean(dir)+"/") {
		return fmt.Errorf("the component names the http socket %s, want one below %s", sock, dir)
	}
	sock = filepath.Clean(sock)
	b.http.Store(&sock)
	return nil
}

// Heartbeat asks the process for a sign of life and takes what it tells.
func (b *Backend) Heartbeat(ctx context.Context, t Token) (*componentv1.Beat, error) {
	beat, err := b.client.Heartbeat(ctx, &componentv1.Beat{Seq: b.beats.Add(1), Token: t.Proto(), DurableMark: b.Committed()})
	if err != nil {
		return nil, fmt.Errorf("heartbeat: %w", err)
	}
	return beat, b.told(beat.GetStatus())
}

// Quiesce asks the component for a consistent point. The gate holds calls already. A component that does not offer it is at one
// whenever no call is inside.
func (b *Backend) Quiesce(ctx context.Context, why componentv1.QuiesceRequest_Reason) error {
	req := &componentv1.QuiesceRequest{Reason: why}
	if dl, ok := ctx.Deadline(); ok {
		req.DeadlineMs = uint32(max(time.Until(dl).Milliseconds(), 1))
	}
	if _, err := b.client.Quiesce(ctx, req); err != nil && !IsUnimplemented(optional(err)) {
		return fmt.Errorf("quiesce: %w", err)
	}
	return nil
}

// Resume ends what Quiesce began.
func (b *Backend) Resume(ctx context.Context) error {
	if _, err := b.client.Resume(ctx, &componentv1.ResumeRequest{}); err != nil && !IsUnimplemented(optional(err)) {
		return fmt.Errorf("resume: %w", err)
	}
	return nil
}

func (b *Backend) dialHTTP(ctx context.Context, _, _ string) (net.Conn, error) {
	sock := b.http.Load()
	if sock == nil {
		return nil, errNoHTTP
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", *sock)
}

var errNoHTTP = errors.New("the component has no http interface")
