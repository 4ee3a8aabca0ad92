// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

type restClient = *rest.RESTClient

// typed lists and watches a kind through the API that is current at that moment, so that
// a renewed credential needs no new reflector. field is a field selector.
func (r *run) typed(client func(*API) restClient, resource, namespace, field string) lister {
	request := func(options metav1.ListOptions) (*rest.Request, error) {
		a, err := r.api()
		if err != nil {
			return nil, err
		}
		options.FieldSelector = field
		q := client(a).Get().Namespace(namespace).Resource(resource).VersionedParams(&options, metav1.ParameterCodec)
		if options.TimeoutSeconds != nil {
			q = q.Timeout(time.Duration(*options.TimeoutSeconds) * time.Second)
		}
		return q, nil
	}
	return lister{
		list: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			q, err := request(options)
			if err != nil {
				return nil, err
			}
			return q.Do(ctx).Get()
		},
		watch: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			options.Watch = true
			q, err := request(options)
			if err != nil {
				return nil, err
			}
			return q.Watch(ctx)
		},
	}
}

// untyped lists and watches a kind of configuration.
func (r *run) untyped(gvr schema.GroupVersionResource) lister {
	return lister{
		list: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			a, err := r.api()
			if err != nil {
				return nil, err
			}
			return a.dynamic.Resource(gvr).List(ctx, options)
		},
		watch: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			a, err := r.api()
			if err != nil {
				return nil, err
			}
			return a.dynamic.Resource(gvr).Watch(ctx, options)
		},
	}
}
