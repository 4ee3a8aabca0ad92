// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
)

// watchProbe runs a probe in fake time whose check fails until healthy, and
// again from sick on, and returns what it reported when.
func watchProbe(t *testing.T, spec corev1.Probe, eager bool, healthy, sick, end time.Duration) []string {
	t.Helper()
	var said []string
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), end)
		defer cancel()
		last := ""
		p := &prober{spec: &spec, eager: eager, check: func(context.Context) error {
			if since := time.Since(start); since < healthy || since >= sick {
				return errors.New("not well")
			}
			return nil
		}, report: func(err error) {
			if now := fmt.Sprint(err == nil); now != last {
				said = append(said, fmt.Sprintf("%s at %s", now, time.Since(start)))
				last = now
			}
		}}
		p.run(ctx)
	})
	return said
}

func TestProber(t *testing.T) {
	t.Parallel()
	const never = time.Hour
	for _, c := range []struct {
		why           string
		spec          corev1.Probe
		eager         bool
		healthy, sick time.Duration
		want          string
	}{
		{"healthy from the start", corev1.Probe{PeriodSeconds: 1}, true, 0, never, "true at 0s"},
		{"an eager one sees it soon", corev1.Probe{PeriodSeconds: 10}, true, 50 * time.Millisecond, never, "true at 60ms"},
		{"another at its period", corev1.Probe{PeriodSeconds: 10}, false, 50 * time.Millisecond, never, "true at 10s"},
		{"quick failures do not count", corev1.Probe{PeriodSeconds: 5, FailureThreshold: 3}, true, never, never, "false at 10s"},
		{"the first one after its delay", corev1.Probe{InitialDelaySeconds: 7, PeriodSeconds: 1}, true, 0, never, "true at 7s"},
		{"failures count in a row", corev1.Probe{PeriodSeconds: 2, FailureThreshold: 3}, true, 0, 5 * time.Second, "true at 0s, false at 10s"},
		{"so do successes", corev1.Probe{PeriodSeconds: 2, SuccessThreshold: 3}, true, 0, never, "true at 4s"},
	} {
		t.Run(c.why, func(t *testing.T) {
			t.Parallel()
			if got := strings.Join(watchProbe(t, c.spec, c.eager, c.healthy, c.sick, 30*time.Second), ", "); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// toServer is a target whose pod is a server on loopback.
func toServer(address string) target {
	return target{podIP: "10.244.1.2", ports: []corev1.ContainerPort{{Name: "page", ContainerPort: 8080}},
		dial: func(ctx context.Context, network, wanted string) (net.Conn, error) {
			if wanted != "10.244.1.2:8080" {
				return nil, fmt.Errorf("dial %s", wanted)
			}
			return new(net.Dialer).DialContext(ctx, network, address)
		}}
}

func TestHTTPProbe(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/ok", http.StatusFound)
		case r.URL.Path == "/away":
			http.Redirect(w, r, "http://elsewhere.example/", http.StatusFound)
		case r.URL.Path == "/ok" && r.URL.RawQuery == "x=1" && r.Host == "shop" && r.Header.Get("X-Why") == "probe",
			r.URL.Path == "/ok" && r.Referer() != "":
			fmt.Fprint(w, "fine")
		default:
			http.Error(w, "ill", http.StatusServiceUnavailable)
		}
	}))
	defer server.Close()
	to := toServer(server.Listener.Addr().String())
	headers := []corev1.HTTPHeader{{Name: "Host", Value: "shop"}, {Name: "X-Why", Value: "probe"}}
	for path, want := range map[string]string{"/ok?x=1": "", "/moved": "", "/away": "", "/ill": `status 503: "ill`} {
		err := to.get(t.Context(), &corev1.HTTPGetAction{Path: path, Port: intstr.FromString("page"), HTTPHeaders: headers})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: error is %v, want %q", path, err, want)
		}
	}
	err := to.get(t.Context(), &corev1.HTTPGetAction{Port: intstr.FromString("gate")})
	if err == nil || !strings.Contains(err.Error(), `port "gate"`) {
		t.Errorf("a port without name: %v", err)
	}
}

func TestGRPCProbe(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	checks := health.NewServer()
	checks.SetServingStatus("shop", healthv1.HealthCheckResponse_SERVING)
	checks.SetServingStatus("closed", healthv1.HealthCheckResponse_NOT_SERVING)
	server := grpc.NewServer()
	healthv1.RegisterHealthServer(server, checks)
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()
	to := toServer(listener.Addr().String())
	for service, good := range map[string]bool{"": true, "shop": true, "closed": false, "unknown": false} {
		err := to.probe(t.Context(), corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 8080, Service: ptr.To(service)}})
		if (err == nil) != good {
			t.Errorf("service %q: %v", service, err)
		}
	}
	if err := to.probe(t.Context(), corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8080)}}); err != nil {
		t.Errorf("TCP: %v", err)
	}
	if err := to.probe(t.Context(), corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(9)}}); err == nil {
		t.Error("TCP to a port that is closed succeeds")
	}
	if err := to.probe(t.Context(), corev1.ProbeHandler{}); err == nil {
		t.Error("a probe of no kind succeeds")
	}
}
