// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// expand replaces $(NAME) by lookup's value. $$ is a dollar, and a reference
// that lookup does not know stays as it is, as in the Kubernetes API's `command`.
func expand(s string, lookup func(string) (string, bool)) string {
	var out strings.Builder
	for {
		i := strings.IndexByte(s, '$')
		if i < 0 || i+1 == len(s) {
			out.WriteString(s)
			return out.String()
		}
		out.WriteString(s[:i])
		s = s[i:]
		switch {
		case s[1] == '$':
			out.WriteByte('$')
			s = s[2:]
		case s[1] == '(' && strings.IndexByte(s, ')') > 0:
			end := strings.IndexByte(s, ')')
			if value, ok := lookup(s[2:end]); ok {
				out.WriteString(value)
			} else {
				out.WriteString(s[:end+1])
			}
			s = s[end+1:]
		default:
			out.WriteByte('$')
			s = s[1:]
		}
	}
}

// objects reads the ConfigMaps and Secrets that pods refer to. A missing one
// gives an error that satisfies apierrors.IsNotFound.
type objects interface {
	configMap(ctx context.Context, namespace, name string) (*corev1.ConfigMap, error)
	secret(ctx context.Context, namespace, name string) (*corev1.Secret, error)
}

// environment collects variables in order; a later one of the same name wins in place.
type environment struct {
	names  []string
	values map[string]string
}

func (e *environment) set(name, value string) {
	if e.values == nil {
		e.values = map[string]string{}
	}
	if _, ok := e.values[name]; !ok {
		e.names = append(e.names, name)
	}
	e.values[name] = value
}

func (e *environment) lookup(name string) (string, bool) {
	value, ok := e.values[name]
	return value, ok
}

// list gives NAME=value in the order of first appearance.
func (e *environment) list() []string {
	list := make([]string, 0, len(e.names))
	for _, name := range e.names {
		list = append(list, name+"="+e.values[name])
	}
	return list
}

// facts are what only the node knows about a pod.
type facts struct {
	PodIPs  []netip.Addr
	HostIPs []netip.Addr
}

// addEnv adds a container's own variables: envFrom first, then env, where a
// value may refer to what came before.
func (e *environment) addEnv(ctx context.Context, pod *corev1.Pod, c *corev1.Container, known facts, from objects) error {
	for _, source := range c.EnvFrom {
		if err := e.addFrom(ctx, pod.Namespace, source, from); err != nil {
			return fmt.Errorf("container %s: envFrom: %w", c.Name, err)
		}
	}
	for _, v := range c.Env {
		if v.ValueFrom == nil {
			e.set(v.Name, expand(v.Value, e.lookup))
			continue
		}
		value, ok, err := valueFrom(ctx, pod, v.ValueFrom, known, from)
		if err != nil {
			return fmt.Errorf("container %s: env %s: %w", c.Name, v.Name, err)
		}
		if ok {
			e.set(v.Name, value)
		}
	}
	return nil
}

// addFrom adds all keys of a ConfigMap or Secret.
func (e *environment) addFrom(ctx context.Context, namespace string, source corev1.EnvFromSource, from objects) error {
	data := map[string]string{}
	var err error
	var optional *bool
	switch {
	case source.ConfigMapRef != nil:
		optional = source.ConfigMapRef.Optional
		var object *corev1.ConfigMap
		if object, err = from.configMap(ctx, namespace, source.ConfigMapRef.Name); err == nil {
			data = object.Data
		}
	case source.SecretRef != nil:
		optional = source.SecretRef.Optional
		var object *corev1.Secret
		if object, err = from.secret(ctx, namespace, source.SecretRef.Name); err == nil {
			for key, value := range object.Data {
				data[key] = string(value)
			}
		}
	default:
		return errors.New("neither configMapRef nor secretRef is set")
	}
	if err != nil {
		return ignoreMissing(err, optional)
	}
	for _, key := range sortedKeys(data) {
		e.set(source.Prefix+key, data[key])
	}
	return nil
}

// valueFrom gives the value of one variable; false means an optional one that does not exist.
func valueFrom(ctx context.Context, pod *corev1.Pod, source *corev1.EnvVarSource, known facts, from objects) (string, bool, error) {
	switch {
	case source.FieldRef != nil:
		value, err := fieldValue(pod, source.FieldRef.FieldPath, known)
		return value, err == nil, err
	case source.ConfigMapKeyRef != nil:
		ref := source.ConfigMapKeyRef
		object, err := from.configMap(ctx, pod.Namespace, ref.Name)
		if err != nil {
			return "", false, ignoreMissing(err, ref.Optional)
		}
		value, ok := object.Data[ref.Key]
		return value, ok, missingKey(ok, "configmap", ref.Name, ref.Key, ref.Optional)
	case source.SecretKeyRef != nil:
		ref := source.SecretKeyRef
		object, err := from.secret(ctx, pod.Namespace, ref.Name)
		if err != nil {
			return "", false, ignoreMissing(err, ref.Optional)
		}
		value, ok := object.Data[ref.Key]
		return string(value), ok, missingKey(ok, "secret", ref.Name, ref.Key, ref.Optional)
	case source.ResourceFieldRef != nil:
		return "", false, errors.New("resourceFieldRef is not supported by the test bed: set a value")
	}
	return "", false, errors.New("valueFrom is empty or of a kind that the test bed does not support")
}

func missingKey(ok bool, kind, name, key string, optional *bool) error {
	if ok || optional != nil && *optional {
		return nil
	}
	return fmt.Errorf("%s %q has no key %q", kind, name, key)
}

func ignoreMissing(err error, optional *bool) error {
	if optional != nil && *optional && apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// fieldValue answers the downward API.
func fieldValue(pod *corev1.Pod, path string, known facts) (string, error) {
	if field, key, ok := subscript(path); ok {
		switch field {
		case "metadata.labels":
			return pod.Labels[key], nil
		case "metadata.annotations":
			return pod.Annotations[key], nil
		}
	}
	switch path {
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	case "metadata.labels":
		return formatMap(pod.Labels), nil
	case "metadata.annotations":
		return formatMap(pod.Annotations), nil
	case "spec.nodeName":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.podIP":
		return joinAddrs(known.PodIPs[:min(1, len(known.PodIPs))]), nil
	case "status.podIPs":
		return joinAddrs(known.PodIPs), nil
	case "status.hostIP":
		return joinAddrs(known.HostIPs[:min(1, len(known.HostIPs))]), nil
	case "status.hostIPs":
		return joinAddrs(known.HostIPs), nil
	}
	return "", fmt.Errorf("fieldRef %q is not supported by the test bed", path)
}

// subscript splits metadata.labels['key'].
func subscript(path string) (field, key string, ok bool) {
	field, rest, ok := strings.Cut(path, "['")
	if !ok {
		return "", "", false
	}
	key, ok = strings.CutSuffix(rest, "']")
	return field, key, ok
}

// formatMap writes a map as the downward API does: sorted, one key="value" a line.
func formatMap(m map[string]string) string {
	var out strings.Builder
	for i, key := range sortedKeys(m) {
		if i > 0 {
			out.WriteByte('\n')
		}
		fmt.Fprintf(&out, "%s=%q", key, m[key])
	}
	return out.String()
}

func joinAddrs(addrs []netip.Addr) string {
	words := make([]string, len(addrs))
	for i, addr := range addrs {
		words[i] = addr.String()
	}
	return strings.Join(words, ",")
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
