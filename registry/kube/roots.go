// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// rootKey is the entry of the ConfigMap that agents mount.
const rootKey = "root-cert.pem"

// rootsAgain is how often ConfigMaps are compared although nothing seems to have changed:
// somebody may have edited them.
const rootsAgain = time.Minute

// keepRoots sees to it that every injected namespace has the mesh's roots. Pods wait for
// the ConfigMap before they start, so that a new namespace is looked for often.
func (r *run) keepRoots(ctx context.Context) {
	type written struct {
		roots string
		at    time.Time
	}
	have := map[string]written{}
	for pause(ctx, 200*time.Millisecond) {
		a := r.access.Load()
		roots := string(r.config.Roots())
		if a == nil || a.writer == nil || roots == "" || !r.caches.namespaces.state().synced {
			continue
		}
		for _, ns := range r.injectedNamespaces() {
			if w := have[ns]; w.roots == roots && r.config.Now().Sub(w.at) < rootsAgain {
				continue
			}
			if err := r.putRoots(ctx, a.writer, ns, roots); err != nil {
				if ctx.Err() == nil {
					r.log.Debug("cannot write the roots", "namespace", ns, "error", err)
				}
				// Tried again in a while: a namespace that ends, or an API server that is away,
				// must not hold up the others.
				have[ns] = written{roots, r.config.Now().Add(2*time.Second - rootsAgain)}
				continue
			}
			have[ns] = written{roots, r.config.Now()}
		}
	}
}

func (r *run) putRoots(ctx context.Context, api *API, namespace, roots string) error {
	ctx, cancel := context.WithTimeout(ctx, r.config.Patience)
	defer cancel()
	var have corev1.ConfigMap
	err := api.core.Get().Namespace(namespace).Resource("configmaps").Name(RootConfigMap).Do(ctx).Into(&have)
	if apierrors.IsNotFound(err) {
		fresh := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: RootConfigMap, Labels: map[string]string{managedByLabel: "isthmus"}},
			Data:       map[string]string{rootKey: roots},
		}
		return api.core.Post().Namespace(namespace).Resource("configmaps").Body(fresh).Do(ctx).Error()
	}
	if err != nil || have.Data[rootKey] == roots {
		return err
	}
	if have.Data == nil {
		have.Data = map[string]string{}
	}
	have.Data[rootKey] = roots
	return api.core.Put().Namespace(namespace).Resource("configmaps").Name(RootConfigMap).Body(&have).Do(ctx).Error()
}
