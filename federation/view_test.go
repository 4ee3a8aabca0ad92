// SPDX-License-Identifier: Apache-2.0

package federation_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	. "github.com/isthmus-mesh/isthmus/federation"
)

// describe prints a service as one scope sees it.
func describe(s *Service) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s", s.Name, s.Type)
	for _, p := range s.Ports {
		fmt.Fprintf(&b, " %d/%s:%s", p.Number, p.Protocol, p.Name)
	}
	fmt.Fprintf(&b, " at %v", s.Addresses)
	if len(s.AlsoAt) > 0 {
		fmt.Fprintf(&b, " also %v", s.AlsoAt)
	}
	for _, a := range s.Accounts {
		b.WriteString(" " + a)
	}
	for _, e := range s.Endpoints {
		fmt.Fprintf(&b, "\n%s/%s %v", e.Cluster, e.Workload, e.Addresses)
	}
	for _, p := range s.Pods {
		fmt.Fprintf(&b, "\n%s %v", p.Host, p.Address)
	}
	return b.String()
}

var viewStories = []struct {
	story string
	world string
	scope Scope
	want  string // of every service
	codes string
}{
	{
		story: "a service in both keeps the own ClusterIP, and no address of the other network",
		world: twoClusters + `
			service east shop/cart 80/HTTP:http ip=10.96.0.1
			pod e-0 10.0.0.1 sa=cart
			service west shop/cart 80/HTTP:http ip=10.96.0.7
			pod w-0 10.0.0.1 sa=basket`,
		scope: eastSees,
		want: `shop/cart ClusterIP 80/HTTP:http at [10.96.0.1] ns/shop/sa/basket ns/shop/sa/cart
			east/e-0 [10.0.0.1]
			west/w-0 []`,
	},
	{
		story: "one that exists only elsewhere has its virtual address",
		world: twoClusters + `
			address cart.shop.svc.cluster.local 240.240.0.5
			service west shop/cart 80/HTTP:http ip=10.96.0.7
			pod w-0 10.0.0.1`,
		scope: eastSees,
		want: `shop/cart ClusterIP 80/HTTP:http at [240.240.0.5] ns/shop/sa/default
			west/w-0 []`,
	},
	{
		story: "a virtual address stays good beside the ClusterIP",
		world: twoClusters + `
			address cart.shop.svc.cluster.local 240.240.0.5
			service west shop/cart 80/HTTP:http ip=10.96.0.7`,
		scope: westSees,
		want:  `shop/cart ClusterIP 80/HTTP:http at [10.96.0.7] also [240.240.0.5]`,
	},
	{
		story: "a virtual machine dials every service by its virtual address",
		world: twoClusters + `
			address cart.shop.svc.cluster.local 240.240.0.5
			service east shop/cart 80/HTTP:http ip=10.96.0.1
			pod e-0 10.0.0.1`,
		scope: Scope{Network: "n1"},
		want: `shop/cart ClusterIP 80/HTTP:http at [240.240.0.5] ns/shop/sa/default
			east/e-0 [10.0.0.1]`,
	},
	{
		story: "protocols differ: the own cluster's holds, the others' endpoints and accounts stay out",
		world: twoClusters + `
			service east shop/cart 80/HTTP:http ip=10.96.0.1 age=1
			pod e-0 10.0.0.1 sa=cart
			service west shop/cart 80/TCP:http ip=10.96.0.7 age=9
			pod w-0 10.0.0.1 sa=basket`,
		scope: eastSees,
		want: `shop/cart ClusterIP 80/HTTP:http at [10.96.0.1] ns/shop/sa/cart
			east/e-0 [10.0.0.1]`,
		codes: CodePortProtocol,
	},
	{
		story: "who has no record of its own follows the oldest",
		world: twoClusters + `
			cluster north n3
			service east shop/cart 80/HTTP:http age=1
			pod e-0 10.0.0.1 sa=cart
			service west shop/cart 80/TCP:http age=9
			pod w-0 10.0.0.1 sa=basket`,
		scope: Scope{Cluster: "north", Network: "n3"},
		want: `shop/cart ClusterIP 80/TCP:http at [] ns/shop/sa/basket
			west/w-0 []`,
		codes: CodePortProtocol,
	},
	{
		story: "port names differ: a warning, nothing else",
		world: twoClusters + `
			service east shop/cart 80/HTTP:http ip=10.96.0.1
			pod e-0 10.0.0.1
			service west shop/cart 80/HTTP:web,90/TCP:admin
			pod w-0 10.0.0.1`,
		scope: eastSees,
		want: `shop/cart ClusterIP 80/HTTP:http 90/TCP:admin at [10.96.0.1] ns/shop/sa/default
			east/e-0 [10.0.0.1]
			west/w-0 []`,
		codes: CodePortName,
	},
	{
		story: "an ExternalName stays where it is",
		world: twoClusters + `
			service east shop/cart 80/HTTP external=example.org
			service west shop/cart 80/HTTP
			pod w-0 10.0.0.1`,
		scope: eastSees,
		want:  `shop/cart ExternalName 80/HTTP: at []`,
		codes: CodeServiceType,
	},
	{
		story: "and does not reach the other side",
		world: twoClusters + `
			service east shop/cart 80/HTTP external=example.org
			service west shop/cart 80/HTTP ip=10.96.0.7
			pod w-0 10.0.0.1`,
		scope: westSees,
		want: `shop/cart ClusterIP 80/HTTP: at [10.96.0.7] ns/shop/sa/default
			west/w-0 [10.0.0.1]`,
	},
	{
		story: "cluster-local services, the API server and kube-system stay at home",
		world: twoClusters + `
			service east shop/cart 80/HTTP local
			pod e-0 10.0.0.1
			service east default/kubernetes 443/HTTPS
			pod api 10.0.0.2 bare
			service east kube-system/kube-dns 53/TCP
			pod dns 10.0.0.3 bare`,
		scope: westSees,
		want:  "",
	},
	{
		story: "where they are seen as they are",
		world: twoClusters + `
			service east kube-system/kube-dns 53/TCP ip=10.96.0.10
			pod dns 10.0.0.3 bare
			service west kube-system/kube-dns 53/TCP ip=10.96.0.11
			pod dns 10.0.0.4 bare`,
		scope: eastSees,
		want: `kube-system/kube-dns ClusterIP 53/TCP: at [10.96.0.10]
			east/dns [10.0.0.3]`,
	},
	{
		story: "a draining cluster contributes nothing to others",
		world: twoClusters + `
			cluster west n2 draining
			service west shop/cart 80/HTTP
			pod w-0 10.0.0.1`,
		scope: eastSees,
		want:  "",
	},
	{
		story: "and is complete to itself",
		world: twoClusters + `
			cluster west n2 draining
			service west shop/cart 80/HTTP ip=10.96.0.7
			pod w-0 10.0.0.1
			service east shop/pay 80/HTTP
			pod e-0 10.0.0.1`,
		scope: westSees,
		want: `shop/cart ClusterIP 80/HTTP: at [10.96.0.7] ns/shop/sa/default
			west/w-0 [10.0.0.1]
			shop/pay ClusterIP 80/HTTP: at [] ns/shop/sa/default
			east/e-0 []`,
	},
	{
		story: "a cluster that was not granted a namespace contributes nothing to it",
		world: twoClusters + `
			cluster west n2 grant=catalogue
			service west shop/cart 80/HTTP
			pod w-0 10.0.0.1`,
		scope: eastSees,
		want:  "",
	},
	{
		story: "a source that has not joined contributes nothing at all",
		world: twoClusters + `
			service ghost shop/cart 80/HTTP`,
		scope: eastSees,
		want:  "",
	},
	{
		story: "a headless service of the own cluster is its own pods; every pod has a clusterset name",
		world: twoClusters + `
			address db-0.east.db.shop.svc.clusterset.local 240.240.0.8
			address db-0.west.db.shop.svc.clusterset.local 240.240.0.9
			service east shop/db 5432/TCP headless
			pod db-0 10.0.0.1 host=db-0
			service west shop/db 5432/TCP headless
			pod db-0 10.0.0.1 host=db-0`,
		scope: eastSees,
		want: `shop/db Headless 5432/TCP: at [] ns/shop/sa/default
			east/db-0 [10.0.0.1]
			db-0.east.db.shop.svc.clusterset.local [240.240.0.8]
			db-0.west.db.shop.svc.clusterset.local [240.240.0.9]`,
	},
	{
		story: "one that exists only elsewhere has a virtual address, and so have its pods",
		world: twoClusters + `
			address db.shop.svc.cluster.local 240.240.0.7
			address db-0.db.shop.svc.cluster.local 240.240.0.8
			address db-0.west.db.shop.svc.clusterset.local 240.240.0.9
			service west shop/db 5432/TCP headless
			pod db-0 10.0.0.1 host=db-0`,
		scope: eastSees,
		want: `shop/db Headless 5432/TCP: at [240.240.0.7] ns/shop/sa/default
			west/db-0 []
			db-0.db.shop.svc.cluster.local [240.240.0.8]
			db-0.west.db.shop.svc.clusterset.local [240.240.0.9]`,
	},
	{
		story: "a network without a gateway is a finding, not a black hole",
		world: twoClusters + `
			service vm:n9 legacy/stock 8080/HTTP
			pod vm-b 10.0.0.1`,
		scope: eastSees,
		want: `legacy/stock ClusterIP 8080/HTTP: at [] ns/legacy/sa/default
			/vm-b []`,
		codes: CodeNetworkNoGateway,
	},
}

func TestView(t *testing.T) {
	t.Parallel()
	for _, tt := range viewStories {
		t.Run(tt.story, func(t *testing.T) {
			t.Parallel()
			v := story(t, tt.world).View(tt.scope)
			var got []string
			for _, s := range v.Services {
				got = append(got, describe(s))
			}
			if g, want := strings.Join(got, "\n"), trim(tt.want); g != want {
				t.Errorf("services:\n%s\nwant:\n%s", g, want)
			}
			if got := codes(v.Findings); got != tt.codes {
				t.Errorf("findings %q, want %q: %v", got, tt.codes, v.Findings)
			}
		})
	}
}

func TestNamedPodsHaveRoadsOfTheirOwn(t *testing.T) {
	t.Parallel()
	s := story(t, twoClusters+`
		service west shop/db 5432/TCP headless
		pod db-0 10.0.0.1 host=db-0
		pod db-1 10.0.0.2 host=db-1 NotReady`)
	for _, tt := range []struct {
		scope Scope
		host  string
		want  string
	}{
		{eastSees, "db-0.db.shop.svc.cluster.local", "P0 [203.0.113.2:15443]*1"},
		{eastSees, "db-0.west.db.shop.svc.clusterset.local", "P0 [203.0.113.2:15443]*1"},
		{eastSees, "db-1.db.shop.svc.cluster.local", ""},
		{westSees, "db-0.west.db.shop.svc.clusterset.local", "P0 10.0.0.1:13432*1"},
	} {
		v := s.View(tt.scope)
		svc := mustService(t, v, "shop/db")
		i := slices.IndexFunc(svc.Pods, func(p NamedPod) bool { return p.Host == tt.host })
		if i < 0 {
			t.Fatalf("%v: no pod named %s", tt.scope, tt.host)
		}
		pod := &svc.Pods[i]
		if got := hops(v.Split(Query{Service: svc, Port: 5432, Pod: pod})); got != tt.want {
			t.Errorf("%v: %s: groups %q, want %q", tt.scope, tt.host, got, tt.want)
		}
		if !strings.HasSuffix(pod.SNIHost, ".west.db.shop.svc.clusterset.local") {
			t.Errorf("%s: SNI host %s", tt.host, pod.SNIHost)
		}
	}
}

func TestServiceVisibleTo(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		exportTo  []string
		namespace string
		want      bool
	}{
		{nil, "shop", true},
		{[]string{"*"}, "other", true},
		{[]string{"."}, "shop", true},
		{[]string{"."}, "other", false},
		{[]string{"~"}, "shop", false},
		{[]string{"other"}, "other", true},
	} {
		s := &Service{Name: ServiceName{Namespace: "shop", Name: "cart"}, ExportTo: tt.exportTo}
		if got := s.VisibleTo(tt.namespace); got != tt.want {
			t.Errorf("exportTo %q, namespace %s: visible %t", tt.exportTo, tt.namespace, got)
		}
	}
}

func TestViewFromMergesOnlyWhatChanged(t *testing.T) {
	t.Parallel()
	world := twoClusters + `
		service east shop/cart 80/HTTP
		pod e-0 10.0.0.1
		service west shop/pay 80/HTTP
		pod w-0 10.0.0.2`
	s := story(t, world)
	first := s.View(eastSees)
	if second := s.ViewFrom(first, eastSees); len(second.Changed(first)) > 0 || !second.SameRoads(first) {
		t.Errorf("nothing changed, but %v", second.Changed(first))
	}

	pay := ServiceName{Namespace: "shop", Name: "pay"}
	next := *s
	next.Records = map[ServiceName][]*Record{}
	for name, list := range s.Records {
		next.Records[name] = list
	}
	changed := *s.Records[pay][0]
	changed.Endpoints = nil
	next.Records[pay] = []*Record{&changed}
	v := next.ViewFrom(first, eastSees)
	if got := v.Changed(first); !slices.Equal(got, []ServiceName{pay}) {
		t.Errorf("changed %v, want %v", got, pay)
	}

	moved := next
	moved.Addresses = story(t, "address pay.shop.svc.cluster.local 240.240.0.1").Addresses
	if got := moved.ViewFrom(v, eastSees).Changed(v); !slices.Equal(got, []ServiceName{pay}) {
		t.Errorf("an address changed: %v", got)
	}

	stale := moved.WithStanding(map[SourceID]Standing{KubeSource("west"): Demoted})
	if got := stale.ViewFrom(v, eastSees).Changed(v); len(got) != 2 {
		t.Errorf("a standing changes everything: %v", got)
	}
	delete(next.Records, pay)
	if got := next.ViewFrom(v, eastSees).Changed(v); !slices.Equal(got, []ServiceName{pay}) {
		t.Errorf("a service went: %v", got)
	}
}
