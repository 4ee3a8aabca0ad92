// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// ErrProbe means that a probe's description cannot be used.
var ErrProbe = errors.New("invalid probe")

// Probe is one of the workload's probes as its owner wrote it, with named
// ports resolved. Exactly one of HTTP, TCP and GRPC is set.
type Probe struct {
	HTTP *HTTPProbe `json:"http,omitempty"`
	TCP  *TCPProbe  `json:"tcp,omitempty"`
	GRPC *GRPCProbe `json:"grpc,omitempty"`
	// TimeoutSeconds as in Kubernetes; 0 means 1.
	TimeoutSeconds int32 `json:"timeoutSeconds,omitempty"`
}

// HTTPProbe succeeds with a status from 200 to 399.
type HTTPProbe struct {
	Host    string   `json:"host,omitempty"`
	Path    string   `json:"path,omitempty"`
	Port    uint16   `json:"port"`
	Scheme  string   `json:"scheme,omitempty"` // HTTP or HTTPS, which is not verified, as with the kubelet
	Headers []Header `json:"headers,omitempty"`
}

// Header is one request header of an HTTPProbe.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// TCPProbe succeeds if the port accepts a connection.
type TCPProbe struct {
	Host string `json:"host,omitempty"`
	Port uint16 `json:"port"`
}

// GRPCProbe succeeds if grpc.health.v1 says SERVING.
type GRPCProbe struct {
	Port    uint16 `json:"port"`
	Service string `json:"service,omitempty"`
}

// ParseProbes decodes the probes of a pod: a JSON object from path to Probe.
// The text is what injection wrote, but users can edit pods.
func ParseProbes(text string) (map[string]Probe, error) {
	if text == "" {
		return nil, nil
	}
	probes := map[string]Probe{}
	if err := json.Unmarshal([]byte(text), &probes); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProbe, err)
	}
	for path, p := range probes {
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrProbe, path, err)
		}
	}
	return probes, nil
}

func (p Probe) check() error {
	kinds, port := 0, uint16(0)
	if p.HTTP != nil {
		kinds, port = kinds+1, p.HTTP.Port
	}
	if p.TCP != nil {
		kinds, port = kinds+1, p.TCP.Port
	}
	if p.GRPC != nil {
		kinds, port = kinds+1, p.GRPC.Port
	}
	if kinds != 1 {
		return fmt.Errorf("%d of http, tcp and grpc are set, want one", kinds)
	}
	if port == 0 {
		return errors.New("port is 0")
	}
	return nil
}

func (p Probe) timeout() time.Duration {
	if p.TimeoutSeconds <= 0 {
		return time.Second
	}
	return time.Duration(p.TimeoutSeconds) * time.Second
}

// loopback is where probes go if the workload's own address is not known.
var loopback = netip.MustParseAddr("127.0.0.1")

// Prober sends probes to the workload.
type Prober struct {
	// Address of the workload; invalid means loopback.
	Address netip.Addr
	// Dial opens connections that reach the workload itself, not its proxy;
	// nil uses the network as it is.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Check runs one probe. A nil error means success.
func (p *Prober) Check(ctx context.Context, probe Probe) error {
	ctx, cancel := context.WithTimeout(ctx, probe.timeout())
	defer cancel()
	switch {
	case probe.HTTP != nil:
		response, err := p.get(ctx, probe.HTTP, nil)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode < 200 || response.StatusCode > 399 {
			return fmt.Errorf("HTTP %d", response.StatusCode)
		}
		return nil
	case probe.TCP != nil:
		conn, err := p.dial(ctx, "tcp", p.target(probe.TCP.Host, probe.TCP.Port))
		if err != nil {
			return err
		}
		return conn.Close()
	case probe.GRPC != nil:
		return p.grpc(ctx, probe.GRPC)
	}
	return ErrProbe
}

func (p *Prober) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if p.Dial != nil {
		return p.Dial(ctx, network, address)
	}
	return new(net.Dialer).DialContext(ctx, network, address)
}

func (p *Prober) target(host string, port uint16) string {
	if host == "" {
		address := p.Address
		if !address.IsValid() {
			address = loopback
		}
		host = address.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

// get asks the workload as the kubelet would. The caller closes the body.
func (p *Prober) get(ctx context.Context, probe *HTTPProbe, from http.Header) (*http.Response, error) {
	scheme := "http"
	if probe.Scheme == "HTTPS" {
		scheme = "https"
	}
	path := probe.Path
	if path == "" || path[0] != '/' {
		path = "/" + path
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+p.target(probe.Host, probe.Port)+path, nil)
	if err != nil {
		return nil, err
	}
	if agent := from.Get("User-Agent"); agent != "" {
		request.Header.Set("User-Agent", agent)
	}
	for _, h := range probe.Headers {
		if http.CanonicalHeaderKey(h.Name) == "Host" {
			request.Host = h.Value
			continue
		}
		request.Header.Add(h.Name, h.Value)
	}
	client := http.Client{
		Transport: &http.Transport{
			DialContext:       p.dial,
			DisableKeepAlives: true,
			// The kubelet does not verify either: a probe asks whether
			// somebody answers, not who.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // see above
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return client.Do(request)
}

func (p *Prober) grpc(ctx context.Context, probe *GRPCProbe) error {
	conn, err := grpc.NewClient("passthrough:///"+p.target("", probe.Port),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return p.dial(ctx, "tcp", address) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	answer, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: probe.Service})
	if err != nil {
		return err
	}
	if answer.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("gRPC health %s", answer.GetStatus())
	}
	return nil
}

// answer passes the workload's verdict to the kubelet: an HTTP probe's status
// and the beginning of its body as they are, otherwise 200 or 503.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, probe Probe) {
	if probe.HTTP == nil {
		if err := s.Prober.Check(r.Context(), probe); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
		}
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), probe.timeout())
	defer cancel()
	response, err := s.Prober.get(ctx, probe.HTTP, r.Header)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer response.Body.Close()
	w.WriteHeader(response.StatusCode)
	_, _ = io.Copy(w, io.LimitReader(response.Body, 10<<10)) // the kubelet shows no more
}
