// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	runVolume   = "isthmus-run"
	tokenVolume = "isthmus-token"
	rootVolume  = "isthmus-root"
	podVolume   = "isthmus-pod"
	// socketVolume is the only one that the workload's containers share.
	socketVolume = "isthmus-workload"
	// socketFolder and the name of the socket are those that other meshes use too.
	socketFolder = "/var/run/secrets/workload-spiffe-uds"
	socketPath   = socketFolder + "/socket"
	socketEnv    = "SPIFFE_ENDPOINT_SOCKET"
	socketValue  = "unix://" + socketPath

	proxyUser = 1337

	statusPort = 15020
	readyPort  = 15021
	statsPort  = 15090
)

// Pod adds the proxy to a template, or brings the one that is there up to date.
// It returns why it left the template alone, empty if it did not. On an error
// the template is unchanged.
func Pod(t *corev1.PodTemplateSpec, o Options) (skipped string, err error) {
	if err := o.complete(); err != nil {
		return "", err
	}
	if why := skip(t); why != "" {
		return why, nil
	}
	for _, c := range t.Spec.Containers {
		if c.Name == ProxyContainer || c.Name == InitContainer {
			return "", fmt.Errorf("%w: a container is called %s already", ErrTemplate, c.Name)
		}
	}
	work := t.DeepCopy()
	former := take(work)
	probes, err := rewriteProbes(work, former)
	if err != nil {
		return "", err
	}
	metrics := rewriteMetrics(work, former)
	env := captureEnv(work)
	proxy := proxyContainer(o, slices.Concat(env, accessLogEnv(work)), probes, metrics)
	shareSocket(work, &proxy)
	work.Spec.InitContainers = append([]corev1.Container{initContainer(o, env), proxy}, work.Spec.InitContainers...)
	work.Spec.Volumes = append(work.Spec.Volumes, volumes(o)...)
	if work.Labels == nil {
		work.Labels = map[string]string{}
	}
	work.Labels[ProxyLabel] = "sidecar"
	*t = *work
	return "", nil
}

// accessLogEnv reads the annotation that turns access logs on.
func accessLogEnv(t *corev1.PodTemplateSpec) []corev1.EnvVar {
	if on, err := strconv.ParseBool(t.Annotations[accessLog]); err != nil || !on {
		return nil
	}
	return []corev1.EnvVar{{Name: "MESH_ACCESS_LOG", Value: "true"}}
}

// take removes what an earlier injection added, and returns its proxy, whose
// environment remembers what the workload's probes were.
func take(t *corev1.PodTemplateSpec) *corev1.Container {
	var former *corev1.Container
	t.Spec.InitContainers = slices.DeleteFunc(t.Spec.InitContainers, func(c corev1.Container) bool {
		if c.Name == ProxyContainer {
			former = c.DeepCopy()
		}
		return c.Name == ProxyContainer || c.Name == InitContainer
	})
	eachContainer(t, func(c *corev1.Container) {
		c.VolumeMounts = slices.DeleteFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == socketVolume })
		c.Env = slices.DeleteFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == socketEnv && e.Value == socketValue })
	})
	ours := []string{runVolume, tokenVolume, rootVolume, podVolume, socketVolume}
	t.Spec.Volumes = slices.DeleteFunc(t.Spec.Volumes, func(v corev1.Volume) bool { return slices.Contains(ours, v.Name) })
	return former
}

// eachContainer changes every container of the workload, also those that run before
// the others.
func eachContainer(t *corev1.PodTemplateSpec, change func(*corev1.Container)) {
	for _, list := range [][]corev1.Container{t.Spec.InitContainers, t.Spec.Containers} {
		for i := range list {
			change(&list[i])
		}
	}
}

// shareSocket lets the workload's containers reach the Workload API, where the
// annotation asks for it. The proxy has started when they do.
func shareSocket(t *corev1.PodTemplateSpec, proxy *corev1.Container) {
	if on, err := strconv.ParseBool(t.Annotations[workloadAPI]); err != nil || !on {
		return
	}
	proxy.Env = append(proxy.Env, corev1.EnvVar{Name: "MESH_WORKLOAD_SOCKET", Value: socketPath})
	proxy.VolumeMounts = append(proxy.VolumeMounts, corev1.VolumeMount{Name: socketVolume, MountPath: socketFolder})
	eachContainer(t, func(c *corev1.Container) {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: socketVolume, MountPath: socketFolder, ReadOnly: true})
		if !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == socketEnv }) {
			c.Env = append(c.Env, corev1.EnvVar{Name: socketEnv, Value: socketValue})
		}
	})
	t.Spec.Volumes = append(t.Spec.Volumes, corev1.Volume{Name: socketVolume, VolumeSource: corev1.VolumeSource{
		EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory},
	}})
}

func formerEnv(former *corev1.Container, name string) string {
	if former == nil {
		return ""
	}
	for _, e := range former.Env {
		if e.Name == name {
			return e.Value
		}
	}
	return ""
}

// initContainer programs redirection before anything of the workload runs, and
// is the only one with the right to.
func initContainer(o Options, env []corev1.EnvVar) corev1.Container {
	return corev1.Container{
		Name:            InitContainer,
		Image:           o.Image,
		ImagePullPolicy: o.ImagePullPolicy,
		Command:         []string{"mesh-agent"},
		Args:            []string{"redirect", "--apply"},
		Env:             env,
		Resources:       resources(o),
		SecurityContext: &corev1.SecurityContext{
			RunAsUser:                at(int64(0)),
			RunAsGroup:               at(int64(0)),
			RunAsNonRoot:             at(false),
			AllowPrivilegeEscalation: at(false),
			ReadOnlyRootFilesystem:   at(true),
			Capabilities: &corev1.Capabilities{
				Drop: []corev1.Capability{"ALL"},
				Add:  []corev1.Capability{"NET_ADMIN"},
			},
		},
	}
}

func proxyContainer(o Options, capture []corev1.EnvVar, probes, metrics string) corev1.Container {
	return corev1.Container{
		Name:            ProxyContainer,
		Image:           o.Image,
		ImagePullPolicy: o.ImagePullPolicy,
		Command:         []string{"mesh-agent"},
		Args:            []string{"proxy"},
		Env:             append(proxyEnv(o, probes, metrics), capture...),
		Resources:       resources(o),
		RestartPolicy:   at(corev1.ContainerRestartPolicyAlways),
		Ports: []corev1.ContainerPort{
			{Name: "http-envoy-prom", ContainerPort: statsPort, Protocol: corev1.ProtocolTCP},
			{Name: "status-port", ContainerPort: readyPort, Protocol: corev1.ProtocolTCP},
		},
		// The workload starts once this has succeeded.
		StartupProbe:   readyProbe(1, 600),
		ReadinessProbe: readyProbe(5, 4),
		SecurityContext: &corev1.SecurityContext{
			RunAsUser:                at(int64(proxyUser)),
			RunAsGroup:               at(int64(proxyUser)),
			RunAsNonRoot:             at(true),
			AllowPrivilegeEscalation: at(false),
			ReadOnlyRootFilesystem:   at(true),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		VolumeMounts: []corev1.VolumeMount{
			{Name: runVolume, MountPath: "/var/run/isthmus"},
			{Name: tokenVolume, MountPath: "/var/run/secrets/tokens", ReadOnly: true},
			{Name: rootVolume, MountPath: "/var/run/secrets/isthmus", ReadOnly: true},
			{Name: podVolume, MountPath: "/etc/isthmus/pod", ReadOnly: true},
		},
	}
}

func readyProbe(period, failures int32) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
			Path: "/healthz/ready", Port: intstr.FromInt32(readyPort), Scheme: corev1.URISchemeHTTP,
		}},
		PeriodSeconds:    period,
		TimeoutSeconds:   3,
		SuccessThreshold: 1,
		FailureThreshold: failures,
	}
}

// proxyEnv is the agent's configuration; see cmd/mesh-agent for each variable.
func proxyEnv(o Options, probes, metrics string) []corev1.EnvVar {
	field := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
	}
	env := []corev1.EnvVar{
		{Name: "MESH_ROLE", Value: "sidecar"},
		{Name: "MESH_SERVER", Value: o.Server},
		{Name: "MESH_DOMAIN", Value: o.Domain},
		field("MESH_POD_NAME", "metadata.name"),
		field("MESH_POD_NAMESPACE", "metadata.namespace"),
		field("MESH_POD_UID", "metadata.uid"),
		field("MESH_POD_IPS", "status.podIPs"),
		field("MESH_SERVICE_ACCOUNT", "spec.serviceAccountName"),
		field("MESH_NODE_NAME", "spec.nodeName"),
		{Name: "MESH_LOG_LEVEL", Value: o.LogLevel},
	}
	for _, e := range []corev1.EnvVar{
		{Name: "MESH_NETWORK", Value: o.Network},
		{Name: "MESH_CLUSTER_ID", Value: o.ClusterID},
		{Name: "MESH_APP_PROBES", Value: probes},
		{Name: "MESH_APP_METRICS", Value: metrics},
	} {
		if e.Value != "" {
			env = append(env, e)
		}
	}
	if o.DrainSeconds > 0 {
		env = append(env, corev1.EnvVar{Name: "MESH_DRAIN_DURATION", Value: strconv.Itoa(o.DrainSeconds) + "s"})
	}
	return env
}

// volumes are the proxy's alone: no other container mounts them.
func volumes(o Options) []corev1.Volume {
	return []corev1.Volume{
		// Holds the private key, so it is never on a disk.
		{Name: runVolume, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
		{Name: tokenVolume, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Audience: o.Audience, ExpirationSeconds: at(int64(3600)), Path: "isthmus-token",
			}}},
		}}},
		{Name: rootVolume, VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: o.RootConfigMap},
		}}},
		{Name: podVolume, VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
			Items: []corev1.DownwardAPIVolumeFile{{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.labels"}}},
		}}},
	}
}

func resources(o Options) corev1.ResourceRequirements {
	if o.Resources != nil {
		return *o.Resources
	}
	return corev1.ResourceRequirements{Requests: corev1.ResourceList{
		corev1.ResourceCPU:    resource.MustParse("100m"),
		corev1.ResourceMemory: resource.MustParse("128Mi"),
	}}
}

func at[T any](value T) *T { return &value }
