package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/coppice-project/coppice/internal/cluster"
)

const (
	etcdClientPort = 2379
	etcdPeerPort   = 2380
	etcdPut        = "/etcdserverpb.KV/Put"
	etcdStatus     = "/etcdserverpb.Maintenance/Status"
	etcdWithin     = 30 * time.Second
	// etcdShare callers share a connection, as etcd's own benchmark does it.
	etcdShare = 8
)

// errNoEtcd says that there is nothing to compare with.
var errNoEtcd = errors.New("etcd is not installed here (Debian: apt-get install etcd-server)")

// etcd is a cluster of etcd's own servers, one where each of some nodes of a stand is. Members talk without TLS, as they come.
type etcd struct {
	s     *stand
	cmds  []*exec.Cmd
	addrs []string // for clients
	conns []*grpc.ClientConn
}

// startEtcd starts n members and finds the leader, to which the clients talk. errNoEtcd where there is no etcd.
func (s *stand) startEtcd(ctx context.Context, n int) (_ *etcd, err error) {
	binary, err := exec.LookPath("etcd")
	if err != nil {
		return nil, errNoEtcd
	}
	e := &etcd{s: s}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start etcd: %w", err), e.end())
		}
	}()
	var peers, all []string
	for i := 1; i <= n; i++ {
		host, _, err := net.SplitHostPort(s.cluster.Network.HTTP(i))
		if err != nil {
			return nil, err
		}
		e.addrs = append(e.addrs, net.JoinHostPort(host, s.port(etcdClientPort)))
		peers = append(peers, "http://"+net.JoinHostPort(host, s.port(etcdPeerPort)))
		all = append(all, fmt.Sprintf("e%d=%s", i, peers[i-1]))
	}
	for i := 1; i <= n; i++ {
		cmd := exec.Command(binary, "--name", fmt.Sprintf("e%d", i), "--data-dir", filepath.Join(s.dir, fmt.Sprintf("etcd%d", i)),
			"--listen-client-urls", "http://"+e.addrs[i-1], "--advertise-client-urls", "http://"+e.addrs[i-1],
			"--listen-peer-urls", peers[i-1], "--initial-advertise-peer-urls", peers[i-1],
			"--initial-cluster", strings.Join(all, ","), "--initial-cluster-token", filepath.Base(s.dir), "--logger", "zap", "--log-level", "error")
		log, err := os.Create(filepath.Join(s.dir, fmt.Sprintf("etcd%d.log", i)))
		if err != nil {
			return nil, err
		}
		cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Setpgid: true}
		err = s.cluster.Network.Start(i, cmd)
		if cerr := log.Close(); err != nil || cerr != nil {
			return nil, errors.Join(err, cerr)
		}
		e.cmds = append(e.cmds, cmd)
	}
	return e, e.findLeader(ctx)
}

// findLeader moves the leader's address to the front.
func (e *etcd) findLeader(ctx context.Context) error {
	return cluster.WaitFor(ctx, etcdWithin, "etcd's members to choose a leader", func(ctx context.Context) (bool, error) {
		for i, addr := range e.addrs {
			c, err := e.dial(addr)
			if err != nil {
				return false, err
			}
			self, leader, err := statusOf(ctx, c)
			if err = errors.Join(err, c.Close()); err != nil {
				return false, err
			}
			if self != 0 && self == leader {
				e.addrs[0], e.addrs[i] = e.addrs[i], e.addrs[0]
				return true, nil
			}
		}
		return false, nil
	})
}

func (e *etcd) dial(addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return e.s.cluster.Network.Dial(addr) }))
}

// statusOf asks a member who it is and who leads: StatusResponse{header: 1{member_id: 2}, leader: 4}.
func statusOf(ctx context.Context, c *grpc.ClientConn) (self, leader uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var out rawMessage
	if err := c.Invoke(ctx, etcdStatus, &rawMessage{}, &out, grpc.ForceCodec(rawCodec{})); err != nil {
		return 0, 0, err
	}
	err = eachField(out.b, func(n protowire.Number, v uint64, b []byte) error {
		switch n {
		case 1:
			return eachField(b, func(n protowire.Number, v uint64, _ []byte) error {
				if n == 2 {
					self = v
				}
				return nil
			})
		case 4:
			leader = v
		}
		return nil
	})
	return self, leader, err
}

// eachField walks a message's varints and byte fields.
func eachField(b []byte, f func(n protowire.Number, v uint64, bytes []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var v uint64
		var raw []byte
		switch typ {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			raw, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := f(num, v, raw); err != nil {
			return err
		}
	}
	return nil
}

// put sets a key at the leader: PutRequest{key: 1, value: 2}, encoded by hand, answered when a majority has it on disk.
func (e *etcd) put(ctx context.Context, caller int, key, value string) error {
	req := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), key)
	req = protowire.AppendString(protowire.AppendTag(req, 2, protowire.BytesType), value)
	return e.conns[caller/etcdShare].Invoke(ctx, etcdPut, &rawMessage{req}, &rawMessage{}, grpc.ForceCodec(rawCodec{}))
}

// open opens the connections of so many callers.
func (e *etcd) open(callers int) error {
	for len(e.conns) < (callers+etcdShare-1)/etcdShare {
		c, err := e.dial(e.addrs[0])
		if err != nil {
			return err
		}
		e.conns = append(e.conns, c)
	}
	return nil
}

// end ends the members.
func (e *etcd) end() error {
	var errs []error
	for _, c := range e.conns {
		errs = append(errs, c.Close())
	}
	for _, cmd := range e.cmds {
		errs = append(errs, cmd.Process.Kill())
		_ = cmd.Wait() // that it was killed is what it says
	}
	return errors.Join(errs...)
}

// rawMessage is a message as it is encoded.
type rawMessage struct{ b []byte }

// rawCodec passes rawMessages through.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) {
	m, ok := v.(*rawMessage)
	if !ok {
		return nil, fmt.Errorf("bench: a %T is no raw message", v)
	}
	return m.b, nil
}

func (rawCodec) Unmarshal(b []byte, v any) error {
	m, ok := v.(*rawMessage)
	if !ok {
		return fmt.Errorf("bench: a %T is no raw message", v)
	}
	m.b = append(m.b[:0], b...)
	return nil
}
