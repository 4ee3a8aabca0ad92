// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// bundleVersions are the versions of the API of ClusterTrustBundles, the best first.
var bundleVersions = []string{"v1", "v1beta1"}

const bundleResource = "clustertrustbundles"

// bundleAgain is how often a cluster is asked again that does not serve the kind, or does not let us write it.
const bundleAgain = 10 * time.Minute

// keepTrustBundle keeps the mesh's roots in a ClusterTrustBundle, which pods can mount in any namespace, where the
// cluster serves that kind. Where it does not, or the writer may not write it (the cluster joined before that was
// among its permissions), the ConfigMaps do; nobody depends on it.
func (r *run) keepTrustBundle(ctx context.Context) {
	able, have, next := true, "", time.Time{}
	for pause(ctx, time.Second) {
		a := r.access.Load()
		roots := certificatesOnly(r.config.Roots())
		early := r.config.Now().Before(next)
		if a == nil || a.writer == nil || roots == "" || early && (have == roots || !able) {
			continue
		}
		served, err := r.putTrustBundle(ctx, a.writer, roots)
		able, have, next = served && !apierrors.IsForbidden(err), roots, r.config.Now().Add(rootsAgain)
		if !able && (err == nil || served) {
			next = r.config.Now().Add(bundleAgain)
		}
		if err != nil && ctx.Err() == nil {
			r.log.Debug("cannot write the cluster's trust bundle", "error", err)
		}
	}
}

// putTrustBundle writes the bundle if it differs. It reports false where the cluster does not serve the kind.
func (r *run) putTrustBundle(ctx context.Context, api *API, roots string) (served bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.config.Patience)
	defer cancel()
	version, err := api.bundleVersion(ctx)
	if err != nil || version == "" {
		return false, err
	}
	gv := schema.GroupVersion{Group: "certificates.k8s.io", Version: version}
	at := api.dynamic.Resource(gv.WithResource(bundleResource))
	have, err := at.Get(ctx, RootTrustBundle, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		fresh := object(gv.String(), "ClusterTrustBundle", RootTrustBundle, fields{"spec": fields{"trustBundle": roots}})
		_, err = at.Create(ctx, fresh, metav1.CreateOptions{FieldManager: FieldManager})
		return true, err
	}
	if err != nil {
		return true, err
	}
	if is, _, _ := unstructured.NestedString(have.Object, "spec", "trustBundle"); is == roots {
		return true, nil
	}
	if err := unstructured.SetNestedField(have.Object, roots, "spec", "trustBundle"); err != nil {
		return true, err
	}
	_, err = at.Update(ctx, have, metav1.UpdateOptions{FieldManager: FieldManager})
	return true, err
}

// bundleVersion asks which version of the kind is served; empty if none is.
func (a *API) bundleVersion(ctx context.Context) (string, error) {
	for _, version := range bundleVersions {
		text, err := a.core.Get().AbsPath("/apis/certificates.k8s.io/"+version).SetHeader("Accept", "application/json").Do(ctx).Raw()
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		var list metav1.APIResourceList
		if err := json.Unmarshal(text, &list); err != nil {
			return "", err
		}
		for _, resource := range list.APIResources {
			if resource.Name == bundleResource {
				return version, nil
			}
		}
	}
	return "", nil
}

// TrustBundles are what may be there to be deleted when a cluster leaves: one object, by every version of its kind.
func TrustBundles() []*unstructured.Unstructured {
	var list []*unstructured.Unstructured
	for _, version := range bundleVersions {
		list = append(list, object("certificates.k8s.io/"+version, "ClusterTrustBundle", RootTrustBundle, nil))
	}
	return list
}

// certificatesOnly leaves the certificates of a PEM bundle: the kind takes nothing else.
func certificatesOnly(bundle []byte) string {
	var out []byte
	for block, rest := pem.Decode(bundle); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
		}
	}
	return string(out)
}
