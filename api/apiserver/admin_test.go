// SPDX-License-Identifier: Apache-2.0

package apiserver_test

import (
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// Nobody but an administrator gets in, by gRPC or by JSON, from loopback or not.
func TestNobodyButAnAdministratorGetsIn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	other := catest.New(t)
	revoked := w.ca.Admin(t)
	for _, c := range []struct {
		who  string
		cert []tls.Certificate
		ok   bool
	}{
		{"nobody", nil, false},
		{"a workload", []tls.Certificate{w.ca.Leaf(t, catest.Subject("kube:1", "pod-1", "shop"))}, false},
		{"an administrator of another mesh", []tls.Certificate{other.Admin(t)}, false},
		{"another replica of meshd", []tls.Certificate{w.ca.Serving(t, "127.0.0.1")}, true},
		{"an administrator", []tls.Certificate{w.ca.Admin(t)}, true},
		{"an administrator whose certificate is revoked", []tls.Certificate{revoked}, false},
	} {
		if strings.Contains(c.who, "revoked") {
			if err := w.ca.Revoke(t.Context(), ca.SourceMeshd, "admin-test", "lost laptop"); err != nil {
				t.Fatal(err)
			}
		}
		_, err := api.NewAdminClient(w.dial(t, w.address, c.cert...)).ListClusters(t.Context(), &api.ListClustersRequest{})
		if got := status.Code(err); c.ok != (got == codes.OK) || !c.ok && got != codes.Unauthenticated {
			t.Errorf("%s by gRPC: %v", c.who, err)
		}
		if !c.ok && api.ProblemOf(err).Code != api.NotAnAdministrator {
			t.Errorf("%s by gRPC: problem %+v", c.who, api.ProblemOf(err))
		}
		resp, err := w.web(c.cert...).Get(w.url("/api/v1/clusters"))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if c.ok != (resp.StatusCode == http.StatusOK) || !c.ok && resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s by JSON: %s %s", c.who, resp.Status, body)
		}
	}
}

// The admin.conf works whatever name or address meshd is reached under, and no
// server but meshd is believed.
func TestAdminConfigKnowsItsMeshd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := filepath.Join(t.TempDir(), "admin.conf")
	if err := w.adminConfig(t).Save(path); err != nil {
		t.Fatal(err)
	}
	conf, err := api.LoadAdminConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	config, err := conf.TLS()
	if err != nil {
		t.Fatal(err)
	}
	config.ServerName = "any.name.example"
	ask := func(address string) error {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = api.NewAdminClient(conn).GetVersion(t.Context(), &api.GetVersionRequest{})
		return err
	}
	if err := ask(w.address); err != nil {
		t.Errorf("the right meshd: %v", err)
	}
	if err := ask(newWorld(t).address); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("a meshd of another mesh: %v", err)
	}
	workload, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{w.ca.Leaf(t, catest.Subject("kube:1", "pod-1", "shop"))}, NextProtos: []string{"h2"},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer workload.Close()
	go func() {
		for {
			conn, err := workload.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(io.Discard, conn); conn.Close() }()
		}
	}()
	if err := ask(workload.Addr().String()); err == nil || !strings.Contains(err.Error(), "want spiffe://cluster.local/ns/isthmus-system/sa/meshd") {
		t.Errorf("a workload of the mesh that plays meshd: %v", err)
	}
}

func TestJSONSpeaksAsTheAPIDoes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.join(t, "uid-e", "east", "n1")
	web := w.web(w.ca.Admin(t))
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", "/api/v1/clusters/east", "", 200, `"kind":"Cluster"`},
		{"GET", "/api/v1/clusters/uid-e", "", 200, `"name":"east"`},
		{"GET", "/api/v1/clusters/eats", "", 404, `"try":"did you mean east?"`},
		{"GET", "/api/v1/version", "", 200, `"trustDomain":"cluster.local"`},
		{"GET", "/api/v1/services?namespace=shop&clustr=east", "", 400, `no parameter`},
		{"GET", "/api/v1/proxies?troubled=perhaps", "", 400, `want true or false`},
		{"GET", "/api/v1/proxies?troubled=true&troubled=true", "", 400, `given 2 times`},
		{"GET", "/api/v1/check?clusters=east", "", 200, `"kind":"CheckReport"`},
		{"GET", "/api/v1/activity?since=1h", "", 200, `"verb":"register-cluster"`},
		{"POST", "/api/v1/clusters", `{"cluster":{"metadata":{"name":"Big Name"}}}`, 400, `want a DNS label`},
		{"POST", "/api/v1/clusters", `{"cluter":1}`, 400, `unknown field`},
		{"POST", "/api/v1/reach", `{"url":"http://x"}`, 200, `"reached":false`},
		{"PUT", "/api/v1/clusters", "", 404, `there is no PUT`},
		{"GET", "/api/v1/nothing", "", 404, `"status":"Unimplemented"`},
		{"DELETE", "/api/v1/clusters/north", "", 404, `"code":"MESH1005"`},
		{"DELETE", "/api/v1/clusters/east?force=true", "", 200, `"step":"revoke","state":"done"`},
	} {
		req, err := http.NewRequest(c.method, w.url(c.path), strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status || !strings.Contains(string(body), c.want) {
			t.Errorf("%s %s: %s\n%s\nwant %d %s", c.method, c.path, resp.Status, body, c.status, c.want)
		}
		for line := range strings.Lines(string(body)) {
			if !json.Valid([]byte(line)) {
				t.Errorf("%s %s: not JSON: %s", c.method, c.path, line)
			}
		}
	}
}

// What a machine fetches before it has an identity is open, and nothing else is.
func TestOnboardingIsOpenAndNotSecret(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, err := w.client.OnboardVM(t.Context(), &api.OnboardVMRequest{Vm: webOne()})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/onboard/onboard.sh":         "#!/bin/sh",
		"/onboard/script":             "#!/bin/sh",
		"/onboard/mesh-agent.service": "[Service]",
		"/onboard/root.pem":           "BEGIN CERTIFICATE",
		"/onboard/root-cert.pem":      "BEGIN CERTIFICATE",
		"/onboard/web-1/config":       `"server":"meshd.example:15012"`,
		"/healthz":                    "ok",
	} {
		resp, err := w.web().Get(w.url(path))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || !strings.Contains(string(body), want) {
			t.Errorf("%s: %s\n%.300s", path, resp.Status, body)
		}
		if strings.Contains(string(body), "isthmus-vm.") && strings.HasSuffix(path, "config") {
			t.Errorf("%s tells a token: %s", path, body)
		}
	}
	for _, path := range []string{"/onboard/web-2/config", "/onboard/mesh-agent?arch=amd64", "/onboard/envoy?arch=../../etc", "/metrics", "/"} {
		resp, err := w.web().Get(w.url(path))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Errorf("%s: %s", path, resp.Status)
		}
	}
}
