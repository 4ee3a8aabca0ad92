// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// What a member cluster is given, by name.
const (
	Namespace     = "isthmus-system"
	ReaderAccount = "isthmus-reader"
	WriterAccount = "isthmus-writer"
	GatewayName   = "isthmus-eastwestgateway"
	RootConfigMap = "isthmus-ca-root-cert"
	// RootTrustBundle is a ClusterTrustBundle, where the cluster serves that kind.
	RootTrustBundle = RootConfigMap

	// FieldManager of everything that is applied.
	FieldManager = "isthmus"

	// GatewayPort is where gateways take connections of other networks.
	GatewayPort = 15443

	// DefaultProxyImage holds mesh-agent, Envoy and nft.
	DefaultProxyImage = "isthmus/proxy:dev"
)

// Labels and annotations.
const (
	ProxyLabel     = "isthmus-mesh.io/proxy"           // of pods with a proxy: sidecar, gateway
	GatewayLabel   = "isthmus-mesh.io/gateway"         // of the Service of an east-west gateway
	NetworkLabel   = "topology.istio.io/network"       // of pods, namespaces, gateway Services
	managedByLabel = "app.kubernetes.io/managed-by"    // of everything we apply
	partOfLabel    = "app.kubernetes.io/part-of"       //
	GatewayAddress = "isthmus-mesh.io/gateway-address" // annotation of a gateway Service: host[:port], …
)

// gatewayDrain is how long a gateway lets connections finish when it ends. Clients end
// theirs after less than half of it, so that none is cut.
const gatewayDrain = 40

// MemberOptions says what is special about one member.
type MemberOptions struct {
	ClusterName, ClusterID, Network string

	TrustDomain string
	Meshd       []string // "host:15012" that proxies dial, any of them
	Root        []byte   // PEM of the mesh's roots
	ProxyImage  string   // empty means DefaultProxyImage

	Gateway         bool // install an east-west gateway
	GatewayReplicas int  // zero means 1
}

// Manifests returns the objects of a member in the order to apply them (server-side apply,
// FieldManager). It is pure: equal options give equal objects.
func Manifests(o MemberOptions) ([]*unstructured.Unstructured, error) {
	switch {
	case o.ClusterID == "" || o.Network == "":
		return nil, errors.New("member: ClusterID and Network are required")
	case len(o.Meshd) == 0:
		return nil, errors.New("member: Meshd has no address that proxies could dial")
	case len(o.Root) == 0:
		return nil, errors.New("member: Root has no certificate")
	}
	if o.ProxyImage == "" {
		o.ProxyImage = DefaultProxyImage
	}
	if o.GatewayReplicas == 0 {
		o.GatewayReplicas = 1
	}
	objects := []*unstructured.Unstructured{
		object("v1", "Namespace", Namespace, nil),
		object("v1", "ServiceAccount", ReaderAccount, nil),
		object("v1", "ServiceAccount", WriterAccount, nil),
		object("v1", "ConfigMap", RootConfigMap, fields{"data": fields{"root-cert.pem": string(o.Root)}}),
	}
	objects = append(objects, role("ClusterRole", ReaderAccount, readerRules)...)
	objects = append(objects, role("Role", ReaderAccount, readerOwnRules)...)
	objects = append(objects, role("ClusterRole", WriterAccount, writerRules)...)
	objects = append(objects, role("Role", WriterAccount, writerOwnRules)...)
	if o.Gateway {
		objects = append(objects, object("v1", "ServiceAccount", GatewayName, nil), gatewayService(o), gatewayDeployment(o))
	}
	return objects, nil
}

type fields = map[string]any

// object makes an object in our namespace, or outside of any where its kind wants that.
func object(apiVersion, kind, name string, content fields) *unstructured.Unstructured {
	meta := fields{"name": name, "labels": fields{managedByLabel: "isthmus", partOfLabel: "isthmus"}}
	switch kind {
	case "Namespace", "ClusterRole", "ClusterRoleBinding", "ClusterTrustBundle":
	default:
		meta["namespace"] = Namespace
	}
	u := &unstructured.Unstructured{Object: fields{"apiVersion": apiVersion, "kind": kind, "metadata": meta}}
	maps.Copy(u.Object, content)
	return u
}

// role makes a role of either kind, named after the account it is bound to.
func role(kind, account string, rules []Rule) []*unstructured.Unstructured {
	const rbac = "rbac.authorization.k8s.io"
	var list []any
	for _, r := range rules {
		rule := fields{"apiGroups": anys(r.Groups), "resources": anys(r.Resources), "verbs": anys(r.Verbs)}
		if len(r.Names) > 0 {
			rule["resourceNames"] = anys(r.Names)
		}
		list = append(list, rule)
	}
	return []*unstructured.Unstructured{
		object(rbac+"/v1", kind, account, fields{"rules": list}),
		object(rbac+"/v1", kind+"Binding", account, fields{
			"roleRef":  fields{"apiGroup": rbac, "kind": kind, "name": account},
			"subjects": []any{fields{"kind": "ServiceAccount", "name": account, "namespace": Namespace}},
		}),
	}
}

func anys(list []string) []any {
	out := make([]any, len(list))
	for i, s := range list {
		out[i] = s
	}
	return out
}

func gatewayService(o MemberOptions) *unstructured.Unstructured {
	u := object("v1", "Service", GatewayName, fields{"spec": fields{
		"type":     "LoadBalancer",
		"selector": fields{"app": GatewayName},
		"ports":    []any{fields{"name": "tls", "port": int64(GatewayPort), "targetPort": int64(GatewayPort), "protocol": "TCP"}},
	}})
	label(u, GatewayLabel, "eastwest")
	label(u, NetworkLabel, o.Network)
	return u
}

func label(u *unstructured.Unstructured, key, value string) {
	labels := u.GetLabels()
	labels[key] = value
	u.SetLabels(labels)
}

func gatewayDeployment(o MemberOptions) *unstructured.Unstructured {
	return object("apps/v1", "Deployment", GatewayName, fields{"spec": fields{
		"replicas": int64(o.GatewayReplicas),
		"selector": fields{"matchLabels": fields{"app": GatewayName}},
		// One gateway more before one less: with a single replica there is never none.
		"strategy": fields{"type": "RollingUpdate", "rollingUpdate": fields{"maxSurge": int64(1), "maxUnavailable": int64(0)}},
		"template": fields{
			"metadata": fields{"labels": fields{"app": GatewayName, ProxyLabel: "gateway", NetworkLabel: o.Network}},
			"spec": fields{
				"serviceAccountName":            GatewayName,
				"terminationGracePeriodSeconds": int64(gatewayDrain + 20),
				"containers":                    []any{gatewayContainer(o)},
				"volumes":                       gatewayVolumes(),
			},
		},
	}})
}

func gatewayContainer(o MemberOptions) fields {
	return fields{
		"name": "isthmus-proxy", "image": o.ProxyImage, "imagePullPolicy": "IfNotPresent",
		"command": []any{"mesh-agent"}, "args": []any{"proxy"},
		"env": gatewayEnv(o),
		"ports": []any{
			fields{"name": "tls", "containerPort": int64(GatewayPort), "protocol": "TCP"},
			fields{"name": "status-port", "containerPort": int64(15021), "protocol": "TCP"},
		},
		"readinessProbe": fields{
			"httpGet":       fields{"path": "/healthz/ready", "port": int64(15021), "scheme": "HTTP"},
			"periodSeconds": int64(2), "failureThreshold": int64(2),
		},
		"resources": fields{"requests": fields{"cpu": "100m", "memory": "128Mi"}},
		"securityContext": fields{
			"runAsUser": int64(1337), "runAsGroup": int64(1337), "runAsNonRoot": true,
			"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": fields{"drop": []any{"ALL"}},
		},
		"volumeMounts": []any{
			fields{"name": "run", "mountPath": "/var/run/isthmus"},
			fields{"name": "token", "mountPath": "/var/run/secrets/tokens", "readOnly": true},
			fields{"name": "root", "mountPath": "/var/run/secrets/isthmus", "readOnly": true},
			fields{"name": "pod", "mountPath": "/etc/isthmus/pod", "readOnly": true},
		},
	}
}

func gatewayEnv(o MemberOptions) []any {
	var env []any
	for _, e := range [][2]string{
		{"MESH_ROLE", "gateway"}, {"MESH_SERVER", strings.Join(o.Meshd, ",")}, {"MESH_NETWORK", o.Network},
		{"MESH_CLUSTER_ID", "kube:" + o.ClusterID}, {"MESH_DRAIN_DURATION", strconv.Itoa(gatewayDrain) + "s"},
	} {
		env = append(env, fields{"name": e[0], "value": e[1]})
	}
	for _, e := range [][2]string{
		{"MESH_POD_NAME", "metadata.name"}, {"MESH_POD_NAMESPACE", "metadata.namespace"}, {"MESH_POD_UID", "metadata.uid"},
		{"MESH_POD_IPS", "status.podIPs"}, {"MESH_SERVICE_ACCOUNT", "spec.serviceAccountName"}, {"MESH_NODE_NAME", "spec.nodeName"},
	} {
		env = append(env, fields{"name": e[0], "valueFrom": fields{"fieldRef": fields{"apiVersion": "v1", "fieldPath": e[1]}}})
	}
	return env
}

func gatewayVolumes() []any {
	return []any{
		fields{"name": "run", "emptyDir": fields{"medium": "Memory"}},
		fields{"name": "token", "projected": fields{"sources": []any{fields{"serviceAccountToken": fields{
			"audience": "isthmus-ca", "expirationSeconds": int64(3600), "path": "isthmus-token",
		}}}}},
		fields{"name": "root", "configMap": fields{"name": RootConfigMap}},
		fields{"name": "pod", "downwardAPI": fields{"items": []any{fields{
			"path": "labels", "fieldRef": fields{"apiVersion": "v1", "fieldPath": "metadata.labels"},
		}}}},
	}
}

// String names a rule for the documentation.
func (r Rule) String() string {
	return fmt.Sprintf("%v %v %v: %s", r.Verbs, r.Resources, r.Names, r.Why)
}
