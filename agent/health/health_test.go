// SPDX-License-Identifier: Apache-2.0

package health_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/isthmus-mesh/isthmus/agent/health"
)

func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	body, err := io.ReadAll(w.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	return w.Code, string(body)
}

func TestReadinessNamesAllThatIsMissing(t *testing.T) {
	t.Parallel()
	certificate, configuration := errors.New("refused"), error(nil)
	s := &health.Server{Conditions: []health.Condition{
		{Name: "certificate", Check: func(context.Context) error { return certificate }},
		{Name: "configuration", Check: func(context.Context) error { return configuration }},
	}}
	if code, body := get(t, s.ReadyHandler(), health.ReadyPath); code != 503 || !strings.Contains(body, "certificate: refused") || strings.Contains(body, "configuration") {
		t.Errorf("%d %q", code, body)
	}
	certificate = nil
	if code, _ := get(t, s.ReadyHandler(), health.ReadyPath); code != 200 {
		t.Errorf("%d with nothing missing", code)
	}
	s.Drain()
	if code, body := get(t, s.ReadyHandler(), health.ReadyPath); code != 503 || !strings.Contains(body, "draining") {
		t.Errorf("%d %q after the end was asked for", code, body)
	}
	if code, _ := get(t, s.ReadyHandler(), health.StatsPath); code != 404 {
		t.Errorf("the readiness port answers %d for metrics", code)
	}
}

func port(t *testing.T, address string) uint16 {
	t.Helper()
	tcp, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(tcp.Port)
}

func TestProbesAreAskedAsTheKubeletWould(t *testing.T) {
	t.Parallel()
	app := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/sick":
			http.Error(w, "the database is away", 500)
		case "/elsewhere":
			http.Redirect(w, r, "/sick", http.StatusFound)
		default:
			fmt.Fprintf(w, "host %s header %s agent %s", r.Host, r.Header.Get("X-A"), r.UserAgent())
		}
	})
	plain, secure := httptest.NewServer(app), httptest.NewTLSServer(app)
	defer plain.Close()
	defer secure.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	rpc, states := grpc.NewServer(), grpchealth.NewServer()
	healthpb.RegisterHealthServer(rpc, states)
	states.SetServingStatus("sick", healthpb.HealthCheckResponse_NOT_SERVING)
	go rpc.Serve(l)
	defer rpc.Stop()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()

	plainPort, securePort := port(t, plain.Listener.Addr().String()), port(t, secure.Listener.Addr().String())
	grpcPort, closedPort := port(t, l.Addr().String()), port(t, closed.Addr().String())
	s := &health.Server{Prober: &health.Prober{}, Probes: map[string]health.Probe{
		"c/readyz":   {HTTP: &health.HTTPProbe{Path: "healthy", Port: plainPort, Headers: []health.Header{{Name: "x-a", Value: "b"}, {Name: "Host", Value: "web"}}}},
		"c/livez":    {HTTP: &health.HTTPProbe{Path: "/sick", Port: plainPort}},
		"c/startupz": {HTTP: &health.HTTPProbe{Path: "/", Port: securePort, Scheme: "HTTPS"}},
		"d/readyz":   {HTTP: &health.HTTPProbe{Path: "/elsewhere", Port: plainPort}},
		"e/readyz":   {HTTP: &health.HTTPProbe{Path: "/", Port: closedPort}},
		"f/readyz":   {TCP: &health.TCPProbe{Port: plainPort}},
		"g/readyz":   {TCP: &health.TCPProbe{Port: closedPort}},
		"h/readyz":   {GRPC: &health.GRPCProbe{Port: grpcPort}},
		"i/readyz":   {GRPC: &health.GRPCProbe{Port: grpcPort, Service: "sick"}},
	}}
	for _, c := range []struct {
		path string
		code int
		body string
	}{
		{"c/readyz", 200, "host web header b"},
		{"c/livez", 500, "the database is away"},
		{"c/startupz", 200, ""},
		{"d/readyz", 302, ""},
		{"e/readyz", 503, "refused"},
		{"f/readyz", 200, ""},
		{"g/readyz", 503, "refused"},
		{"h/readyz", 200, ""},
		{"i/readyz", 503, "NOT_SERVING"},
		{"j/readyz", 404, "no such probe"},
	} {
		if code, body := get(t, s.Handler(), health.ProbePrefix+c.path); code != c.code || !strings.Contains(body, c.body) {
			t.Errorf("%s: %d %q, want %d %q", c.path, code, body, c.code, c.body)
		}
	}
}

func TestMetricsOfAllThreeAreOne(t *testing.T) {
	t.Parallel()
	serve := func(text string, code int) string {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			fmt.Fprint(w, text)
		}))
		t.Cleanup(server.Close)
		return server.URL
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "agent_up"}, func() float64 { return 1 }))
	failures := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "failures_total"}, []string{"of"})
	registry.MustRegister(failures)
	stats := &health.Stats{Envoy: serve("envoy_up 1\n", 200), Workload: serve("app_up 1\n# EOF", 200), Agent: registry, Failures: failures}
	_, body := get(t, stats, "/")
	if want := "envoy_up 1\napp_up 1\n# HELP agent_up"; !strings.HasPrefix(body, want) {
		t.Errorf("got %q, want it to begin with %q", body, want)
	}
	stats.Workload = serve("nonsense", 500)
	if _, body = get(t, stats, "/"); !strings.Contains(body, "envoy_up 1") || strings.Contains(body, "nonsense") || !strings.Contains(body, `failures_total{of="workload"} 1`) {
		t.Errorf("with a broken workload: %q", body)
	}
}

func TestProbesThatCannotBeAreNamed(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"c/readyz":{}}`: "c/readyz: 0 of http",
		`{"c/readyz":{"tcp":{"port":1},"http":{"port":1}}}`: "2 of http",
		`{"c/readyz":{"tcp":{"port":0}}}`:                   "port is 0",
		`{"c/readyz":{"tcp":{"port":70000}}}`:               "70000",
		`[`:                                                 "invalid probe",
	} {
		if _, err := health.ParseProbes(text); !errors.Is(err, health.ErrProbe) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseProbes(f *testing.F) {
	f.Add(`{"c/readyz":{"tcp":{"port":1}}}`)
	f.Fuzz(func(t *testing.T, text string) { health.ParseProbes(text) })
}
