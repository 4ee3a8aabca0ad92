// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// content computes what a rendered volume must show now.
func (v *volumes) content(ctx context.Context, pod *corev1.Pod, volume *corev1.Volume) (payload, error) {
	out := payload{}
	switch {
	case volume.ConfigMap != nil:
		s := volume.ConfigMap
		return out, v.addConfigMap(ctx, out, pod, s.Name, s.Items, s.DefaultMode, s.Optional)
	case volume.Secret != nil:
		s := volume.Secret
		return out, v.addSecret(ctx, out, pod, s.SecretName, s.Items, s.DefaultMode, s.Optional)
	case volume.DownwardAPI != nil:
		return out, v.addDownward(out, pod, volume.DownwardAPI.Items, volume.DownwardAPI.DefaultMode)
	}
	for i, source := range volume.Projected.Sources {
		if err := v.addSource(ctx, out, pod, source, volume.Projected.DefaultMode); err != nil {
			return nil, fmt.Errorf("projected source %d: %w", i, err)
		}
	}
	return out, nil
}

// addSource adds one source of a projected volume.
func (v *volumes) addSource(ctx context.Context, out payload, pod *corev1.Pod, source corev1.VolumeProjection, mode *int32) error {
	switch {
	case source.ConfigMap != nil:
		s := source.ConfigMap
		return v.addConfigMap(ctx, out, pod, s.Name, s.Items, mode, s.Optional)
	case source.Secret != nil:
		s := source.Secret
		return v.addSecret(ctx, out, pod, s.Name, s.Items, mode, s.Optional)
	case source.DownwardAPI != nil:
		return v.addDownward(out, pod, source.DownwardAPI.Items, mode)
	case source.ServiceAccountToken != nil:
		token, err := v.tokens.get(ctx, pod, source.ServiceAccountToken)
		if err != nil {
			return err
		}
		file := payloadFile{Data: []byte(token), Mode: fileMode(nil, mode)}
		if uid, ok := soleUser(pod); ok && fsGroup(pod) < 0 {
			file.UID, file.Mode = uid, 0o600
		}
		return out.add(source.ServiceAccountToken.Path, file)
	}
	return errors.New("of a kind that the test bed does not support (it has configMap, secret, downwardAPI, serviceAccountToken)")
}

func (v *volumes) addConfigMap(ctx context.Context, out payload, pod *corev1.Pod, name string, items []corev1.KeyToPath, mode *int32, optional *bool) error {
	object, err := v.objects.configMap(ctx, pod.Namespace, name)
	if err != nil {
		return ignoreMissing(err, optional)
	}
	data := map[string][]byte{}
	for key, value := range object.Data {
		data[key] = []byte(value)
	}
	for key, value := range object.BinaryData {
		data[key] = value
	}
	return addKeys(out, "configmap "+name, data, items, mode, optional)
}

func (v *volumes) addSecret(ctx context.Context, out payload, pod *corev1.Pod, name string, items []corev1.KeyToPath, mode *int32, optional *bool) error {
	object, err := v.objects.secret(ctx, pod.Namespace, name)
	if err != nil {
		return ignoreMissing(err, optional)
	}
	return addKeys(out, "secret "+name, object.Data, items, mode, optional)
}

// addKeys adds the listed keys under their paths, or all keys if none is listed.
func addKeys(out payload, what string, data map[string][]byte, items []corev1.KeyToPath, mode *int32, optional *bool) error {
	if len(items) == 0 {
		for key, value := range data {
			if err := out.add(key, payloadFile{Data: value, Mode: fileMode(nil, mode)}); err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
		}
		return nil
	}
	for _, item := range items {
		value, ok := data[item.Key]
		if !ok {
			if optional != nil && *optional {
				continue
			}
			return fmt.Errorf("%s has no key %q", what, item.Key)
		}
		if err := out.add(item.Path, payloadFile{Data: value, Mode: fileMode(item.Mode, mode)}); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	return nil
}

func (v *volumes) addDownward(out payload, pod *corev1.Pod, items []corev1.DownwardAPIVolumeFile, mode *int32) error {
	for _, item := range items {
		if item.FieldRef == nil {
			return fmt.Errorf("downwardAPI %s: resourceFieldRef is not supported by the test bed", item.Path)
		}
		value, err := fieldValue(pod, item.FieldRef.FieldPath, v.known)
		if err != nil {
			return err
		}
		if err := out.add(item.Path, payloadFile{Data: []byte(value), Mode: fileMode(item.Mode, mode)}); err != nil {
			return fmt.Errorf("downwardAPI: %w", err)
		}
	}
	return nil
}

// fileMode is the file's own mode, else the volume's, else 0644.
func fileMode(own, volume *int32) fs.FileMode {
	switch {
	case own != nil:
		return fs.FileMode(*own) & fs.ModePerm
	case volume != nil:
		return fs.FileMode(*volume) & fs.ModePerm
	}
	return 0o644
}

// soleUser gives the user that all containers of the pod run as, if the pod
// names one: a token belongs to it alone then.
func soleUser(pod *corev1.Pod) (int, bool) {
	user, found := 0, false
	for _, c := range append(append([]corev1.Container(nil), pod.Spec.InitContainers...), pod.Spec.Containers...) {
		var own *int64
		if pod.Spec.SecurityContext != nil {
			own = pod.Spec.SecurityContext.RunAsUser
		}
		if c.SecurityContext != nil && c.SecurityContext.RunAsUser != nil {
			own = c.SecurityContext.RunAsUser
		}
		if own == nil || found && user != int(*own) {
			return 0, false
		}
		user, found = int(*own), true
	}
	return user, found
}

// isMissing reports whether a volume waits for an object that does not exist yet.
func isMissing(err error) bool { return apierrors.IsNotFound(err) }
