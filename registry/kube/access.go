// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"slices"

	authorizationv1 "k8s.io/api/authorization/v1"
)

// Rule is a permission that an account of the mesh gets in a member cluster, and why.
type Rule struct {
	Groups    []string
	Resources []string
	Names     []string // empty means all
	Verbs     []string
	Why       string
}

var read = []string{"get", "list", "watch"}

// readerRules are what meshd's reader may do in the whole cluster. There is no Secret
// among them.
var readerRules = []Rule{
	{[]string{""}, []string{"services", "pods", "nodes", "namespaces"}, nil, read, "services, their workloads, localities and networks"},
	{[]string{"discovery.k8s.io"}, []string{"endpointslices"}, nil, read, "endpoints of services"},
	{[]string{"networking.istio.io", "security.istio.io", "telemetry.istio.io", "extensions.istio.io"}, []string{"*"}, nil, read, "Istio's configuration: a primary contributes it, a remote's is reported as ignored"},
	{[]string{"gateway.networking.k8s.io"}, []string{"*"}, nil, read, "Gateway API objects, likewise"},
	{[]string{"multicluster.x-k8s.io"}, []string{"*"}, nil, read, "exported services, likewise"},
}

// readerOwnRules are what the reader may do in the namespace of the mesh.
var readerOwnRules = []Rule{
	{[]string{""}, []string{"serviceaccounts/token"}, []string{ReaderAccount}, []string{"create"}, "renew its own credential, and no other's"},
	{[]string{"coordination.k8s.io"}, []string{"leases"}, nil, []string{"get", "list", "watch", "create", "update", "patch"}, "the beacon, by which freshness is measured"},
}

// writerRules are what meshd's writer may do in the whole cluster: keep one ConfigMap in
// each namespace with injected pods, and one bundle of the whole cluster. Names cannot
// limit create.
var writerRules = []Rule{
	{[]string{""}, []string{"configmaps"}, nil, []string{"create"}, "make the ConfigMap of the mesh's roots in injected namespaces"},
	{[]string{""}, []string{"configmaps"}, []string{RootConfigMap}, []string{"get", "update", "patch"}, "keep that ConfigMap current"},
	{[]string{"certificates.k8s.io"}, []string{"clustertrustbundles"}, nil, []string{"create"}, "make the ClusterTrustBundle of the mesh's roots, where the cluster serves that kind"},
	{[]string{"certificates.k8s.io"}, []string{"clustertrustbundles"}, []string{RootTrustBundle}, []string{"get", "update"}, "keep it current"},
}

// writerOwnRules are what the writer may do in the namespace of the mesh.
var writerOwnRules = []Rule{
	{[]string{""}, []string{"serviceaccounts/token"}, []string{WriterAccount}, []string{"create"}, "renew its own credential, and no other's"},
}

// RequiredAccess is what the person who joins a cluster must be allowed to do there: to
// apply every object of Manifests, to grant what the accounts get (Kubernetes refuses to
// grant what one does not have), and to ask for their first tokens.
func RequiredAccess(o MemberOptions) []authorizationv1.ResourceAttributes {
	var need []authorizationv1.ResourceAttributes
	add := func(group, resource, namespace string, verbs ...string) {
		for _, verb := range verbs {
			need = append(need, authorizationv1.ResourceAttributes{Group: group, Resource: resource, Namespace: namespace, Verb: verb})
		}
	}
	apply := []string{"get", "create", "patch"}
	add("", "namespaces", "", apply...)
	add("", "serviceaccounts", Namespace, apply...)
	add("", "configmaps", Namespace, apply...)
	add("rbac.authorization.k8s.io", "clusterroles", "", apply...)
	add("rbac.authorization.k8s.io", "clusterrolebindings", "", apply...)
	add("rbac.authorization.k8s.io", "roles", Namespace, apply...)
	add("rbac.authorization.k8s.io", "rolebindings", Namespace, apply...)
	if o.Gateway {
		add("apps", "deployments", Namespace, apply...)
		add("", "services", Namespace, apply...)
	}
	need = append(need, authorizationv1.ResourceAttributes{Resource: "serviceaccounts", Subresource: "token", Namespace: Namespace, Verb: "create"})
	for _, r := range slices.Concat(readerRules, writerRules) {
		for _, group := range r.Groups {
			for _, resource := range r.Resources {
				add(group, resource, "", r.Verbs...)
			}
		}
	}
	return slices.CompactFunc(need, func(a, b authorizationv1.ResourceAttributes) bool { return a == b })
}
