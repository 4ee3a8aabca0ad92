// SPDX-License-Identifier: Apache-2.0

package kube_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
	"github.com/isthmus-mesh/isthmus/registry/kube"
	"github.com/isthmus-mesh/isthmus/registry/registrytest"
)

func insecure() http.RoundTripper {
	return &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} // readiness of a test's own server
}

// plainSealer hides nothing: the store's own tests are about sealing.
type plainSealer struct{}

func (plainSealer) Seal(_ string, plain []byte) ([]byte, error)  { return plain, nil }
func (plainSealer) Open(_ string, sealed []byte) ([]byte, error) { return sealed, nil }

// bed is a member, a store, and a runner that syncs the one into the other.
type bed struct {
	*cluster
	store  *etcd.Store
	runner *registry.Runner
	member *registry.Member
	config kube.SourceConfig
	roots  atomic.Pointer[[]byte]
}

// joined starts a cluster and joins it as `mesh join cluster` does.
func joined(t *testing.T) *bed {
	t.Helper()
	b := &bed{cluster: startCluster(t)}
	roots := catest.New(t).Bundle().PEM()
	b.roots.Store(&roots)
	o := options()
	o.ClusterID = b.uid("kube-system")
	objects, err := kube.Manifests(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, object := range objects {
		b.apply(object)
	}
	api, err := kube.NewAPI(b.admin)
	if err != nil {
		t.Fatal(err)
	}
	keys, issuer, err := api.JWKS(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b.member = &registry.Member{
		Cluster:              federation.Cluster{ID: federation.ClusterID(o.ClusterID), Name: "east", Network: "n1", Role: federation.Primary, APIServer: b.url()},
		CertificateAuthority: b.admin.CAData, Issuer: issuer, IssuerKeys: keys,
	}
	b.newStore(t)
	if _, err := b.store.Join(t.Context(), b.member, b.tokens(t, time.Hour), false); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bed) tokens(t *testing.T, lifetime time.Duration) registry.Credentials {
	t.Helper()
	api, err := kube.NewAPI(b.admin)
	if err != nil {
		t.Fatal(err)
	}
	var c registry.Credentials
	if c.Reader, err = api.RequestToken(t.Context(), kube.Namespace, kube.ReaderAccount, lifetime); err != nil {
		t.Fatal(err)
	}
	if c.Writer, err = api.RequestToken(t.Context(), kube.Namespace, kube.WriterAccount, lifetime); err != nil {
		t.Fatal(err)
	}
	return c
}

func (b *bed) newStore(t *testing.T) {
	t.Helper()
	db, err := etcd.Open(t.Context(), etcd.DatabaseConfig{DataDir: t.TempDir(), Unsynced: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	b.store = etcd.New(etcd.StoreConfig{Client: db.Client(), Sealer: plainSealer{}, Sole: true})
	b.goRun(t, b.store.Run)
	<-b.store.Ready()
}

func (b *bed) goRun(t *testing.T, run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// sync runs a runner with the source of the member; stop ends it.
func (b *bed) sync(t *testing.T, change func(*kube.SourceConfig)) (stop func()) {
	t.Helper()
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	b.config = kube.SourceConfig{Store: b.store, ID: b.member.ID, Beat: 500 * time.Millisecond, Patience: time.Second, Discovery: 500 * time.Millisecond, Keys: time.Second, Log: log}
	if change != nil {
		change(&b.config)
	}
	b.runner = registry.NewRunner(registry.RunnerConfig{
		Store: b.store, Log: log,
		Cluster: func(m *registry.Member) registry.Source {
			config := b.config
			config.ID = m.ID
			return kube.NewSource(config)
		},
	})
	return b.goRun(t, b.runner.Run)
}

func (b *bed) sees(t *testing.T, what string, is func(s *federation.Snapshot) bool) *federation.Snapshot {
	t.Helper()
	return registrytest.Eventually(t, b.store, what, is)
}

func (b *bed) record(s *federation.Snapshot, namespace, name string) *federation.Record {
	for _, r := range s.Records[federation.ServiceName{Namespace: namespace, Name: name}] {
		return r
	}
	return nil
}

func (b *bed) seesCondition(t *testing.T, kind string, status bool, reason string) federation.Condition {
	t.Helper()
	var found federation.Condition
	b.sees(t, fmt.Sprintf("condition %s is %v (%s)", kind, status, reason), func(s *federation.Snapshot) bool {
		for _, c := range s.Clusters[b.member.ID].Conditions {
			if c.Type == kind && c.Status == status && (reason == "" || c.Reason == reason) {
				found = c
				return true
			}
		}
		return false
	})
	return found
}

func (b *bed) service(namespace, name string, change func(*corev1.Service)) {
	s := &corev1.Service{}
	s.TypeMeta, s.ObjectMeta = meta("Service", "v1", namespace, name, map[string]string{"app": name})
	s.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}}
	if change != nil {
		change(s)
	}
	b.apply(s)
}

// pod makes a pod that runs on a node, and returns its UID.
func (b *bed) pod(t *testing.T, namespace, name, ip string, labels map[string]string) types.UID {
	t.Helper()
	p := &corev1.Pod{}
	p.TypeMeta, p.ObjectMeta = meta("Pod", "v1", namespace, name, labels)
	p.Spec = corev1.PodSpec{NodeName: "node-1", ServiceAccountName: "cart", Containers: []corev1.Container{{Name: "app", Image: "app"}}}
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}
	b.apply(p)
	u, err := b.resource("Pod", namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return u.GetUID()
}

func (b *bed) slice(namespace, service, name string, endpoints ...discoveryv1.Endpoint) {
	s := &discoveryv1.EndpointSlice{}
	s.TypeMeta, s.ObjectMeta = meta("EndpointSlice", "discovery.k8s.io/v1", namespace, name, map[string]string{discoveryv1.LabelServiceName: service})
	s.AddressType = discoveryv1.AddressTypeIPv4
	if len(endpoints) > 0 && strings.Contains(endpoints[0].Addresses[0], ":") {
		s.AddressType = discoveryv1.AddressTypeIPv6
	}
	port, portName, tcp := int32(8080), "http", corev1.ProtocolTCP
	s.Ports = []discoveryv1.EndpointPort{{Name: &portName, Port: &port, Protocol: &tcp}}
	s.Endpoints = endpoints
	b.apply(s)
}

func endpoint(pod string, uid types.UID, ip string, ready bool) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{ip}, Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready}}
	if pod != "" {
		e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: pod, UID: uid}
	}
	return e
}

func (b *bed) shop(t *testing.T) types.UID {
	n := &corev1.Node{}
	n.TypeMeta, n.ObjectMeta = meta("Node", "v1", "", "node-1", map[string]string{"topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-1"})
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.10"}}
	b.apply(n)
	b.namespace("shop", nil)
	b.service("shop", "cart", nil)
	uid := b.pod(t, "shop", "cart-1", "10.244.0.5", map[string]string{"app": "cart", "version": "v1", kube.ProxyLabel: "sidecar"})
	b.slice("shop", "cart", "cart-abc", endpoint("cart-1", uid, "10.244.0.5", true))
	return uid
}

// TestSource tells one member's life, since a cluster takes seconds to start.
func TestSource(t *testing.T) {
	t.Parallel()
	b := joined(t)
	uid := b.shop(t)
	stop := b.sync(t, func(c *kube.SourceConfig) { c.Roots = func() []byte { return *b.roots.Load() } })

	s := b.sees(t, "the service is there with its endpoint", func(s *federation.Snapshot) bool {
		r := b.record(s, "shop", "cart")
		return r != nil && len(r.Endpoints) == 1
	})
	want := federation.Endpoint{
		Workload: "cart-1", UID: string(uid), Addresses: []netip.Addr{netip.MustParseAddr("10.244.0.5")}, TargetPorts: map[uint32]uint32{80: 8080},
		Health: federation.Ready, Network: "n1", Locality: federation.Locality{Region: "eu", Zone: "eu-1"}, ServiceAccount: "cart",
		Labels: map[string]string{"app": "cart", "version": "v1", kube.ProxyLabel: "sidecar"}, Mesh: true,
	}
	got := b.record(s, "shop", "cart").Endpoints[0]
	got.Labels = maps.Clone(got.Labels) // newer API servers add the node's topology to pods
	maps.DeleteFunc(got.Labels, func(k, _ string) bool { return strings.HasPrefix(k, "topology.kubernetes.io/") })
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("endpoint\n got %+v\nwant %+v", got, want)
	}
	if w := s.Workloads[federation.WorkloadKey{Source: b.member.Source(), UID: string(uid)}]; w == nil || w.Role != federation.Sidecar || w.ServiceAccount != "cart" {
		t.Errorf("workload: %+v", w)
	}
	b.seesCondition(t, federation.Reachable, true, "")
	b.seesCondition(t, federation.Synced, true, "")
	b.seesCondition(t, federation.SameCluster, true, "")
	b.seesCondition(t, federation.CredentialsValid, true, "")

	t.Run("the beacon comes back", func(t *testing.T) {
		b.eventually(t, "a lag is measured", func() bool {
			s := b.runner.Sources()[0].Status
			return !s.Beacon.IsZero() && s.Lag > 0 && s.Lag < time.Second && s.Version == "v1.36.3"
		})
	})
	t.Run("an endpoint that is not ready", func(t *testing.T) {
		b.slice("shop", "cart", "cart-abc", endpoint("cart-1", uid, "10.244.0.5", false))
		b.sees(t, "it is NotReady", func(s *federation.Snapshot) bool {
			return b.record(s, "shop", "cart").Endpoints[0].Health == federation.NotReady
		})
		b.slice("shop", "cart", "cart-abc", endpoint("cart-1", uid, "10.244.0.5", true))
		b.sees(t, "it is Ready", func(s *federation.Snapshot) bool {
			return b.record(s, "shop", "cart").Endpoints[0].Health == federation.Ready
		})
	})
	t.Run("nothing is written when nothing changed", func(t *testing.T) {
		n := b.revision(t)
		b.eventually(t, "two more beacons came back", b.beacons(2))
		if got := b.revision(t); got != n {
			t.Errorf("revision %d after %d", got, n)
		}
	})
	t.Run("injected namespaces get the roots", func(t *testing.T) { rootsAreKept(t, b) })
	t.Run("the cluster gets them too, where it serves the kind", func(t *testing.T) { trustBundleIsKept(t, b) })
	t.Run("kinds that are installed later are found", func(t *testing.T) { kindsAreFound(t, b) })
	t.Run("hostile objects do no harm", func(t *testing.T) { hostile(t, b) })
	t.Run("gateways", func(t *testing.T) { gateways(t, b) })
	t.Run("networks of pods and namespaces", func(t *testing.T) { networks(t, b) })
	t.Run("credentials are renewed", func(t *testing.T) { credentialsAreRenewed(t, b) })
	t.Run("an API server that is away", func(t *testing.T) { apiServerAway(t, b) })
	t.Run("a signing key that is rotated", func(t *testing.T) { keyRotated(t, b) })
	t.Run("a signing key that another cluster has", func(t *testing.T) { keyTaken(t, b) })
	stop()
	t.Run("a healthy takeover is no transition", func(t *testing.T) { takenOver(t, b) })
	t.Run("a kind that is forbidden after a restart", func(t *testing.T) { forbidden(t, b) })
	t.Run("credentials that have expired", func(t *testing.T) { expired(t, b) })
	t.Run("another cluster behind the address", func(t *testing.T) { anotherCluster(t, b) })
}

func takenOver(t *testing.T, b *bed) {
	condition := func() federation.Condition {
		conditions := b.store.Members()[b.member.ID].Conditions
		return conditions[slices.IndexFunc(conditions, func(c federation.Condition) bool { return c.Type == federation.Synced })]
	}
	b.eventually(t, "the member is in sync", func() bool { return condition().Status })
	before := condition()
	defer b.sync(t, nil)()
	b.eventually(t, "it is synced again", func() bool {
		s := b.runner.Sources()
		return len(s) == 1 && slices.ContainsFunc(s[0].Status.Conditions, func(c federation.Condition) bool { return c.Type == federation.Synced && c.Status })
	})
	b.eventually(t, "two more beacons came back", b.beacons(2))
	if after := condition(); !after.Since.Equal(before.Since) {
		t.Errorf("condition %+v, before %+v", after, before)
	}
}

func (b *bed) revision(t *testing.T) federation.Revision {
	t.Helper()
	return b.store.Health().Revision
}

// beacons is a condition that becomes true after so many more beacons.
func (b *bed) beacons(n int) func() bool {
	last, seen := time.Time{}, -1
	return func() bool {
		if s := b.runner.Sources(); len(s) == 1 && s[0].Status.Beacon.After(last) {
			last, seen = s[0].Status.Beacon, seen+1
		}
		return seen >= n
	}
}

// eventually polls what has no channel to wait on.
func (b *bed) eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.Now().Add(registrytest.Patience)
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not true: %s; sources: %+v", registrytest.Patience, what, b.runner.Sources())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func rootsAreKept(t *testing.T, b *bed) {
	b.namespace("later", nil)
	b.pod(t, "later", "web-1", "10.244.0.9", map[string]string{kube.ProxyLabel: "sidecar"})
	for _, ns := range []string{"shop", "later"} {
		b.eventually(t, "namespace "+ns+" has the roots", func() bool {
			u, err := b.resource("ConfigMap", ns).Get(t.Context(), kube.RootConfigMap, metav1.GetOptions{})
			if err != nil {
				return false
			}
			v, _, _ := unstructured.NestedString(u.Object, "data", "root-cert.pem")
			return v == string(*b.roots.Load())
		})
	}
	if _, err := b.resource("ConfigMap", "default").Get(t.Context(), kube.RootConfigMap, metav1.GetOptions{}); err == nil {
		t.Error("a namespace without injected pods has the roots")
	}
}

// trustBundleIsKept in a cluster that serves the kind: made, and brought back and up to date.
func trustBundleIsKept(t *testing.T, b *bed) {
	bundle := b.resource("ClusterTrustBundle", "")
	is := func() bool {
		u, err := bundle.Get(t.Context(), kube.RootTrustBundle, metav1.GetOptions{})
		if err != nil {
			return false
		}
		v, _, _ := unstructured.NestedString(u.Object, "spec", "trustBundle")
		return v == string(*b.roots.Load())
	}
	b.eventually(t, "the cluster has the roots", is)
	both := slices.Concat(*b.roots.Load(), catest.New(t).Bundle().PEM())
	b.roots.Store(&both)
	b.eventually(t, "the cluster has both roots", is)
}

func kindsAreFound(t *testing.T, b *bed) {
	crd := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": map[string]any{"name": "virtualservices.networking.istio.io"},
		"spec": map[string]any{
			"group": "networking.istio.io", "scope": "Namespaced",
			"names": map[string]any{"kind": "VirtualService", "plural": "virtualservices", "singular": "virtualservice", "listKind": "VirtualServiceList"},
			"versions": []any{map[string]any{"name": "v1", "served": true, "storage": true, "schema": map[string]any{
				"openAPIV3Schema": map[string]any{"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}},
		},
	}}
	b.apply(crd)
	vs := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": map[string]any{"namespace": "shop", "name": "cart"},
		"spec": map[string]any{"hosts": []any{"cart"}},
	}}
	b.eventually(t, "the kind is served", func() bool {
		_, err := b.resource("VirtualService", "shop").Apply(t.Context(), "cart", vs, metav1.ApplyOptions{FieldManager: "test", Force: true})
		return err == nil
	})
	s := b.sees(t, "the object is stored", func(s *federation.Snapshot) bool { return len(s.Objects) == 1 })
	o := s.Objects[0]
	if o.Kind != "VirtualService" || o.APIVersion != "networking.istio.io/v1" || !strings.Contains(string(o.Raw), `"hosts":["cart"]`) || strings.Contains(string(o.Raw), "managedFields") {
		t.Errorf("object: %+v %s", o, o.Raw)
	}
	b.delete("VirtualService", "shop", "cart")
	b.sees(t, "the object is gone", func(s *federation.Snapshot) bool { return len(s.Objects) == 0 })
}

func hostile(t *testing.T, b *bed) {
	b.service("shop", "huge", func(s *corev1.Service) {
		s.Annotations = map[string]string{"networking.istio.io/exportTo": strings.Repeat("x", 200_000)}
	})
	grpc := "grpc"
	b.service("shop", "contradiction", func(s *corev1.Service) {
		s.Spec.Ports = []corev1.ServicePort{{Name: "http-web", Port: 80, AppProtocol: &grpc}, {Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}}
	})
	b.service("shop", "selfish", nil)
	b.slice("shop", "selfish", "selfish-1", endpoint("", "", "10.1.1.1", true))
	b.slice("shop", "selfish", "selfish-2", endpoint("", "", "2001:db8::1", true), endpoint("", "", "2001:db8::2", true))
	b.service("shop", "large", nil)
	for i := range 5 {
		var list []discoveryv1.Endpoint
		for j := range 1000 {
			list = append(list, endpoint("", "", fmt.Sprintf("10.%d.%d.%d", 50+i, j>>8, j&255), true))
		}
		b.slice("shop", "large", fmt.Sprintf("large-%d", i), list...)
	}
	s := b.sees(t, "5,000 endpoints are there", func(s *federation.Snapshot) bool {
		r := b.record(s, "shop", "large")
		return r != nil && len(r.Endpoints) == 5000
	})
	if r := b.record(s, "shop", "contradiction"); r == nil || len(r.Ports) != 1 || r.Ports[0].Protocol != federation.GRPC {
		t.Errorf("contradiction: %+v", r)
	}
	if r := b.record(s, "shop", "huge"); r == nil || len(r.ExportTo) != 0 {
		t.Errorf("huge: %+v", r)
	}
	b.eventually(t, "there is one finding each", func() bool {
		var objects []string
		for _, f := range b.runner.Sources()[0].Findings {
			objects = append(objects, f.Object)
		}
		return slices.Equal(objects, []string{"Service shop/contradiction @ east", "Service shop/huge @ east", "Service shop/large @ east"})
	})
	for _, name := range []string{"huge", "contradiction", "selfish", "large"} {
		b.delete("Service", "shop", name)
	}
	b.sees(t, "they are gone", func(s *federation.Snapshot) bool {
		return b.record(s, "shop", "large") == nil && b.record(s, "shop", "huge") == nil
	})
	b.eventually(t, "so are the findings", func() bool { return len(b.runner.Sources()[0].Findings) == 0 })
}

func gateways(t *testing.T, b *bed) {
	b.sees(t, "the gateway waits for an address", func(s *federation.Snapshot) bool {
		g := s.Gateways["n1"]
		return len(g) == 1 && strings.Contains(g[0].Pending, "load balancer") && g[0].Ready == 0
	})
	b.seesCondition(t, federation.GatewayReady, false, "Pending")
	u, err := b.resource("Service", kube.Namespace).Get(t.Context(), kube.GatewayName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	unstructured.SetNestedSlice(u.Object, []any{map[string]any{"ip": "198.51.100.20"}}, "status", "loadBalancer", "ingress")
	if _, err := b.resource("Service", kube.Namespace).UpdateStatus(t.Context(), u, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.slice(kube.Namespace, kube.GatewayName, "gw-1", endpoint("", "", "10.244.0.77", true))
	b.sees(t, "the gateway has an address and a pod", func(s *federation.Snapshot) bool {
		g := s.Gateways["n1"]
		return len(g) == 1 && g[0].Pending == "" && g[0].Ready == 1 && slices.Equal(g[0].Addresses, []federation.GatewayAddress{{Host: "198.51.100.20", Port: 15443}})
	})
	b.seesCondition(t, federation.GatewayReady, true, "Ready")
}

func networks(t *testing.T, b *bed) {
	of := func(s *federation.Snapshot) federation.Network {
		return b.record(s, "shop", "cart").Endpoints[0].Network
	}
	b.namespace("shop", map[string]string{kube.NetworkLabel: "n2"})
	b.sees(t, "the namespace's network counts", func(s *federation.Snapshot) bool { return of(s) == "n2" })
	b.pod(t, "shop", "cart-1", "10.244.0.5", map[string]string{"app": "cart", kube.ProxyLabel: "sidecar", kube.NetworkLabel: "n3"})
	b.sees(t, "the pod's network counts more", func(s *federation.Snapshot) bool { return of(s) == "n3" })
	b.pod(t, "shop", "cart-1", "10.244.0.5", map[string]string{"app": "cart", "version": "v1", kube.ProxyLabel: "sidecar"})
	b.namespace("shop", nil)
	b.sees(t, "the cluster's network is back", func(s *federation.Snapshot) bool { return of(s) == "n1" })
}

func credentialsAreRenewed(t *testing.T, b *bed) {
	old, err := b.store.Credentials(t.Context(), b.member.ID)
	if err != nil {
		t.Fatal(err)
	}
	old.Reader.Issued = time.Now().Add(-24 * time.Hour) // as if it were two thirds through
	old.Writer.Issued = old.Reader.Issued
	if err := b.store.SetCredentials(t.Context(), b.member.ID, old); err != nil {
		t.Fatal(err)
	}
	b.eventually(t, "both are new and last longer", func() bool {
		c, err := b.store.Credentials(t.Context(), b.member.ID)
		return err == nil && c.Reader.Token != old.Reader.Token && c.Writer.Token != old.Writer.Token && c.Reader.Expires.After(old.Reader.Expires.Add(20*time.Hour))
	})
	b.service("shop", "renewed", nil)
	b.sees(t, "changes go on arriving", func(s *federation.Snapshot) bool { return b.record(s, "shop", "renewed") != nil })
}

func apiServerAway(t *testing.T, b *bed) {
	before := b.record(b.sees(t, "the service is there", func(s *federation.Snapshot) bool { return b.record(s, "shop", "cart") != nil }), "shop", "cart")
	b.stop()
	gone := time.Now()
	c := b.seesCondition(t, federation.Reachable, false, "NoConnection")
	t.Logf("noticed after %v", time.Since(gone).Round(time.Millisecond))
	if c.Since.Before(gone.Add(-time.Second)) || c.Message == "" {
		t.Errorf("condition: %+v", c)
	}
	s, _ := b.store.Snapshot()
	if b.record(s, "shop", "cart") != before {
		t.Error("the record changed while the API server was away")
	}
	b.start()
	back := time.Now()
	b.seesCondition(t, federation.Reachable, true, "")
	b.service("shop", "after", nil)
	b.sees(t, "changes arrive again", func(s *federation.Snapshot) bool { return b.record(s, "shop", "after") != nil })
	t.Logf("fresh again after %v", time.Since(back).Round(time.Millisecond))
}

func (b *bed) thumbprints(t *testing.T) []string {
	t.Helper()
	list, err := registry.KeyThumbprints(b.store.Members()[b.member.ID].IssuerKeys)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func keyRotated(t *testing.T, b *bed) {
	old := b.thumbprints(t)
	b.stop()
	b.writeKey("second.key")
	b.start()
	b.eventually(t, "both keys are registered", func() bool {
		now := b.thumbprints(t)
		return len(now) == 2 && slices.Contains(now, old[0])
	})
	b.stop()
	b.writeKey("third.key")
	b.keys = b.keys[:2] // the first one is not published any more
	b.start()
	// The reader's token was signed with it.
	if err := b.store.SetCredentials(t.Context(), b.member.ID, b.tokens(t, time.Hour)); err != nil {
		t.Fatal(err)
	}
	b.eventually(t, "the key that is not published any more is gone", func() bool {
		now := b.thumbprints(t)
		return len(now) == 2 && !slices.Contains(now, old[0])
	})
}

func keyTaken(t *testing.T, b *bed) {
	before := b.thumbprints(t)
	b.stop()
	public := b.writeKey("taken.key")
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: public, KeyID: "k", Use: "sig", Algorithm: "ES256"}}})
	if err != nil {
		t.Fatal(err)
	}
	other := registrytest.Member(t, "uid-other", "other")
	other.IssuerKeys = keys
	if _, err := b.store.Join(t.Context(), other, registrytest.Token("t"), false); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.eventually(t, "a finding names the other cluster", func() bool {
		for _, s := range b.runner.Sources() {
			for _, f := range s.Findings {
				if f.Code == "MESH1012" && strings.Contains(f.Message, `"other"`) {
					return true
				}
			}
		}
		return false
	})
	if now := b.thumbprints(t); !slices.Equal(now, before) {
		t.Errorf("keys %v became %v", before, now)
	}
	if err := b.store.Leave(t.Context(), other.ID); err != nil {
		t.Fatal(err)
	}
	b.eventually(t, "it is registered once nobody else has it", func() bool { return len(b.thumbprints(t)) == 3 })
	b.eventually(t, "the finding has gone", func() bool {
		s := b.runner.Sources()
		return len(s) == 1 && !slices.ContainsFunc(s[0].Findings, func(f federation.Finding) bool { return f.Code == "MESH1012" })
	})
}

func forbidden(t *testing.T, b *bed) {
	role, err := b.resource("ClusterRole", "").Get(t.Context(), kube.ReaderAccount, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	rules, _, _ := unstructured.NestedSlice(role.Object, "rules")
	kept := slices.DeleteFunc(slices.Clone(rules), func(r any) bool { return strings.Contains(fmt.Sprint(r), "endpointslices") })
	set := func(rules []any) {
		t.Helper()
		if err := unstructured.SetNestedSlice(role.Object, rules, "rules"); err != nil {
			t.Fatal(err)
		}
		if role, err = b.resource("ClusterRole", "").Update(t.Context(), role, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	set(kept)
	snapshot, _ := b.store.Snapshot()
	before := b.record(snapshot, "shop", "cart")
	stop := b.sync(t, nil)
	defer stop()
	c := b.seesCondition(t, federation.Synced, false, "Forbidden")
	if !strings.Contains(c.Message, "endpointslices") {
		t.Errorf("message %q does not name the kind", c.Message)
	}
	b.eventually(t, "a level was offered and stored", func() bool {
		s := b.runner.Sources()
		return len(s) == 1 && !s[0].Stored.IsZero()
	})
	snapshot, _ = b.store.Snapshot()
	if b.record(snapshot, "shop", "cart") != before || before == nil {
		t.Error("what is unknown was changed")
	}
	set(rules)
	b.seesCondition(t, federation.Synced, true, "")
}

func expired(t *testing.T, b *bed) {
	c := b.tokens(t, time.Hour)
	valid := c
	c.Reader.Token = "not.a.token"
	c.Reader.Expires = time.Now().Add(-time.Hour)
	if err := b.store.SetCredentials(t.Context(), b.member.ID, c); err != nil {
		t.Fatal(err)
	}
	stop := b.sync(t, nil)
	defer stop()
	condition := b.seesCondition(t, federation.CredentialsValid, false, "CredentialsExpired")
	if !strings.Contains(condition.Message, "mesh join cluster east") {
		t.Errorf("message %q does not name the command that mends it", condition.Message)
	}
	if err := b.store.SetCredentials(t.Context(), b.member.ID, valid); err != nil {
		t.Fatal(err)
	}
	b.seesCondition(t, federation.CredentialsValid, true, "")
	b.service("shop", "mended", nil)
	b.sees(t, "changes arrive again", func(s *federation.Snapshot) bool { return b.record(s, "shop", "mended") != nil })
}

func anotherCluster(t *testing.T, b *bed) {
	other := startCluster(t)
	other.namespace("shop", nil)
	err := b.store.UpdateMember(t.Context(), b.member.ID, func(m *registry.Member) error {
		m.APIServer, m.CertificateAuthority = other.url(), other.admin.CAData
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.store.SetCredentials(t.Context(), b.member.ID, registry.Credentials{Reader: registry.Credential{Token: "admin-token"}}); err != nil {
		t.Fatal(err)
	}
	before := b.record(b.sees(t, "the service is there", func(s *federation.Snapshot) bool { return b.record(s, "shop", "cart") != nil }), "shop", "cart")
	stop := b.sync(t, nil)
	defer stop()
	c := b.seesCondition(t, federation.SameCluster, false, "OtherCluster")
	if !strings.Contains(c.Message, other.uid("kube-system")) || !strings.Contains(c.Message, "--replace") {
		t.Errorf("message: %q", c.Message)
	}
	b.eventually(t, "the version was asked", func() bool { return b.runner.Sources()[0].Status.Version != "" })
	s, _ := b.store.Snapshot()
	if b.record(s, "shop", "cart") != before {
		t.Error("something was read from the other cluster")
	}
	if err := b.store.Leave(t.Context(), b.member.ID); err != nil {
		t.Fatal(err)
	}
	b.eventually(t, "the source ends when the member leaves", func() bool { return len(b.runner.Sources()) == 0 })
	if _, err := b.store.Credentials(t.Context(), b.member.ID); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("credentials: %v", err)
	}
}
