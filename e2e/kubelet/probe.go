// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// eagerFirst and eagerMax bound the pause between the quick repetitions of a
// probe that has not succeeded yet.
const (
	eagerFirst = 20 * time.Millisecond
	eagerMax   = 320 * time.Millisecond
)

// prober repeats one check at a probe's pace and tells changes of its verdict.
type prober struct {
	spec  *corev1.Probe
	eager bool // until the first success, try quickly between the periods; only failures at the period count
	check func(context.Context) error
	// report gets each verdict that reached its threshold: nil, or the last error.
	report func(error)
}

// run probes until ctx ends.
func (p *prober) run(ctx context.Context) {
	if !sleep(ctx, seconds(p.spec.InitialDelaySeconds)) {
		return
	}
	good, bad := int32(0), int32(0)
	err := p.once(ctx)
	for ctx.Err() == nil {
		if err == nil {
			good, bad, p.eager = good+1, 0, false
			if good >= max(1, p.spec.SuccessThreshold) {
				p.report(nil)
			}
		} else {
			good, bad = 0, bad+1
			if bad >= atLeast(p.spec.FailureThreshold, 3) {
				p.report(err)
			}
		}
		err = p.after(ctx, seconds(atLeast(p.spec.PeriodSeconds, 10)))
	}
}

// after waits for a period and gives the result of the check at its end, or, while
// eager, the first success before.
func (p *prober) after(ctx context.Context, period time.Duration) error {
	end := time.Now().Add(period)
	for pause := eagerFirst; p.eager && time.Until(end) > pause; pause = min(2*pause, eagerMax) {
		if !sleep(ctx, pause) {
			return ctx.Err()
		}
		if p.once(ctx) == nil {
			return nil
		}
	}
	if !sleep(ctx, time.Until(end)) {
		return ctx.Err()
	}
	return p.once(ctx)
}

func (p *prober) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, seconds(atLeast(p.spec.TimeoutSeconds, 1)))
	defer cancel()
	return p.check(ctx)
}

func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

// atLeast gives n, or the API's default where n is not set.
func atLeast(n, otherwise int32) int32 {
	if n > 0 {
		return n
	}
	return otherwise
}

// dialer connects from where probes come from.
type dialer func(ctx context.Context, network, address string) (net.Conn, error)

// target is what a probe or hook of one container acts upon.
type target struct {
	podIP string
	ports []corev1.ContainerPort
	dial  dialer
	exec  func(ctx context.Context, command []string) error
}

// probe performs one check.
func (t target) probe(ctx context.Context, handler corev1.ProbeHandler) error {
	switch {
	case handler.HTTPGet != nil:
		return t.get(ctx, handler.HTTPGet)
	case handler.TCPSocket != nil:
		return t.connect(ctx, handler.TCPSocket)
	case handler.GRPC != nil:
		return t.health(ctx, handler.GRPC)
	case handler.Exec != nil:
		return t.exec(ctx, handler.Exec.Command)
	}
	return errors.New("probe without httpGet, tcpSocket, grpc or exec")
}

// hook runs a lifecycle handler.
func (t target) hook(ctx context.Context, handler *corev1.LifecycleHandler) error {
	switch {
	case handler.Exec != nil:
		return t.exec(ctx, handler.Exec.Command)
	case handler.HTTPGet != nil:
		return t.get(ctx, handler.HTTPGet)
	case handler.Sleep != nil:
		sleep(ctx, time.Duration(handler.Sleep.Seconds)*time.Second)
		return ctx.Err()
	}
	return errors.New("hook without exec, httpGet or sleep")
}

// port resolves a number or a name of a container port.
func (t target) port(want intstr.IntOrString) (int32, error) {
	if want.Type == intstr.Int {
		return want.IntVal, nil
	}
	for _, port := range t.ports {
		if port.Name == want.StrVal {
			return port.ContainerPort, nil
		}
	}
	number, err := strconv.ParseInt(want.StrVal, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("port %q: the container has no port of that name", want.StrVal)
	}
	return int32(number), nil
}

// address joins a host (default: the pod's) and a port.
func (t target) address(host string, port intstr.IntOrString) (string, error) {
	number, err := t.port(port)
	if err != nil {
		return "", err
	}
	if host == "" {
		host = t.podIP
	}
	return net.JoinHostPort(host, strconv.Itoa(int(number))), nil
}

// get asks by HTTP; any status from 200 to 399 is good. It follows redirects
// only on the same host, and believes any certificate, as the kubelet does.
func (t target) get(ctx context.Context, action *corev1.HTTPGetAction) error {
	address, err := t.address(action.Host, action.Port)
	if err != nil {
		return err
	}
	target, err := url.Parse(action.Path)
	if err != nil {
		return fmt.Errorf("path %q: %w", action.Path, err)
	}
	target.Scheme, target.Host = strings.ToLower(string(action.Scheme)), address
	if target.Scheme == "" {
		target.Scheme = "http"
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return err
	}
	request.Header.Set("User-Agent", "kube-probe/1.36")
	request.Header.Set("Accept", "*/*")
	for _, header := range action.HTTPHeaders {
		if strings.EqualFold(header.Name, "Host") {
			request.Host = header.Value
		}
		request.Header.Set(header.Name, header.Value)
	}
	client := http.Client{
		Transport: &http.Transport{DialContext: t.dial, DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}},
		CheckRedirect: func(next *http.Request, via []*http.Request) error {
			if next.URL.Hostname() != via[0].URL.Hostname() || len(via) >= 10 {
				return http.ErrUseLastResponse
			}
			return nil
		},
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(response.Body, 512))
	if response.StatusCode < 200 || response.StatusCode >= 400 {
		return fmt.Errorf("GET %s: status %d: %.100q", target, response.StatusCode, body)
	}
	return nil
}

func (t target) connect(ctx context.Context, action *corev1.TCPSocketAction) error {
	address, err := t.address(action.Host, action.Port)
	if err != nil {
		return err
	}
	conn, err := t.dial(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// health asks the standard gRPC health service.
func (t target) health(ctx context.Context, action *corev1.GRPCAction) error {
	address := net.JoinHostPort(t.podIP, strconv.Itoa(int(action.Port)))
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return t.dial(ctx, "tcp", address) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	service := ""
	if action.Service != nil {
		service = *action.Service
	}
	answer, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	if answer.Status != healthv1.HealthCheckResponse_SERVING {
		return fmt.Errorf("gRPC health of %q: %s", service, answer.Status)
	}
	return nil
}
