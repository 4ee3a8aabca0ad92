// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/isthmus-mesh/isthmus/agent/health"
)

// rewriteProbes points the kubelet's probes at the agent, which asks the
// workload from inside: the kubelet has no mesh identity, and a workload that
// insists on one would never be ready. It returns the probes as they were, as
// JSON for the agent. Exec probes stay.
func rewriteProbes(t *corev1.PodTemplateSpec, former *corev1.Container) (string, error) {
	known, err := health.ParseProbes(formerEnv(former, "MESH_APP_PROBES"))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrTemplate, err)
	}
	probes := map[string]health.Probe{}
	rewrite := func(c *corev1.Container) error {
		for _, one := range []struct {
			path  string
			probe *corev1.Probe
		}{{"readyz", c.ReadinessProbe}, {"livez", c.LivenessProbe}, {"startupz", c.StartupProbe}} {
			if err := rewriteProbe(c, c.Name+"/"+one.path, one.probe, known, probes); err != nil {
				return fmt.Errorf("%w: container %s: %s: %w", ErrTemplate, c.Name, one.path, err)
			}
		}
		return nil
	}
	for i := range t.Spec.Containers {
		if err := rewrite(&t.Spec.Containers[i]); err != nil {
			return "", err
		}
	}
	for i := range t.Spec.InitContainers { // native sidecars of the user's own
		if err := rewrite(&t.Spec.InitContainers[i]); err != nil {
			return "", err
		}
	}
	if len(probes) == 0 {
		return "", nil
	}
	data, err := json.Marshal(probes) // map keys are sorted, so the same input gives the same text
	if err != nil {
		return "", err
	}
	return string(data), nil
}

func rewriteProbe(c *corev1.Container, path string, probe *corev1.Probe, known, probes map[string]health.Probe) error {
	if probe == nil || probe.Exec != nil {
		return nil
	}
	if get := probe.HTTPGet; get != nil && get.Port.IntValue() == statusPort && get.Path == health.ProbePrefix+path {
		former, ok := known[path]
		if !ok {
			return fmt.Errorf("points at the agent, which does not know it")
		}
		former.TimeoutSeconds = probe.TimeoutSeconds
		probes[path] = former
		return nil
	}
	described, err := describe(c, probe)
	if err != nil || described == nil {
		return err
	}
	probes[path] = *described
	probe.ProbeHandler = corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
		Path: health.ProbePrefix + path, Port: intstr.FromInt32(statusPort), Scheme: corev1.URISchemeHTTP,
	}}
	return nil
}

// describe returns nil for a probe without handler, which Kubernetes refuses
// with better words than ours.
func describe(c *corev1.Container, probe *corev1.Probe) (*health.Probe, error) {
	out := &health.Probe{TimeoutSeconds: probe.TimeoutSeconds}
	switch {
	case probe.HTTPGet != nil:
		port, err := portNumber(c, probe.HTTPGet.Port)
		if err != nil {
			return nil, err
		}
		out.HTTP = &health.HTTPProbe{
			Host: probe.HTTPGet.Host, Path: probe.HTTPGet.Path, Port: port, Scheme: string(probe.HTTPGet.Scheme),
		}
		for _, h := range probe.HTTPGet.HTTPHeaders {
			out.HTTP.Headers = append(out.HTTP.Headers, health.Header{Name: h.Name, Value: h.Value})
		}
	case probe.TCPSocket != nil:
		port, err := portNumber(c, probe.TCPSocket.Port)
		if err != nil {
			return nil, err
		}
		out.TCP = &health.TCPProbe{Host: probe.TCPSocket.Host, Port: port}
	case probe.GRPC != nil:
		if probe.GRPC.Port <= 0 || probe.GRPC.Port > math.MaxUint16 {
			return nil, fmt.Errorf("grpc port %d: want 1 to 65535", probe.GRPC.Port)
		}
		out.GRPC = &health.GRPCProbe{Port: uint16(probe.GRPC.Port)}
		if probe.GRPC.Service != nil {
			out.GRPC.Service = *probe.GRPC.Service
		}
	default:
		return nil, nil
	}
	return out, nil
}

func portNumber(c *corev1.Container, port intstr.IntOrString) (uint16, error) {
	number := int32(port.IntValue())
	if port.Type == intstr.String {
		for _, p := range c.Ports {
			if p.Name == port.StrVal {
				number = p.ContainerPort
			}
		}
	}
	if number <= 0 || number > math.MaxUint16 {
		return 0, fmt.Errorf("port %q: neither a port of the container nor a number from 1 to 65535", port.String())
	}
	return uint16(number), nil
}

// rewriteMetrics points the scraper at the agent, which merges. It returns the
// URL of the workload's own metrics, empty if it has none.
func rewriteMetrics(t *corev1.PodTemplateSpec, former *corev1.Container) string {
	const scrape, portKey, pathKey, schemeKey = "prometheus.io/scrape", "prometheus.io/port", "prometheus.io/path", "prometheus.io/scheme"
	a := t.Annotations
	own := formerEnv(former, "MESH_APP_METRICS")
	if a[portKey] == strconv.Itoa(statusPort) {
		return own // rewritten before
	}
	if on, err := strconv.ParseBool(a[scrape]); err == nil && !on {
		return "" // the owner does not want to be scraped
	} else if err == nil && on {
		port, path := a[portKey], a[pathKey]
		if port == "" {
			port = "80"
		}
		if !strings.HasPrefix(path, "/") {
			path = "/" + strings.TrimPrefix(path, "/")
		}
		if a[pathKey] == "" {
			path = "/metrics"
		}
		own = "http://" + net.JoinHostPort("127.0.0.1", port) + path
	}
	if a == nil {
		a = map[string]string{}
		t.Annotations = a
	}
	a[scrape], a[portKey], a[pathKey] = "true", strconv.Itoa(statusPort), health.StatsPath
	delete(a, schemeKey)
	return own
}
