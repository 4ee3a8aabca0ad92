// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/api"
)

// reachTimeout bounds the whole trial.
const reachTimeout = 10 * time.Second

// CheckReach implements api.AdminServer. It goes through the stages one by one,
// without any credential, so that the answer says where it ends.
func (s *Server) CheckReach(ctx context.Context, req *api.CheckReachRequest) (*api.ReachReport, error) {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	begun := time.Now()
	r := &api.ReachReport{Stage: "url"}
	u, err := url.Parse(req.GetUrl())
	if err == nil && (u.Scheme != "https" || u.Hostname() == "") {
		err = fmt.Errorf("%q is no https URL", req.GetUrl())
	}
	if err == nil {
		err = reach(ctx, u, req, r)
	}
	r.Reached = err == nil
	if err != nil {
		r.Message = err.Error()
	}
	r.Elapsed = durationpb.New(time.Since(begun))
	if u != nil && isLoopback(u.Hostname()) {
		f := &api.Finding{
			Code: string(api.LoopbackAPIServer), Severity: "error", Subject: u.Host,
			Message: u.Host + " is a loopback address: it leads meshd to the machine it runs on", Try: "--api-server https://HOST:PORT",
		}
		if r.Reached { // and the right API server answers there
			f.Severity = "warning"
		}
		r.Findings = append(r.Findings, f)
	}
	return r, nil
}

func reach(ctx context.Context, u *url.URL, req *api.CheckReachRequest, r *api.ReachReport) error {
	config, err := reachTLS(u, req)
	if err != nil {
		return err
	}
	r.Stage = "dns"
	if r.Addresses, err = net.DefaultResolver.LookupHost(ctx, u.Hostname()); err != nil {
		return err
	}
	r.Stage = "tcp"
	port := u.Port()
	if port == "" {
		port = "443"
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return err
	}
	defer conn.Close()
	r.Stage = "tls"
	secure := tls.Client(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		return err
	}
	r.Stage = "http"
	r.KubernetesVersion, err = askVersion(ctx, u, secure)
	return err
}

func reachTLS(u *url.URL, req *api.CheckReachRequest) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname(), NextProtos: []string{"http/1.1"}}
	if req.GetTlsServerName() != "" {
		config.ServerName = req.GetTlsServerName()
	}
	if len(req.GetCertificateAuthority()) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(req.GetCertificateAuthority()) {
			return nil, fmt.Errorf("the certificate authority holds no certificate in PEM")
		}
	}
	return config, nil
}

// askVersion sends one request on conn. Any answer of HTTP is good: an API
// server need not tell its version to strangers.
func askVersion(ctx context.Context, u *url.URL, conn net.Conn) (string, error) {
	client := &http.Client{
		Transport: &http.Transport{
			DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
			DisableKeepAlives: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	// The connection speaks TLS already.
	ask := &url.URL{Scheme: "http", Host: u.Host, Path: u.JoinPath("version").Path}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, ask.String(), nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var v struct {
		GitVersion string `json:"gitVersion"`
	}
	if body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16)); err != nil || json.Unmarshal(body, &v) != nil {
		return "", nil
	}
	return v.GitVersion, nil
}
