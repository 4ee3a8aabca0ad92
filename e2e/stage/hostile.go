// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// sliceSize is how many endpoints the API server takes in one EndpointSlice.
const sliceSize = 1000

// Crowd makes a Service without selector ("namespace/name") that has n endpoints, written
// by hand as a program would that keeps a list of its own.
func (s *Stage) Crowd(ctx context.Context, cluster, service string, n int) error {
	c, err := s.cluster(cluster)
	if err != nil {
		return err
	}
	namespace, name, _ := strings.Cut(service, "/")
	_, err = c.Client().CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	_, err = c.Client().CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	port, portName, ready := int32(80), "http", true
	addr := netip.MustParseAddr("100.64.0.1")
	for made := 0; made < n; made += sliceSize {
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: fmt.Sprintf("%s-%d", name, made), Labels: map[string]string{discoveryv1.LabelServiceName: name}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
		}
		for range min(sliceSize, n-made) {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{addr.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
			})
			addr = addr.Next()
		}
		if _, err := c.Client().DiscoveryV1().EndpointSlices(namespace).Create(ctx, slice, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// Bloat gives an annotation of a Service ("namespace/name") a value of that many bytes.
func (s *Stage) Bloat(ctx context.Context, cluster, service, annotation string, bytes int) error {
	c, err := s.cluster(cluster)
	if err != nil {
		return err
	}
	namespace, name, _ := strings.Cut(service, "/")
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, annotation, strings.Repeat("x", bytes))
	_, err = c.Client().CoreV1().Services(namespace).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}
