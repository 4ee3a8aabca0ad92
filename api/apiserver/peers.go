// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/api"
)

// peerTimeout bounds how long the others are waited for; who tries paths for us may take
// as long as a trial.
const (
	peerTimeout      = 2 * time.Second
	peerProbeTimeout = askTimeout + peerTimeout
)

// PeerConfig says where the other replicas are. All fields are required.
type PeerConfig struct {
	// Addresses are the "host:port" of the other replicas' admin ports now.
	Addresses func() []string
	// Authority recognises them, and Certificate is how they recognise this one.
	Authority   Authority
	Certificate func() *tls.Certificate
	Log         *slog.Logger
}

// PeerGroup asks the other replicas over their admin ports.
type PeerGroup struct {
	cfg PeerConfig

	mu    sync.Mutex
	conns map[string]*grpc.ClientConn
}

var _ Peers = (*PeerGroup)(nil)

// NewPeerGroup connects lazily; Close ends it.
func NewPeerGroup(cfg PeerConfig) *PeerGroup {
	return &PeerGroup{cfg: cfg, conns: map[string]*grpc.ClientConn{}}
}

// Close closes all connections.
func (g *PeerGroup) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var errs []error
	for address, conn := range g.conns {
		errs = append(errs, conn.Close())
		delete(g.conns, address)
	}
	return errors.Join(errs...)
}

// clients are the present replicas; connections to those that are gone are closed.
func (g *PeerGroup) clients() map[string]api.AdminClient {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := map[string]api.AdminClient{}
	for _, address := range g.cfg.Addresses() {
		conn := g.conns[address]
		if conn == nil {
			var err error
			conn, err = grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(g.tls())),
				grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxPeerAnswer)))
			if err != nil {
				g.cfg.Log.Warn("another replica has a strange address", "address", address, "error", err)
				continue
			}
			g.conns[address] = conn
		}
		out[address] = api.NewAdminClient(conn)
	}
	for address, conn := range g.conns {
		if out[address] == nil {
			conn.Close()
			delete(g.conns, address)
		}
	}
	return out
}

// anew gives a connection with the present certificate where an answer says that this one's is not accepted: a
// connection keeps the certificate that it began with, which ends, or whose authority is replaced.
func (g *PeerGroup) anew(address string, err error) api.AdminClient {
	if status.Code(err) != codes.Unauthenticated {
		return nil
	}
	g.mu.Lock()
	if conn := g.conns[address]; conn != nil {
		conn.Close()
		delete(g.conns, address)
	}
	g.mu.Unlock()
	return g.clients()[address]
}

// maxPeerAnswer bounds the list of another replica's proxies, in bytes.
const maxPeerAnswer = 256 << 20

// tls shows this meshd's certificate, and takes nobody for a replica but meshd.
func (g *PeerGroup) tls() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // identities count, names do not; see below
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := g.cfg.Authority.Verify(state.PeerCertificates)
			if err == nil && !isMeshd(id) {
				err = fmt.Errorf("the peer is %s, not meshd", id.ID)
			}
			return err
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return g.cfg.Certificate(), nil
		},
	}
}

// ask calls every replica at once and leaves out those that fail.
func ask[A any](ctx context.Context, g *PeerGroup, what string, call func(context.Context, api.AdminClient) (A, error)) []A {
	return askWithin(ctx, g, peerTimeout, what, call)
}

func askWithin[A any](ctx context.Context, g *PeerGroup, limit time.Duration, what string, call func(context.Context, api.AdminClient) (A, error)) []A {
	out, _ := askAll(ctx, g, limit, what, call)
	return out
}

// askAll also gives the addresses of those that fail.
func askAll[A any](ctx context.Context, g *PeerGroup, limit time.Duration, what string, call func(context.Context, api.AdminClient) (A, error)) (out []A, failed []string) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var (
		mu      sync.Mutex
		waiting sync.WaitGroup
	)
	for address, client := range g.clients() {
		waiting.Go(func() {
			answer, err := call(ctx, client)
			if again := g.anew(address, err); again != nil {
				answer, err = call(ctx, again)
			}
			if err != nil {
				g.cfg.Log.Warn("another replica does not answer", "address", address, "call", what, "error", err)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = append(failed, address)
			} else {
				out = append(out, answer)
			}
		})
	}
	waiting.Wait()
	return out, failed
}

// Trust implements Peers.
func (g *PeerGroup) Trust(ctx context.Context) ([]*api.TrustList, []string) {
	return askAll(ctx, g, peerTimeout, "ListTrust", func(ctx context.Context, c api.AdminClient) (*api.TrustList, error) {
		return c.ListTrust(ctx, &api.ListTrustRequest{})
	})
}

// Proxies implements Peers.
func (g *PeerGroup) Proxies(ctx context.Context) []*api.Proxy {
	var out []*api.Proxy
	for _, list := range ask(ctx, g, "ListProxies", func(ctx context.Context, c api.AdminClient) (*api.ProxyList, error) {
		return c.ListProxies(ctx, &api.ListProxiesRequest{})
	}) {
		out = append(out, list.GetItems()...)
	}
	return out
}

// Clusters implements Peers.
func (g *PeerGroup) Clusters(ctx context.Context) []*api.Cluster {
	var out []*api.Cluster
	for _, list := range ask(ctx, g, "ListClusters", func(ctx context.Context, c api.AdminClient) (*api.ClusterList, error) {
		return c.ListClusters(ctx, &api.ListClustersRequest{})
	}) {
		out = append(out, list.GetItems()...)
	}
	return out
}

// Paths implements Peers.
func (g *PeerGroup) Paths(ctx context.Context, cluster string) []*api.Path {
	var out []*api.Path
	for _, report := range askWithin(ctx, g, peerProbeTimeout, "ProbePaths", func(ctx context.Context, c api.AdminClient) (*api.PathReport, error) {
		return c.ProbePaths(ctx, &api.ProbePathsRequest{Cluster: cluster})
	}) {
		out = append(out, report.GetPaths()...)
	}
	return out
}

// TailActivity implements Peers. A replica that comes later is not followed.
func (g *PeerGroup) TailActivity(ctx context.Context, req *api.TailActivityRequest, found func(*api.Activity)) {
	if !req.GetFollow() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, peerTimeout)
		defer cancel()
	}
	var (
		mu      sync.Mutex
		waiting sync.WaitGroup
	)
	for address, client := range g.clients() {
		waiting.Go(func() {
			stream, err := client.TailActivity(ctx, req)
			for err == nil {
				var a *api.Activity
				if a, err = stream.Recv(); err == nil {
					mu.Lock()
					found(a)
					mu.Unlock()
				}
			}
			if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				g.cfg.Log.Warn("another replica does not answer", "address", address, "call", "TailActivity", "error", err)
			}
		})
	}
	waiting.Wait()
}

// Activity implements Peers.
func (g *PeerGroup) Activity(ctx context.Context) []*api.AuditLog {
	var out []*api.AuditLog
	for _, report := range askWithin(ctx, g, verifyTimeout, "VerifyActivity", func(ctx context.Context, c api.AdminClient) (*api.ActivityReport, error) {
		return c.VerifyActivity(ctx, &api.VerifyActivityRequest{})
	}) {
		out = append(out, report.GetLogs()...)
	}
	return out
}
