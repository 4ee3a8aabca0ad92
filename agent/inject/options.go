// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/agent/servers"
)

const (
	// ProxyLabel marks pods with a proxy; its value for workloads is "sidecar".
	ProxyLabel = "isthmus-mesh.io/proxy"
	// InjectLabel on a pod template, "false", keeps it out; as an annotation too.
	InjectLabel = "isthmus-mesh.io/inject"
	// ProxyContainer and InitContainer are the names of what is added.
	ProxyContainer = "isthmus-proxy"
	// InitContainer programs redirection.
	InitContainer = "isthmus-init"

	// Annotations of a pod template that change what is captured, with the
	// meaning of the agent's flags of the same name; Istio's
	// traffic.sidecar.istio.io names are accepted too.
	annotationPrefix = "isthmus-mesh.io/"
)

var (
	// ErrOptions means that the options cannot make a proxy.
	ErrOptions = errors.New("invalid injection options")
	// ErrTemplate means that a pod template cannot get a proxy.
	ErrTemplate = errors.New("pod template cannot be injected")
)

// Options are what all proxies of one cluster have in common. Server and Image
// are required.
type Options struct {
	// Image holds mesh-agent, envoy and nft.
	Image string
	// ImagePullPolicy; empty means IfNotPresent.
	ImagePullPolicy corev1.PullPolicy
	// Server is meshd's host:port as pods reach it; several, separated by commas, where it
	// has replicas.
	Server string
	// Network and ClusterID of the member cluster.
	Network, ClusterID string
	// Domain of the cluster; empty means cluster.local.
	Domain string
	// Audience of the projected token; empty means isthmus-ca.
	Audience string
	// RootConfigMap is the ConfigMap with the mesh's roots that every injected
	// namespace has; empty means isthmus-ca-root-cert.
	RootConfigMap string
	// LogLevel of the agent; empty means info.
	LogLevel string
	// DrainSeconds at the end of a proxy; 0 means the agent's default. The
	// pod's grace period must be longer.
	DrainSeconds int
	// Resources of the proxy; nil means 100m CPU and 128Mi requested.
	Resources *corev1.ResourceRequirements
}

func (o *Options) complete() error {
	for _, field := range []struct {
		value    *string
		standard string
	}{
		{&o.Domain, "cluster.local"},
		{&o.Audience, "isthmus-ca"},
		{&o.RootConfigMap, "isthmus-ca-root-cert"},
		{&o.LogLevel, "info"},
	} {
		if *field.value == "" {
			*field.value = field.standard
		}
	}
	if o.ImagePullPolicy == "" {
		o.ImagePullPolicy = corev1.PullIfNotPresent
	}
	if o.Image == "" {
		return fmt.Errorf("%w: image is empty", ErrOptions)
	}
	if _, err := servers.Parse(o.Server); err != nil {
		return fmt.Errorf("%w: %w", ErrOptions, err)
	}
	return nil
}

// captured collects the redirection of one pod from its annotations.
type captured struct {
	variable, own, istio string
}

// workloadAPI is the annotation that gives the containers of a pod the SPIFFE Workload
// API, for their own identity.
const workloadAPI = annotationPrefix + "workload-api"

// accessLog is the annotation that makes a proxy log what passes through it.
const accessLog = annotationPrefix + "access-log"

var captures = []captured{
	{"MESH_OUTBOUND_TO", "outbound-to", "traffic.sidecar.istio.io/includeOutboundIPRanges"},
	{"MESH_EXCLUDE_TO", "exclude-to", "traffic.sidecar.istio.io/excludeOutboundIPRanges"},
	{"MESH_EXCLUDE_TO_PORTS", "exclude-to-ports", "traffic.sidecar.istio.io/excludeOutboundPorts"},
	{"MESH_INBOUND_PORTS", "inbound-ports", "traffic.sidecar.istio.io/includeInboundPorts"},
	{"MESH_EXCLUDE_INBOUND_PORTS", "exclude-inbound-ports", "traffic.sidecar.istio.io/excludeInboundPorts"},
}

// captureEnv reads the annotations that change redirection. "*" is Istio's way
// to say all, which is what absence means here.
func captureEnv(t *corev1.PodTemplateSpec) []corev1.EnvVar {
	var env []corev1.EnvVar
	for _, c := range captures {
		value := t.Annotations[annotationPrefix+c.own]
		if value == "" {
			value = t.Annotations[c.istio]
		}
		if value = strings.TrimSpace(value); value != "" && value != "*" {
			env = append(env, corev1.EnvVar{Name: c.variable, Value: value})
		}
	}
	return env
}

// skip tells why a template stays as it is, empty if it does not.
func skip(t *corev1.PodTemplateSpec) string {
	for _, from := range []map[string]string{t.Labels, t.Annotations} {
		for _, key := range []string{InjectLabel, "sidecar.istio.io/inject"} {
			if on, err := strconv.ParseBool(from[key]); err == nil && !on {
				return key + " is false"
			}
		}
	}
	if t.Spec.HostNetwork {
		return "it uses the node's network"
	}
	if t.Labels[ProxyLabel] == "gateway" {
		return "it is a gateway"
	}
	return ""
}
