// SPDX-License-Identifier: Apache-2.0

package dns_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/ptr"

	"github.com/isthmus-mesh/isthmus/e2e/dns"
)

// town is a zone with one Service of each kind.
func town(t testing.TB) *dns.Zone {
	t.Helper()
	services := []*corev1.Service{
		service("shop", "cart", corev1.ServiceSpec{ClusterIP: "10.96.3.4", ClusterIPs: []string{"10.96.3.4", "fd00::34"}, Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}, {Name: "gossip", Port: 7946, Protocol: corev1.ProtocolUDP},
		}}),
		service("shop", "db", corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}),
		service("shop", "crowd", corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}),
		service("shop", "bank", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "bank.example.com"}),
		service("shop", "basket", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "cart.shop.svc.cluster.local"}),
		service("shop", "loop", corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "loop.shop.svc.cluster.local"}),
	}
	endpoints := []discoveryv1.Endpoint{
		{Addresses: []string{"10.244.1.2"}, Hostname: ptr.To("db-0"), Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)}},
		{Addresses: []string{"10.244.1.3"}, Hostname: ptr.To("db-1"), Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(false)}},
		{Addresses: []string{"10.244.1.4"}},
	}
	ports := []discoveryv1.EndpointPort{{Name: ptr.To("pg"), Port: ptr.To[int32](5432), Protocol: ptr.To(corev1.ProtocolTCP)}}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-1", Labels: map[string]string{discoveryv1.LabelServiceName: "db"}},
		Endpoints:  endpoints, Ports: ports,
	}
	crowd := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "crowd-1", Labels: map[string]string{discoveryv1.LabelServiceName: "crowd"}},
	}
	for i := range 200 {
		crowd.Endpoints = append(crowd.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.244.7.%d", i)}})
	}
	serviceStore, sliceStore := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{}), cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	for _, s := range services {
		if err := serviceStore.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range []*discoveryv1.EndpointSlice{slice, crowd} {
		if err := sliceStore.Add(s); err != nil {
			t.Fatal(err)
		}
	}
	return &dns.Zone{
		Domain: "cluster.local", Services: corelisters.NewServiceLister(serviceStore), Slices: discoverylisters.NewEndpointSliceLister(sliceStore),
	}
}

func service(namespace, name string, spec corev1.ServiceSpec) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: spec}
}

func query(t testing.TB, name string, kind dnsmessage.Type) []byte {
	t.Helper()
	message := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}
	packed, err := message.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

// show writes a reply's code and answers in a few words.
func show(t testing.TB, reply []byte) string {
	t.Helper()
	var message dnsmessage.Message
	if err := message.Unpack(reply); err != nil {
		t.Fatal(err)
	}
	if message.ID != 77 || !message.Response {
		t.Errorf("header of the reply: %+v", message.Header)
	}
	words := []string{strings.TrimPrefix(message.RCode.String(), "RCode")}
	for _, answer := range message.Answers {
		switch body := answer.Body.(type) {
		case *dnsmessage.AResource:
			words = append(words, netip.AddrFrom4(body.A).String())
		case *dnsmessage.AAAAResource:
			words = append(words, netip.AddrFrom16(body.AAAA).String())
		case *dnsmessage.CNAMEResource:
			words = append(words, "->"+body.CNAME.String())
		case *dnsmessage.SRVResource:
			words = append(words, fmt.Sprintf("%s:%d", body.Target, body.Port))
		}
	}
	return strings.Join(words, " ")
}

func TestAnswer(t *testing.T) {
	t.Parallel()
	const a, aaaa, srv = dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeSRV
	zone := town(t)
	for _, c := range []struct {
		why  string
		name string
		kind dnsmessage.Type
		want string
	}{
		{"a Service has its ClusterIP", "cart.shop.svc.cluster.local.", a, "Success 10.96.3.4"},
		{"of each family", "cart.shop.svc.cluster.local.", aaaa, "Success fd00::34"},
		{"in any case", "Cart.SHOP.svc.Cluster.Local.", a, "Success 10.96.3.4"},
		{"a name without that family exists all the same", "db.shop.svc.cluster.local.", aaaa, "Success"},
		{"a headless Service has its ready endpoints", "db.shop.svc.cluster.local.", a, "Success 10.244.1.2 10.244.1.4"},
		{"a named pod has its own name", "db-0.db.shop.svc.cluster.local.", a, "Success 10.244.1.2"},
		{"an unready one has not", "db-1.db.shop.svc.cluster.local.", a, "NameError"},
		{"one without name has its address", "10-244-1-4.db.shop.svc.cluster.local.", a, "Success 10.244.1.4"},
		{"pods of other Services have no names", "x.cart.shop.svc.cluster.local.", a, "NameError"},
		{"SRV of a named port", "_http._tcp.cart.shop.svc.cluster.local.", srv, "Success cart.shop.svc.cluster.local.:80"},
		{"SRV minds the protocol", "_http._udp.cart.shop.svc.cluster.local.", srv, "NameError"},
		{"SRV of a headless Service", "_pg._tcp.db.shop.svc.cluster.local.", srv,
			"Success 10-244-1-4.db.shop.svc.cluster.local.:5432 db-0.db.shop.svc.cluster.local.:5432"},
		{"SRV of all ports", "cart.shop.svc.cluster.local.", srv,
			"Success cart.shop.svc.cluster.local.:80 cart.shop.svc.cluster.local.:7946"},
		{"an alias to a name outside", "bank.shop.svc.cluster.local.", a, "Success ->bank.example.com."},
		{"an alias inside is followed", "basket.shop.svc.cluster.local.", a, "Success ->cart.shop.svc.cluster.local. 10.96.3.4"},
		{"but not for ever", "loop.shop.svc.cluster.local.", a, "ServerFailure" + strings.Repeat(" ->loop.shop.svc.cluster.local.", 8)},
		{"no such Service", "cake.shop.svc.cluster.local.", a, "NameError"},
		{"no such namespace", "nowhere.svc.cluster.local.", a, "NameError"},
		{"a namespace is no host", "shop.svc.cluster.local.", a, "Success"},
		{"nothing outside the zone", "example.com.", a, "NameError"},
		{"nor one that only ends like it", "xcluster.local.", a, "NameError"},
		{"the root", ".", a, "NameError"},
	} {
		t.Run(c.why, func(t *testing.T) {
			t.Parallel()
			if got := show(t, zone.Answer(query(t, c.name, c.kind), false)); got != c.want {
				t.Errorf("%s %s: got %q, want %q", c.name, c.kind, got, c.want)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	zone := town(t)
	good := query(t, "cart.shop.svc.cluster.local.", dnsmessage.TypeA)
	for _, c := range []struct {
		why    string
		change func(message []byte) []byte
		want   string // empty: no reply
	}{
		{"an answer is not answered", func(m []byte) []byte { m[2] |= 0x80; return m }, ""},
		{"half a header is not answered", func(m []byte) []byte { return m[:7] }, ""},
		{"half a question is malformed", func(m []byte) []byte { return m[:20] }, "FormatError"},
		{"two questions are malformed", func(m []byte) []byte { m[5] = 2; return append(m, m[12:]...) }, "FormatError"},
		{"an update is not implemented", func(m []byte) []byte { m[2] |= 5 << 3; return m }, "NotImplemented"},
		{"another class is refused", func(m []byte) []byte { m[len(m)-1] = 3; return m }, "Refused"},
	} {
		t.Run(c.why, func(t *testing.T) {
			t.Parallel()
			reply := zone.Answer(c.change(slices.Clone(good)), false)
			if reply == nil {
				if c.want != "" {
					t.Errorf("no reply, want %s", c.want)
				}
				return
			}
			if got := show(t, reply); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestServer(t *testing.T) {
	t.Parallel()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	streams, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- (&dns.Server{Zone: town(t)}).Serve(ctx, packets, streams) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	name := "crowd.shop.svc.cluster.local."
	udp := dial(t, "udp", packets.LocalAddr().String())
	if _, err := udp.Write(query(t, name, dnsmessage.TypeA)); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 4096)
	n, err := udp.Read(buffer)
	if err != nil {
		t.Fatal(err)
	}
	var short dnsmessage.Message
	if err := short.Unpack(buffer[:n]); err != nil {
		t.Fatal(err)
	}
	if !short.Truncated || n > 512 {
		t.Errorf("reply of %d bytes by UDP: truncated is %t", n, short.Truncated)
	}
	tcp := dial(t, "tcp", streams.Addr().String())
	for range 2 { // a connection serves several queries
		q := query(t, name, dnsmessage.TypeA)
		if _, err := tcp.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)); err != nil {
			t.Fatal(err)
		}
		var length [2]byte
		if _, err := io.ReadFull(tcp, length[:]); err != nil {
			t.Fatal(err)
		}
		whole := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(tcp, whole); err != nil {
			t.Fatal(err)
		}
		if got := len(strings.Fields(show(t, whole))); got != 201 {
			t.Errorf("%d words by TCP, want a code and 200 addresses", got)
		}
	}
}

func dial(t *testing.T, network, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func FuzzAnswer(f *testing.F) {
	zone := town(f)
	f.Add(query(f, "cart.shop.svc.cluster.local.", dnsmessage.TypeA))
	f.Add(query(f, "_pg._tcp.db.shop.svc.cluster.local.", dnsmessage.TypeSRV))
	f.Add(query(f, "loop.shop.svc.cluster.local.", dnsmessage.TypeALL))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, message []byte) {
		for _, stream := range []bool{false, true} {
			reply := zone.Answer(message, stream)
			if reply == nil {
				continue
			}
			if !stream && len(reply) > 1232 {
				t.Errorf("reply of %d bytes by UDP", len(reply))
			}
			var parsed dnsmessage.Message
			if err := parsed.Unpack(reply); err != nil {
				t.Errorf("reply is malformed: %v", err)
			}
			if !parsed.Response {
				t.Error("reply is a query")
			}
		}
	})
}
