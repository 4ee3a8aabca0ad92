// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// DatabaseConfig says which etcd to use: an embedded one in DataDir, or the external one
// at Endpoints.
type DatabaseConfig struct {
	// DataDir is where the embedded etcd keeps its data, in a folder "etcd" of its own. It
	// is made if it does not exist, for this user alone.
	DataDir string

	// Endpoints are URLs of an external etcd cluster.
	Endpoints []string

	// TLS for the external etcd; nil means none.
	TLS *tls.Config

	// Username and Password for the external etcd, where it asks for them.
	Username, Password string

	// Quota of the embedded database in bytes; zero means 2 GiB.
	Quota int64

	// Unsynced leaves out fsync: for tests, whose machine does not lose power.
	Unsynced bool

	// Log; nil means none.
	Log *slog.Logger
}

// SocketName is the socket, in the data directory, at which the embedded etcd answers
// local tools of the same user, such as a backup. There is no other listener.
const SocketName = "etcd.sock"

// Database is an etcd to use: the embedded one, which it owns, or a connection to another.
type Database struct {
	client *clientv3.Client
	server *embed.Etcd // nil if it is external
}

// Open starts the embedded etcd, or connects to the external one (which need not answer
// yet).
func Open(ctx context.Context, config DatabaseConfig) (*Database, error) {
	if len(config.Endpoints) > 0 {
		return connect(config)
	}
	if config.DataDir == "" {
		return nil, errors.New("etcd: want a data directory, or the endpoints of an external etcd")
	}
	return start(ctx, config)
}

// Client of this etcd. It is closed with the database.
func (d *Database) Client() *clientv3.Client { return d.client }

// Embedded tells that nobody else uses this etcd.
func (d *Database) Embedded() bool { return d.server != nil }

// Err tells when the embedded etcd has failed for good; it never does for an external one.
func (d *Database) Err() <-chan error {
	if d.server == nil {
		return nil
	}
	return d.server.Err()
}

// Close ends the connection, and stops the embedded etcd.
func (d *Database) Close() error {
	err := d.client.Close()
	if d.server != nil {
		d.server.Close()
	}
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func connect(config DatabaseConfig) (*Database, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: config.Endpoints, TLS: config.TLS, Username: config.Username, Password: config.Password,
		DialTimeout: 5 * time.Second,
		// A member that is paused, or whose packets are dropped, must be noticed before
		// sessions end.
		DialKeepAliveTime: 2 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
		PermitWithoutStream: true, RejectOldCluster: true,
		DialOptions:     []grpc.DialOption{grpc.WithConnectParams(reconnect)},
		MaxUnaryRetries: 3, BackoffWaitBetween: 50 * time.Millisecond,
		Logger: zapLogger(config.Log),
	})
	if err != nil {
		return nil, fmt.Errorf("etcd %v: %w", config.Endpoints, err)
	}
	return &Database{client: client}, nil
}

// reconnect keeps trying: by default gRPC would wait up to two minutes after an etcd that
// was away for long is back.
var reconnect = grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
	MinConnectTimeout: 3 * time.Second,
}

func start(ctx context.Context, config DatabaseConfig) (*Database, error) {
	dir := filepath.Join(config.DataDir, "etcd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd: data directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd: data directory: %w", err)
	}
	server, err := embed.StartEtcd(embedConfig(config, dir))
	if err != nil {
		return nil, fmt.Errorf("etcd in %s: %w", dir, err)
	}
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		server.Close()
		return nil, fmt.Errorf("etcd in %s: %w", dir, err)
	case <-ctx.Done():
		server.Close()
		return nil, fmt.Errorf("etcd in %s is not ready: %w", dir, ctx.Err())
	}
	// In this process no socket is needed.
	client := v3client.New(server.Server)
	client.Maintenance = &localMaintenance{client.Maintenance, server}
	return &Database{client: client, server: server}, nil
}

// localMaintenance defragments the backend itself: the way through the in-process client
// ends at a health server that only a listening etcd has (v3.7.3 panics there).
type localMaintenance struct {
	clientv3.Maintenance
	server *embed.Etcd
}

func (m *localMaintenance) Defragment(context.Context, string) (*clientv3.DefragmentResponse, error) {
	if err := m.server.Server.Backend().Defrag(); err != nil {
		return nil, err
	}
	return &clientv3.DefragmentResponse{Header: &pb.ResponseHeader{}}, nil
}

func embedConfig(config DatabaseConfig, dir string) *embed.Config {
	c := embed.NewConfig()
	c.Name = "meshd"
	c.Dir = dir
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.ListenPeerUrls = nil // a cluster of one: nobody to talk to
	c.ListenClientUrls = nil
	c.ListenClientHttpUrls = nil
	c.EnableGRPCGateway = false // JSON for nobody
	if socket, ok := socketURL(config.DataDir); ok {
		c.ListenClientUrls = []url.URL{socket}
	}
	c.UnsafeNoFsync = config.Unsynced
	c.QuotaBackendBytes = config.Quota
	if c.QuotaBackendBytes == 0 {
		c.QuotaBackendBytes = 2 << 30
	}
	c.AutoCompactionMode = embed.CompactorModePeriodic
	c.AutoCompactionRetention = "5m"
	// The log of a cluster of one is needed only for its own restart: keeping less of it in
	// memory saves tens of megabytes.
	c.SnapshotCount = 100
	c.SnapshotCatchUpEntries = 10
	c.MaxRequestBytes = 4 << 20
	// One member elects itself: shorter timeouts only make the start quicker.
	c.TickMs, c.ElectionMs = 50, 500
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zapLogger(config.Log))
	return c
}

// socketURL is where local tools reach the embedded etcd; false where the path is longer
// than a Unix socket's may be.
func socketURL(dataDir string) (url.URL, bool) {
	path, err := filepath.Abs(filepath.Join(dataDir, SocketName))
	if err != nil || len(path) > 100 {
		return url.URL{}, false
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close() // in use: etcd will say that the data directory is locked
		return url.URL{}, false
	}
	os.Remove(path) // left behind by a process that was killed
	return url.URL{Scheme: "unix", Path: path}, true
}

// zapLogger hands etcd's warnings and errors to our log.
func zapLogger(log *slog.Logger) *zap.Logger {
	if log == nil {
		return zap.NewNop()
	}
	return zap.New(&slogCore{log: log.With("part", "etcd")})
}

// slogCore is a zapcore.Core that writes to slog. What etcd calls information is debugging
// for us.
type slogCore struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func (c *slogCore) level(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), c.level(l))
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{c.log, append(c.fields[:len(c.fields):len(c.fields)], fields...)}
}

func (c *slogCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := c.level(e.Level)
	for _, noise := range []string{
		"setting up serving from embedded etcd failed", // how every orderly end of its listener is told
		"retrying of unary invoker failed",             // every attempt of an outage, of which the store tells once
	} {
		if strings.HasPrefix(e.Message, noise) {
			level = slog.LevelDebug
		}
	}
	m := zapcore.NewMapObjectEncoder()
	for _, f := range append(c.fields[:len(c.fields):len(c.fields)], fields...) {
		f.AddTo(m)
	}
	attrs := make([]slog.Attr, 0, len(m.Fields))
	for k, v := range m.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	c.log.LogAttrs(context.Background(), level, e.Message, attrs...)
	return nil
}

func (c *slogCore) Sync() error { return nil }
