// SPDX-License-Identifier: Apache-2.0

package config_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
	"google.golang.org/protobuf/proto"
)

const toCart = "{hosts: [cart], http: [{route: [{destination: {host: cart}}]}]}"

func TestMutualTLS(t *testing.T) {
	t.Parallel()
	tests := []struct {
		story   string
		objects string
		who     string // namespace and labels
		port    uint32
		want    string
	}{
		{"nobody says anything", "", "shop app=cart", 8080, Permissive},
		{"the mesh says it", peer("istio-system", "default", "{mtls: {mode: STRICT}}"), "shop app=cart", 8080, Strict},
		{"the namespace knows better",
			docs(peer("istio-system", "default", "{mtls: {mode: STRICT}}"), peer("shop", "default", "{mtls: {mode: DISABLE}}")),
			"shop app=cart", 8080, Disable},
		{"another namespace does not care",
			docs(peer("istio-system", "default", "{mtls: {mode: STRICT}}"), peer("shop", "default", "{mtls: {mode: DISABLE}}")),
			"pay app=cart", 8080, Strict},
		{"unset means inherited",
			docs(peer("istio-system", "default", "{mtls: {mode: STRICT}}"), peer("shop", "default", "{mtls: {mode: UNSET}}"),
				peer("shop", "cart", "{selector: {matchLabels: {app: cart}}, mtls: {}}")),
			"shop app=cart", 8080, Strict},
		{"the workload knows best",
			docs(peer("shop", "default", "{mtls: {mode: STRICT}}"), peer("shop", "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: PERMISSIVE}}")),
			"shop app=cart", 8080, Permissive},
		{"but for the port",
			peer("shop", "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}}"),
			"shop app=cart", 8080, Disable},
		{"which inherits where unset",
			peer("shop", "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: UNSET}}}"),
			"shop app=cart", 8080, Strict},
		{"other workloads are not meant",
			peer("shop", "cart", "{selector: {matchLabels: {app: cart}}, mtls: {mode: STRICT}}"), "shop app=pay", 8080, Permissive},
		{"the older of two wins",
			docs(peer("shop", "b", "{mtls: {mode: STRICT}}"), peer("shop", "a", "{mtls: {mode: DISABLE}}")), "shop app=cart", 8080, Strict},
		{"old versions of the API are the same",
			strings.Replace(peer("shop", "a", "{mtls: {mode: STRICT}}"), "/v1", "/v1beta1", 1), "shop ", 8080, Strict},
		{"a remote says so in vain", "# from far\n" + peer("istio-system", "default", "{mtls: {mode: STRICT}}"), "shop app=cart", 8080, Permissive},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			ns, l, _ := strings.Cut(tt.who, " ")
			if got := New(story(t, tt.objects)).MutualTLS(ns, labels(l), tt.port); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
}

func TestDestinationRule(t *testing.T) {
	t.Parallel()
	const full = "cart.shop.svc.cluster.local"
	tests := []struct {
		story   string
		objects string
		client  string // namespace and labels
		want    string // name of the rule
	}{
		{"none", "", "web ", ""},
		{"of the service's namespace, by short name", rule("shop", "a", "{host: cart}"), "web ", "shop/a"},
		{"a short name means the rule's own namespace", rule("web", "a", "{host: cart}"), "web ", ""},
		{"the client's comes first", docs(rule("shop", "a", "{host: cart}"), rule("web", "b", "{host: "+full+"}")), "web ", "web/b"},
		{"the root namespace's last", docs(rule("istio-system", "all", `{host: "*.local"}`), rule("shop", "a", "{host: cart}")), "web ", "shop/a"},
		{"but before nothing", rule("istio-system", "all", `{host: "*.local"}`), "web ", "istio-system/all"},
		{"for the workloads of the root namespace too", docs(rule("istio-system", "all", `{host: "*.local"}`), rule("shop", "a", "{host: cart}")), "istio-system ", "shop/a"},
		{"unless it is private", docs(rule("istio-system", "own", `{host: "*.local", exportTo: ["."]}`), rule("shop", "a", "{host: cart}")), "istio-system ", "istio-system/own"},
		{"a third namespace's does not count", rule("pay", "a", "{host: "+full+"}"), "web ", ""},
		{"nor one that is not exported", rule("shop", "a", `{host: cart, exportTo: ["."]}`), "web ", ""},
		{"one that is, by name", rule("shop", "a", `{host: cart, exportTo: [web]}`), "web ", "shop/a"},
		{"a name beats a wildcard", docs(rule("shop", "w", `{host: "*.shop.svc.cluster.local"}`), rule("shop", "a", "{host: cart}")), "web ", "shop/a"},
		{"a longer wildcard a shorter", docs(rule("shop", "w", `{host: "*.local"}`), rule("shop", "v", `{host: "*.shop.svc.cluster.local"}`)), "web ", "shop/v"},
		{"one for my workload comes first", docs(rule("web", "a", "{host: "+full+"}"), rule("web", "b", "{host: "+full+", workloadSelector: {matchLabels: {app: x}}}")), "web app=x", "web/b"},
		{"and is not for others", docs(rule("web", "a", "{host: "+full+"}"), rule("web", "b", "{host: "+full+", workloadSelector: {matchLabels: {app: x}}}")), "web app=y", "web/a"},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			ns, l, _ := strings.Cut(tt.client, " ")
			_, id := New(story(t, tt.objects)).DestinationRule(ns, labels(l), service("shop/cart"))
			if got := strings.TrimPrefix(short(id), "DestinationRule "); got != tt.want {
				t.Errorf("rule %q, want %q", got, tt.want)
			}
		})
	}
}

func TestDestinationRulesOfOneHostMerge(t *testing.T) {
	t.Parallel()
	s := story(t, docs(
		rule("shop", "a", "{host: cart, subsets: [{name: v1, labels: {version: v1}}]}"),
		rule("shop", "b", "{host: cart.shop.svc.cluster.local, trafficPolicy: {loadBalancer: {simple: RANDOM}}, subsets: [{name: v1, labels: {version: other}}, {name: v2, labels: {version: v2}}]}")))
	first := New(s)
	r, _ := first.DestinationRule("web", nil, service("shop/cart"))
	if len(r.Subsets) != 2 || r.Subsets[0].Labels["version"] != "v1" || r.TrafficPolicy == nil {
		t.Errorf("merged: %v", r)
	}
	s.Objects = append(slices.Clone(s.Objects), object(t, peer("shop", "x", "{}")))
	if again, _ := NewFrom(first, s).DestinationRule("web", nil, service("shop/cart")); again != r {
		t.Error("merged again although nothing changed")
	}
}

func TestVirtualService(t *testing.T) {
	t.Parallel()
	tests := []struct {
		story   string
		objects string
		client  string
		host    string
		want    string
	}{
		{"by short name", routes("shop", "a", toCart), "web ", "cart.shop.svc.cluster.local", "shop/a"},
		{"for gateways only: none", routes("shop", "a", "{hosts: [cart], gateways: [ingress], http: [{route: [{destination: {host: cart}}]}]}"), "web ", "cart.shop.svc.cluster.local", ""},
		{"for both", routes("shop", "a", "{hosts: [cart], gateways: [ingress, mesh], http: [{route: [{destination: {host: cart}}]}]}"), "web ", "cart.shop.svc.cluster.local", "shop/a"},
		{"not exported", routes("shop", "a", `{hosts: [cart], exportTo: ["."], http: [{route: [{destination: {host: cart}}]}]}`), "web ", "cart.shop.svc.cluster.local", ""},
		{"the older of two", docs(routes("shop", "b", toCart), routes("shop", "a", toCart)), "web ", "cart.shop.svc.cluster.local", "shop/b"},
		{"a private one before a public one", docs(routes("shop", "b", toCart),
			routes("web", "own", `{hosts: [cart.shop.svc.cluster.local], exportTo: ["."], http: [{route: [{destination: {host: v2}}]}]}`)), "web ", "cart.shop.svc.cluster.local", "web/own"},
		{"a name before a wildcard", docs(routes("shop", "w", `{hosts: ["*.local"], http: [{route: [{destination: {host: cart}}]}]}`), routes("shop", "a", toCart)), "web ", "cart.shop.svc.cluster.local", "shop/a"},
		{"a wildcard for the rest", docs(routes("shop", "w", `{hosts: ["*.local"], http: [{route: [{destination: {host: cart}}]}]}`), routes("shop", "a", toCart)), "web ", "pay.shop.svc.cluster.local", "shop/w"},
		{"not what the Sidecar does not import", docs(routes("shop", "a", toCart), sidecar("web", "s", "{egress: [{hosts: [./*]}]}")), "web ", "cart.shop.svc.cluster.local", ""},
		{"outside services too", routes("shop", "a", "{hosts: [api.example.com], http: [{route: [{destination: {host: cart}}]}]}"), "web ", "api.example.com", "shop/a"},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			ns, l, _ := strings.Cut(tt.client, " ")
			_, id := New(story(t, tt.objects)).VirtualService(ns, labels(l), tt.host)
			if got := strings.TrimPrefix(short(id), "VirtualService "); got != tt.want {
				t.Errorf("routes %q, want %q", got, tt.want)
			}
		})
	}
}

func TestVirtualServiceForSidecars(t *testing.T) {
	t.Parallel()
	x := New(story(t, `
		apiVersion: networking.istio.io/v1alpha3
		kind: VirtualService
		metadata: {namespace: shop, name: cart}
		spec:
			hosts: [cart]
			gateways: [mesh, ingress]
			http:
			- match:
				- {uri: {prefix: /admin}, gateways: [ingress]}
				route: [{destination: {host: admin}}]
			- match:
				- {uri: {exact: /v2}, sourceLabels: {tier: beta}}
				- {uri: {regex: "/v2/.*"}, gateways: [ingress]}
				route:
				- {destination: {host: cart, subset: v2, port: {number: 80}}, weight: 90}
				- {destination: {host: cart.other.svc.cluster.local}, weight: 10}
				timeout: 1m
				retries: {attempts: 3, perTryTimeout: 500ms}
			- route: [{destination: {host: cart}}]
	`))
	v, id := x.VirtualService("web", nil, "cart.shop.svc.cluster.local")
	if id != "VirtualService shop/cart @ kube:one" || len(v.GetHttp()) != 2 {
		t.Fatalf("%s: %v; %v", id, v, x.Findings())
	}
	r := v.Http[0]
	if len(r.Match) != 1 || r.Route[0].Destination.Host != "cart.shop.svc.cluster.local" || r.Route[1].Destination.Host != "cart.other.svc.cluster.local" {
		t.Errorf("first route: %v", r)
	}
	if r.Timeout.AsDuration() != time.Minute || r.Retries.PerTryTimeout.AsDuration() != 500*time.Millisecond || r.Route[0].Weight != 90 {
		t.Errorf("first route: %v", r)
	}
	if got := x.SelectorKeys(); !slices.Equal(got, []string{"tier"}) {
		t.Errorf("selector keys %q", got)
	}
}

func TestSidecar(t *testing.T) {
	t.Parallel()
	tests := []struct {
		story   string
		objects string
		client  string
		service string
		want    bool
	}{
		{"without one all are imported", "", "web ", "shop/cart", true},
		{"the own namespace", sidecar("web", "s", `{egress: [{hosts: ["./*"]}]}`), "web ", "web/front", true},
		{"and no other", sidecar("web", "s", `{egress: [{hosts: ["./*"]}]}`), "web ", "shop/cart", false},
		{"a namespace by name", sidecar("web", "s", `{egress: [{hosts: ["shop/*"]}]}`), "web ", "shop/cart", true},
		{"a host by name", sidecar("web", "s", `{egress: [{hosts: ["*/cart.shop.svc.cluster.local"]}]}`), "web ", "shop/pay", false},
		{"nothing", sidecar("web", "s", `{egress: [{hosts: ["~/*"]}]}`), "web ", "web/front", false},
		{"all but one", sidecar("web", "s", `{egress: [{hosts: ["*/*", "~shop/pay.shop.svc.cluster.local"]}]}`), "web ", "shop/pay", false},
		{"which is not the other", sidecar("web", "s", `{egress: [{hosts: ["*/*", "~shop/pay.shop.svc.cluster.local"]}]}`), "web ", "shop/cart", true},
		{"the selector's comes first", docs(sidecar("web", "s", `{egress: [{hosts: ["./*"]}]}`),
			sidecar("web", "x", `{workloadSelector: {labels: {app: x}}, egress: [{hosts: ["shop/*"]}]}`)), "web app=x", "shop/cart", true},
		{"the root's is for who has none", sidecar("istio-system", "s", `{egress: [{hosts: ["./*"]}]}`), "web ", "shop/cart", false},
		{"where . is the client's namespace", sidecar("istio-system", "s", `{egress: [{hosts: ["./*"]}]}`), "web ", "web/front", true},
		{"without egress all are imported", sidecar("web", "s", `{outboundTrafficPolicy: {mode: REGISTRY_ONLY}}`), "web ", "shop/cart", true},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			ns, l, _ := strings.Cut(tt.client, " ")
			if got := New(story(t, tt.objects)).Imports(ns, labels(l), service(tt.service), 0); got != tt.want {
				t.Errorf("imports %s: %t", tt.service, got)
			}
		})
	}
}

func TestRegistryOnly(t *testing.T) {
	t.Parallel()
	for spec, want := range map[string]bool{
		"{}":                          false,
		"{outboundTrafficPolicy: {}}": true, // the zero of Istio's API
		"{outboundTrafficPolicy: {mode: ALLOW_ANY}}":     false,
		"{outboundTrafficPolicy: {mode: REGISTRY_ONLY}}": true,
	} {
		if got := New(story(t, sidecar("web", "s", spec))).RegistryOnly("web", nil); got != want {
			t.Errorf("%s: %t", spec, got)
		}
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	tests := []struct {
		story   string
		objects string
		want    []string // "state: words" of each object in order
		codes   string
	}{
		{"all is well", routes("shop", "a", toCart), []string{"Active"}, ""},
		{"a remote's", "# from far\n" + routes("shop", "a", toCart), []string{"IgnoredOnRemote"}, CodeIgnored},
		{"a kind that comes later", "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {namespace: shop, name: x}\nspec: {hosts: [example.com]}\n",
			[]string{"NotYetTranslated"}, CodeNotTranslated},
		{"Gateway API, as it is", "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {namespace: shop, name: x}\nspec: {rules: [{backendRefs: [{name: cart, port: 80}]}], colour: red}\n",
			[]string{"NotYetTranslated UnknownField: spec.colour"}, CodeNotTranslated},
		{"Multi-Cluster Services", "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {namespace: shop, name: x}\n",
			[]string{"NotYetTranslated"}, CodeNotTranslated},
		{"a kind that nobody knows", "apiVersion: example.com/v1\nkind: Wish\nmetadata: {namespace: shop, name: x}\n", []string{"UnknownKind"}, CodeInvalid},
		{"a version that nobody knows", "apiVersion: networking.istio.io/v9\nkind: VirtualService\nmetadata: {namespace: shop, name: x}\n", []string{"UnknownKind"}, CodeInvalid},
		{"fields that come later are named", routes("shop", "a", "{hosts: [cart], http: [{fault: {abort: {httpStatus: 503, percentage: {value: 1}}}, route: [{destination: {host: cart}}]}], tcp: [{route: [{destination: {host: cart}}]}]}"),
			[]string{"Active NotYetTranslated: spec.http[0].fault NotYetTranslated: spec.tcp"}, CodeNotTranslated},
		{"so are those that nobody knows", routes("shop", "a", "{hosts: [cart], http: [{rout: [], route: [{destination: {host: cart, zone: x}}]}]}"),
			[]string{"Active UnknownField: spec.http[0].rout UnknownField: spec.http[0].route[0].destination.zone"}, CodeNotTranslated},
		{"deep ones of a rule", rule("shop", "a", "{host: cart, trafficPolicy: {connectionPool: {tcp: {maxConnections: 3, idleTimeout: 3s}}}, subsets: [{name: v1, trafficPolicy: {tunnel: {targetHost: x, targetPort: 1}}}]}"),
			[]string{"Active NotYetTranslated: spec.subsets[0].trafficPolicy.tunnel NotYetTranslated: spec.trafficPolicy.connectionPool.tcp.idleTimeout"}, CodeNotTranslated},
		{"a value of the wrong type", routes("shop", "a", "{hosts: [cart], http: [{timeout: soon, route: [{destination: {host: cart}, weight: many}]}]}"),
			[]string{`Invalid invalid object: VirtualService shop/a @ kube:one: spec.http[0].route[0].weight: "many", want a number (int32); spec.http[0].timeout: "soon", want a duration such as "1.5s"`}, CodeInvalid},
		{"a mode that is none", peer("shop", "a", "{mtls: {mode: STRICTLY}}"),
			[]string{`Invalid invalid object: PeerAuthentication shop/a @ kube:one: spec.mtls.mode: "STRICTLY", want one of UNSET, DISABLE, PERMISSIVE, STRICT`}, CodeInvalid},
		{"a route without an action", routes("shop", "a", "{hosts: [cart], http: [{match: [{uri: {regex: '('}}]}]}"),
			[]string{"Invalid invalid object: VirtualService shop/a @ kube:one: spec.http[0]: 0 actions, want exactly one of route, redirect, directResponse, delegate; spec.http[0].match[0].uri.regex: \"(\", want an RE2 expression: error parsing regexp: missing closing ): `(`"}, CodeInvalid},
		{"the same in two primaries", docs(routes("shop", "a", toCart), "# from two\n"+routes("shop", "a", toCart)), []string{"Active", "Active"}, ""},
		{"not quite the same", docs(routes("shop", "a", toCart), "# from two\n"+routes("shop", "a", "{hosts: [cart], http: [{route: [{destination: {host: other}}]}]}")),
			[]string{"Active", "Conflict the same object in kube:one is older and applies everywhere; make both equal, or remove one"}, CodeConflict},
		{"a broken older one does not block", docs("# from two\n"+peer("shop", "a", "{mtls: {mode: X}}"), peer("shop", "a", "{mtls: {mode: STRICT}}")),
			[]string{`Invalid invalid object: PeerAuthentication shop/a @ kube:two: spec.mtls.mode: "X", want one of UNSET, DISABLE, PERMISSIVE, STRICT`, "Active"}, CodeInvalid},
		{"a second default is without effect", docs(peer("shop", "a", "{mtls: {mode: STRICT}}"), peer("shop", "b", "{mtls: {mode: STRICT}}")),
			[]string{"Active", "Active NoEffect: spec: an older policy is the one of namespace shop"}, CodeNotTranslated},
		{"a second service of a host too", docs(routes("shop", "a", toCart), routes("shop", "b", toCart)),
			[]string{"Active", "Active NoEffect: spec.hosts: cart.shop.svc.cluster.local has the older VirtualService shop/a @ kube:one"}, CodeNotTranslated},
	}
	for _, tt := range tests {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			s := story(t, tt.objects)
			x := New(s)
			var got []string
			for _, o := range s.Objects {
				st, ok := x.Status(o)
				if !ok {
					t.Fatalf("no status of %s", ID(o))
				}
				words := string(st.State)
				if st.State == Invalid || st.State == Conflict {
					words += " " + st.Message
				}
				got = append(got, strings.Join(append([]string{words}, st.Notes...), " "))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("status:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
			var codes []string
			for _, f := range x.Findings() {
				codes = append(codes, f.Code)
			}
			if got := strings.Join(slices.Compact(codes), " "); got != tt.codes {
				t.Errorf("codes %q, want %q", got, tt.codes)
			}
		})
	}
}

func TestNewFrom(t *testing.T) {
	t.Parallel()
	s := story(t, docs(routes("shop", "a", toCart), peer("shop", "a", "{mtls: {mode: STRICT}}"), "# from far\n"+routes("shop", "b", "{hosts: [pay], http: [{route: [{destination: {host: pay}}]}]}")))
	first := New(s)
	same := *s
	same.Revision++
	if NewFrom(first, &same) != first {
		t.Error("a new index although no object changed")
	}
	vs, _ := first.VirtualService("web", nil, "cart.shop.svc.cluster.local")

	same.Clusters = map[federation.ClusterID]*federation.Cluster{"one": s.Clusters["one"], "far": {ID: "far", Role: federation.Primary}}
	promoted := NewFrom(first, &same)
	if again, _ := promoted.VirtualService("web", nil, "cart.shop.svc.cluster.local"); again != vs {
		t.Error("an object that did not change has another pointer")
	}
	if pay, _ := promoted.VirtualService("web", nil, "pay.shop.svc.cluster.local"); pay == nil {
		t.Error("the promoted cluster's object does not act")
	}

	copied := *s.Objects[0]
	if st, ok := first.Status(&copied); !ok || st.State != Active {
		t.Errorf("status of a copy: %v, %t", st, ok)
	}
	if _, ok := first.Status(&federation.Object{Kind: "VirtualService", Name: "nobody"}); ok {
		t.Error("a status of nothing")
	}
}

func TestNilIndexSaysNothing(t *testing.T) {
	t.Parallel()
	var x *Index
	if r, _ := x.DestinationRule("a", nil, service("b/c")); r != nil {
		t.Error(r)
	}
	if v, _ := x.VirtualService("a", nil, "b"); v != nil {
		t.Error(v)
	}
	if x.MutualTLS("a", nil, 1) != Permissive || !x.Imports("a", nil, service("b/c"), 0) || x.RegistryOnly("a", nil) || x.SelectorKeys() != nil || x.Findings() != nil {
		t.Error("a nil index has opinions")
	}
}

func TestClassKeyTellsApartWhatPoliciesTellApart(t *testing.T) {
	t.Parallel()
	x := New(story(t, docs(
		sidecar("web", "x", `{workloadSelector: {labels: {app: x}}, egress: [{hosts: ["shop/*"]}]}`),
		peer("web", "x", "{selector: {matchLabels: {app: x}}, mtls: {mode: STRICT}}"),
		routes("shop", "a", "{hosts: [cart], http: [{match: [{sourceLabels: {tier: beta}}], route: [{destination: {host: cart}}]}]}"))))
	if a, b := x.ClassKey("web", labels("app=y")), x.ClassKey("web", labels("app=z,pod=7")); a != b {
		t.Errorf("%q and %q", a, b)
	}
	seen := map[string]bool{}
	for _, l := range []string{"", "app=x", "tier=beta", "app=x,tier=beta"} {
		seen[x.ClassKey("web", labels(l))] = true
	}
	if len(seen) != 4 {
		t.Errorf("keys %v", seen)
	}
}

func TestDecodeIsRepeatable(t *testing.T) {
	t.Parallel()
	o := object(t, routes("shop", "a", toCart))
	a, err := Decode(o)
	b, again := Decode(o)
	if err != nil || again != nil || !proto.Equal(a.Spec.(proto.Message), b.Spec.(proto.Message)) {
		t.Errorf("%v, %v", err, again)
	}
}
