// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

func TestPortProtocol(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, app string
		port      int32
		want      federation.Protocol
		problem   bool
	}{
		{"http", "", 80, federation.HTTP, false},
		{"http-web", "", 80, federation.HTTP, false},
		{"HTTP2", "", 80, federation.HTTP2, false},
		{"grpc-web", "", 80, federation.GRPCWeb, false},
		{"grpc-web-api", "", 80, federation.GRPCWeb, false},
		{"grpc-website", "", 80, federation.GRPC, false},
		{"tls-x", "", 443, federation.TLS, false},
		{"mysql", "", 3306, federation.MySQL, false},
		{"", "", 3306, federation.TCP, false},
		{"web", "", 8080, federation.Unknown, false},
		{"", "kubernetes.io/h2c", 80, federation.HTTP2, false},
		{"", "kubernetes.io/ws", 80, federation.HTTP, false},
		{"", "kubernetes.io/wss", 80, federation.HTTPS, false},
		{"", "example.org/own", 80, federation.Unknown, false},
		{"http-x", "grpc", 80, federation.GRPC, true},
		{"web", "tcp", 80, federation.TCP, false},
	} {
		p := &corev1.ServicePort{Name: c.name, Port: c.port}
		if c.app != "" {
			p.AppProtocol = &c.app
		}
		got, problem := portProtocol(p)
		if got != c.want || (problem != "") != c.problem {
			t.Errorf("name %q, appProtocol %q, port %d: got %q (%s), want %q", c.name, c.app, c.port, got, problem, c.want)
		}
	}
}

func TestAddressesThatNoWorkloadHas(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "x", "127.0.0.1", "::1", "169.254.169.254", "fe80::1", "fe80::1%eth0", "::", "0.0.0.0", "224.0.0.1", "ff02::1", "::ffff:127.0.0.1", "10.0.0.1/8", strings.Repeat("1", 1000)} {
		if addr, err := validAddress(text); err == nil {
			t.Errorf("%q is taken for %s", text, addr)
		}
	}
	for text, want := range map[string]string{"10.0.0.1": "10.0.0.1", "::ffff:10.0.0.1": "10.0.0.1", "fd00::1": "fd00::1"} {
		if addr, err := validAddress(text); err != nil || addr.String() != want {
			t.Errorf("%q: got %s, %v", text, addr, err)
		}
	}
}

// member is caches that a test fills as reflectors would.
func member(t testing.TB, budget Budget) *caches {
	t.Helper()
	m := &registry.Member{Cluster: federation.Cluster{ID: "uid-1", Name: "east", Network: "n1"}}
	c := newCaches(m, budget, func() {})
	for _, replace := range []func([]any, string) error{c.services.Replace, c.slices.Replace, c.pods.Replace, c.nodes.Replace, c.namespaces.Replace} {
		if err := replace(nil, "1"); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func mustLevel(t *testing.T, c *caches) registry.Level {
	t.Helper()
	level, ok := c.level()
	if !ok {
		t.Fatal("no level, although every kind has arrived")
	}
	return level
}

func named(namespace, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "u", CreationTimestamp: metav1.NewTime(time.Unix(1, 0))}
}

func slice(name, service string, port int32, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: named("shop", name), Endpoints: endpoints}
	s.Labels = map[string]string{discoveryv1.LabelServiceName: service}
	portName := "http"
	s.Ports = []discoveryv1.EndpointPort{{Name: &portName, Port: &port}}
	return s
}

func at(pod, address string, conditions string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{address}}
	if pod != "" {
		e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: pod}
	}
	is := func(what string) *bool { b := strings.Contains(conditions, what); return &b }
	e.Conditions = discoveryv1.EndpointConditions{Ready: is("ready"), Serving: is("serving"), Terminating: is("terminating")}
	return e
}

func service(name string, change func(*corev1.ServiceSpec)) *corev1.Service {
	s := &corev1.Service{ObjectMeta: named("shop", name), Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}
	if change != nil {
		change(&s.Spec)
	}
	return s
}

func runningPod(name string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: named("shop", name)}
	p.UID = types.UID("uid-" + name)
	p.Labels = map[string]string{ProxyLabel: "sidecar"}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

func TestEndpointsOfAPod(t *testing.T) {
	t.Parallel()
	c := member(t, Budget{})
	c.services.Add(service("db", func(s *corev1.ServiceSpec) { s.ClusterIP = corev1.ClusterIPNone }))
	c.services.Add(service("open", func(s *corev1.ServiceSpec) { s.PublishNotReadyAddresses = true }))
	c.pods.Add(runningPod("db-0", "10.0.0.1", "fd00::1"))
	host := at("db-0", "fd00::1", "ready serving")
	name := "db-0"
	host.Hostname = &name
	c.slices.Add(slice("a", "db", 5432, host))
	c.slices.Add(slice("b", "db", 5432, at("db-0", "10.0.0.1", "ready serving"), at("gone", "10.0.0.9", "ready serving"), at("", "10.0.0.7", "terminating serving"), at("", "10.0.0.8", "terminating")))
	c.slices.Add(slice("c", "open", 80, at("db-0", "10.0.0.1", "ready")))
	level := mustLevel(t, c)
	db := level.Records[federation.ServiceName{Namespace: "shop", Name: "db"}]
	var got []string
	for _, e := range db.Endpoints {
		got = append(got, fmt.Sprintf("%s %v %s %v %s", e.Key(), e.Addresses, e.Health, e.TargetPorts, e.Hostname))
	}
	want := []string{
		"10.0.0.7 [10.0.0.7] Terminating map[80:5432] ", "10.0.0.8 [10.0.0.8] NotReady map[80:5432] ",
		"db-0 [10.0.0.1 fd00::1] Ready map[80:5432] db-0",
	}
	if db.Type != federation.Headless || !slices.Equal(got, want) {
		t.Errorf("%s\n got %q\nwant %q", db.Type, got, want)
	}
	c.pods.Delete(runningPod("db-0"))
	level = mustLevel(t, c)
	if n := len(level.Records[db.Name].Endpoints); n != 2 {
		t.Errorf("%d endpoints after the pod was deleted, want 2", n)
	}
	if len(level.Workloads) != 0 {
		t.Errorf("workloads: %v", level.Workloads)
	}
}

func TestUnchangedRecordsAreTheSamePointer(t *testing.T) {
	t.Parallel()
	c := member(t, Budget{})
	c.services.Add(service("a", nil))
	c.services.Add(service("b", nil))
	c.pods.Add(runningPod("p", "10.0.0.1"))
	first := mustLevel(t, c)
	c.services.Add(service("b", func(s *corev1.ServiceSpec) { s.Ports[0].Port = 81 }))
	c.changeAll()
	second := mustLevel(t, c)
	a, b := federation.ServiceName{Namespace: "shop", Name: "a"}, federation.ServiceName{Namespace: "shop", Name: "b"}
	if first.Records[a] != second.Records[a] || first.Records[b] == second.Records[b] {
		t.Error("a should be shared, b not")
	}
	for uid := range first.Workloads {
		if first.Workloads[uid] != second.Workloads[uid] {
			t.Error("the workload should be shared")
		}
	}
	if first.Records[b].Ports[0].Number != 80 {
		t.Error("a level that was handed over has changed")
	}
}

func TestBudgets(t *testing.T) {
	t.Parallel()
	c := member(t, Budget{Services: 3, EndpointsPerService: 4, LargeService: 2, Findings: 2})
	for i := range 6 {
		s := service(fmt.Sprintf("s%d", i), nil)
		s.CreationTimestamp = metav1.NewTime(time.Unix(int64(i), 0))
		c.services.Add(s)
	}
	var many []discoveryv1.Endpoint
	for i := range 9 {
		many = append(many, at("", fmt.Sprintf("10.0.0.%d", i+1), "ready serving"))
	}
	c.slices.Add(slice("x", "s0", 80, many...))
	c.slices.Add(slice("y", "s1", 80, many[:3]...))
	level := mustLevel(t, c)
	if len(level.Records) != 3 || level.Records[federation.ServiceName{Namespace: "shop", Name: "s0"}] == nil {
		t.Errorf("want the three oldest services, got %v", level.Records)
	}
	if n := len(level.Records[federation.ServiceName{Namespace: "shop", Name: "s0"}].Endpoints); n != 4 {
		t.Errorf("%d endpoints, want 4", n)
	}
	if len(level.Findings) != 3 || !strings.Contains(level.Findings[2].Message, "more findings") {
		t.Errorf("findings: %+v", level.Findings)
	}
	for i := range 4 {
		c.services.Delete(service(fmt.Sprintf("s%d", i), nil))
	}
	if level = mustLevel(t, c); len(level.Records) != 2 || len(level.Findings) != 0 {
		t.Errorf("those that were left out come when there is room: %v %v", level.Records, level.Findings)
	}
}

func TestGatewaysFromServices(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		change  func(*corev1.Service)
		static  []string
		want    string // addresses
		pending string
	}{
		{"waits for its load balancer", nil, nil, "[]", "load balancer"},
		{"address of the load balancer", func(s *corev1.Service) {
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}, {Hostname: "gw.example"}}
		}, nil, "[{192.0.2.1 15443} {gw.example 15443}]", ""},
		{"annotation", func(s *corev1.Service) {
			s.Annotations = map[string]string{GatewayAddress: "gw.example:443, 192.0.2.9"}
		}, nil, "[{192.0.2.9 15443} {gw.example 443}]", ""},
		{"node port", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort; s.Spec.Ports[0].NodePort = 31443 }, nil, "[{198.51.100.1 31443}]", ""},
		{"cluster IP", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeClusterIP }, nil, "[]", "want type"},
		{"no port", func(s *corev1.Service) { s.Spec.Ports[0] = corev1.ServicePort{Name: "x", Port: 1} }, nil, "[]", "no port 15443"},
		{"registration", nil, []string{"203.0.113.5:15443"}, "[{203.0.113.5 15443}]", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := member(t, Budget{})
			m.member.GatewayAddresses = c.static
			s := service("gw", func(spec *corev1.ServiceSpec) {
				spec.Type = corev1.ServiceTypeLoadBalancer
				spec.Ports = []corev1.ServicePort{{Name: "tls", Port: 15443}}
			})
			s.Labels = map[string]string{GatewayLabel: "eastwest"}
			if c.change != nil {
				c.change(s)
			}
			m.services.Add(s)
			m.nodes.Add(&corev1.Node{ObjectMeta: named("", "node"), Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: "10.9.9.9"}, {Type: corev1.NodeExternalIP, Address: "198.51.100.1"}}}})
			e, node := at("gw-1", "10.0.0.1", "ready serving"), "node"
			e.NodeName = &node
			m.pods.Add(runningPod("gw-1", "10.0.0.1"))
			m.slices.Add(slice("gw", "gw", 15443, e))
			g := mustLevel(t, m).Gateways["shop/gw"]
			if g == nil || fmt.Sprint(g.Addresses) != c.want || g.Ready != 1 || g.Network != "n1" ||
				(c.pending == "") != (g.Pending == "") || !strings.Contains(g.Pending, c.pending) {
				t.Errorf("got %+v, want %s %q", g, c.want, c.pending)
			}
		})
	}
}

// A pod with Istio's proxy is called with the mesh's certificates only where they are also
// its own: where the cluster opted in.
func TestIstioProxiesCountWhereTheClusterOptedIn(t *testing.T) {
	t.Parallel()
	c := member(t, Budget{})
	labelled := func(name, key, value string) *corev1.Pod {
		p := runningPod(name, "10.0.0."+name[len(name)-1:])
		p.Labels = map[string]string{key: value}
		return p
	}
	c.pods.Add(labelled("istio-1", tlsModeLabel, "istio"))
	c.pods.Add(labelled("gw-2", istioGatewayLabel, "eastwestgateway"))
	c.pods.Add(labelled("plain-3", "app", "plain"))
	c.pods.Add(runningPod("own-4", "10.0.0.4"))
	c.services.Add(service("web", nil))
	c.slices.Add(slice("web", "web", 80, at("istio-1", "10.0.0.1", "ready serving"), at("own-4", "10.0.0.4", "ready serving")))
	gateway := service("gw", func(s *corev1.ServiceSpec) { s.Ports = []corev1.ServicePort{{Name: "tls", Port: 15443}} })
	gateway.Labels = map[string]string{istioGatewayLabel: "eastwestgateway"}
	c.services.Add(gateway)

	says := func(level registry.Level) string {
		var mesh, workloads []string
		for _, e := range level.Records[federation.ServiceName{Namespace: "shop", Name: "web"}].Endpoints {
			mesh = append(mesh, fmt.Sprintf("%s:%v", e.Workload, e.Mesh))
		}
		for _, w := range level.Workloads {
			workloads = append(workloads, w.Name)
		}
		slices.Sort(workloads)
		return fmt.Sprintf("%v %v gateways:%d", mesh, workloads, len(level.Gateways))
	}
	level := mustLevel(t, c)
	if got, want := says(level), "[istio-1:false own-4:true] [own-4] gateways:0"; got != want {
		t.Errorf("without the flag\n got %s\nwant %s", got, want)
	}
	if !level.Records[federation.ServiceName{Namespace: "shop", Name: "gw"}].ClusterLocal {
		t.Error("Istio's gateway is a service of other clusters")
	}
	if f := level.Findings; len(f) != 1 || f[0].Code != codeIstio || !strings.Contains(f[0].Message, "2 pods, for example shop/gw-2") || !strings.Contains(f[0].Message, "--allow-istio-ca") {
		t.Errorf("findings: %+v", f)
	}

	opted := *c.member
	opted.AllowIstioCA = true
	c.setMember(&opted)
	level = mustLevel(t, c)
	if got, want := says(level), "[istio-1:true own-4:true] [gw-2 istio-1 own-4] gateways:1"; got != want {
		t.Errorf("with the flag\n got %s\nwant %s", got, want)
	}
	if len(level.Findings) != 0 {
		t.Errorf("findings: %+v", level.Findings)
	}

	out := *c.member
	out.AllowIstioCA = false
	c.setMember(&out)
	c.pods.Delete(labelled("gw-2", istioGatewayLabel, "eastwestgateway"))
	level = mustLevel(t, c)
	if got, want := says(level), "[istio-1:false own-4:true] [own-4] gateways:0"; got != want {
		t.Errorf("without the flag again\n got %s\nwant %s", got, want)
	}
	if f := level.Findings; len(f) != 1 || !strings.Contains(f[0].Message, "1 pods, for example shop/istio-1") {
		t.Errorf("findings: %+v", f)
	}
}

// What is stored already is the same pointer in the first level, so that it is not in
// memory twice after a restart.
func TestFirstLevelSharesWhatIsStored(t *testing.T) {
	t.Parallel()
	fill := func(c *caches) {
		c.services.Add(service("a", nil))
		c.services.Add(service("b", nil))
		c.pods.Add(runningPod("p", "10.0.0.1"))
		c.slices.Add(slice("a", "a", 80, at("p", "10.0.0.1", "ready serving")))
	}
	before := member(t, Budget{})
	fill(before)
	stored := mustLevel(t, before)
	snapshot := &federation.Snapshot{Records: map[federation.ServiceName][]*federation.Record{}, Workloads: map[federation.WorkloadKey]*federation.Workload{}}
	for name, r := range stored.Records {
		snapshot.Records[name] = []*federation.Record{{Source: "kube:other", Name: name}, r}
	}
	for uid, w := range stored.Workloads {
		snapshot.Workloads[federation.WorkloadKey{Source: w.Source, UID: uid}] = w
	}
	snapshot.Records[federation.ServiceName{Namespace: "shop", Name: "gone"}] = []*federation.Record{{Source: before.source}}
	snapshot.Workloads[federation.WorkloadKey{Source: before.source, UID: "gone"}] = &federation.Workload{UID: "gone"}

	c := member(t, Budget{})
	c.know(snapshot)
	fill(c)
	c.services.Add(service("b", func(s *corev1.ServiceSpec) { s.Ports[0].Port = 81 }))
	level := mustLevel(t, c)
	a, b := federation.ServiceName{Namespace: "shop", Name: "a"}, federation.ServiceName{Namespace: "shop", Name: "b"}
	if len(level.Records) != 2 || level.Records[a] != stored.Records[a] || level.Records[b] == stored.Records[b] {
		t.Errorf("want a as it is stored, b anew, and no other: %v", level.Records)
	}
	if len(level.Workloads) != 1 || level.Workloads["uid-p"] != stored.Workloads["uid-p"] {
		t.Errorf("want the stored workload: %v", level.Workloads)
	}
}

func TestRemoteSecret(t *testing.T) {
	t.Parallel()
	secret := func(user, cluster string) []byte {
		return []byte(`apiVersion: v1
kind: Secret
metadata: {name: istio-remote-secret-west, namespace: istio-system, labels: {istio/multiCluster: "true"}}
stringData:
  west: |
    apiVersion: v1
    kind: Config
    clusters: [{name: west, cluster: {` + cluster + `}}]
    contexts: [{name: west, context: {cluster: west, user: west}}]
    current-context: west
    users: [{name: west, user: {` + user + `}}]
`)
	}
	m, c, err := ParseRemoteSecret(secret("token: abc", "server: https://192.0.2.1:6443, certificate-authority-data: UEVN"))
	if err != nil || m.Name != "west" || m.APIServer != "https://192.0.2.1:6443" || string(m.CertificateAuthority) != "PEM" || c.Token != "abc" {
		t.Errorf("got %+v %+v, %v", m, c.Token, err)
	}
	for why, s := range map[string][]byte{
		"runs a program":    secret("exec: {command: sh, apiVersion: client.authentication.k8s.io/v1}", "server: https://x"),
		"reads a file":      secret("tokenFile: /etc/shadow", "server: https://x"),
		"reads a key":       secret("client-key: /etc/shadow, token: a", "server: https://x"),
		"reads a CA":        secret("token: a", "server: https://x, certificate-authority: /etc/passwd"),
		"trusts anybody":    secret("token: a", "server: https://x, insecure-skip-tls-verify: true"),
		"has no credential": secret("username: x", "server: https://x"),
		"is no Secret":      []byte("apiVersion: v1\nkind: ConfigMap\n"),
		"is nothing":        nil,
	} {
		if _, _, err := ParseRemoteSecret(s); err == nil {
			t.Errorf("one that %s is accepted", why)
		}
	}
}

func TestCredentialsAreRenewedAfterAThird(t *testing.T) {
	t.Parallel()
	start := time.Unix(1000, 0)
	at, ok := renewAt(registry.Credential{Token: "t", Issued: start, Expires: start.Add(24 * time.Hour)})
	if !ok || !at.Equal(start.Add(8*time.Hour)) {
		t.Errorf("renew at %v, want after 8 h", at.Sub(start))
	}
	for _, c := range []registry.Credential{{Token: "t"}, {ClientCertificate: []byte("x"), Expires: start}} {
		if _, ok := renewAt(c); ok {
			t.Errorf("%v has nothing to renew", c)
		}
	}
}

// FuzzObjects gives whatever decodes as an object of Kubernetes to the caches: levels must
// come out, and what they hold must be within bounds.
func FuzzObjects(f *testing.F) {
	for _, o := range []any{service("a", nil), slice("x", "a", 80, at("p", "10.0.0.1", "ready")), runningPod("p", "10.0.0.1"), &corev1.Node{}, &corev1.Namespace{}} {
		data, err := json.Marshal(o)
		if err != nil {
			f.Fatal(err)
		}
		for kind := range 6 {
			f.Add(kind, data)
		}
	}
	f.Fuzz(func(t *testing.T, kind int, data []byte) {
		c := member(t, Budget{})
		c.services.Add(service("a", nil))
		c.pods.Add(runningPod("p", "10.0.0.1"))
		var add func(any) error
		var into any
		switch kind % 6 {
		case 0:
			add, into = c.services.Add, &corev1.Service{}
		case 1:
			add, into = c.slices.Add, &discoveryv1.EndpointSlice{}
		case 2:
			add, into = c.pods.Add, &corev1.Pod{}
		case 3:
			add, into = c.nodes.Add, &corev1.Node{}
		case 4:
			add, into = c.namespaces.Add, &corev1.Namespace{}
		default:
			table, _ := c.config("K.example.org", "K")
			table.Replace(nil, "1")
			add, into = table.Add, &unstructured.Unstructured{}
		}
		if json.Unmarshal(data, into) != nil || add(into) != nil {
			return
		}
		level, ok := c.level()
		if !ok {
			t.Fatal("one object stops the whole cluster")
		}
		for _, r := range level.Records {
			for _, p := range r.Ports {
				if p.Number == 0 || p.Number > 65535 {
					t.Errorf("port %d", p.Number)
				}
			}
			for _, e := range r.Endpoints {
				if len(e.Addresses) == 0 || e.Addresses[0].IsLoopback() {
					t.Errorf("endpoint %+v", e)
				}
			}
		}
	})
}

func FuzzRemoteSecret(f *testing.F) {
	f.Add([]byte("apiVersion: v1\nkind: Secret\nstringData: {a: 'kind: Config'}\n"))
	f.Fuzz(func(t *testing.T, data []byte) { ParseRemoteSecret(data) })
}

func FuzzGatewayAddresses(f *testing.F) {
	f.Add("a:1, [::1]:2, b")
	f.Fuzz(func(t *testing.T, list string) {
		addresses, _ := parseAddresses(list)
		for _, a := range addresses {
			if a.Port == 0 || a.Port > 65535 || strings.ContainsAny(a.Host, " /@") {
				t.Errorf("%q gave %+v", list, a)
			}
		}
	})
}
