// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/isthmus-mesh/isthmus/api"
)

// maxMessage bounds one answer of meshd; lists of large meshes are long.
const maxMessage = 256 << 20

// connection is an open way to meshd.
type connection struct {
	api.AdminClient
	config *api.AdminConfig
	conn   *grpc.ClientConn
}

func (c *connection) Close() error { return c.conn.Close() }

// configPath is where admin.conf is expected.
func (s *session) configPath() string {
	for _, p := range []string{s.config, s.env("MESH_CONFIG")} {
		if p != "" {
			return p
		}
	}
	return filepath.Join(s.home, ".config", "isthmus", "admin.conf")
}

// connect reads admin.conf and prepares the connection; the network is touched
// by the first call only.
func (s *session) connect() (*connection, error) {
	path := s.configPath()
	conf, err := api.LoadAdminConfig(path)
	if err != nil {
		f := &failure{exit: exitFailed, what: "cannot read admin.conf", why: err.Error(), code: api.NoAdminConfig, try: defaultRemedy(api.NoAdminConfig), err: err}
		if errors.Is(err, fs.ErrNotExist) {
			f.exit = exitUsage
			f.why = "there is no file " + path
		}
		return nil, f
	}
	s.target, err = s.serverAddress(conf)
	if err != nil {
		return nil, err
	}
	tlsConfig, err := conf.TLS()
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+s.target,
		grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithUserAgent("mesh/"+version()))
	if err != nil {
		return nil, fmt.Errorf("address of meshd: %w", err)
	}
	return &connection{AdminClient: api.NewAdminClient(conn), config: conf, conn: conn}, nil
}

// serverAddress is host:port of the admin port.
func (s *session) serverAddress(conf *api.AdminConfig) (string, error) {
	server := conf.Server
	for _, v := range []string{s.env("MESH_SERVER"), s.server} {
		if v != "" {
			server = v
		}
	}
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" {
		return "", usagef("the address of meshd is %q, want https://HOST:PORT", server)
	}
	if u.Port() == "" {
		u.Host += ":8443"
	}
	return u.Host, nil
}

// call runs f with a connection and the time limit of one request, and explains
// its error.
func (s *session) call(ctx context.Context, what string, f func(context.Context, *connection) error) error {
	c, err := s.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, s.requestTimeout)
	defer cancel()
	if err := f(ctx, c); err != nil {
		var known *failure
		if errors.As(err, &known) {
			return err
		}
		return s.rpcFailure(what, err)
	}
	return nil
}
