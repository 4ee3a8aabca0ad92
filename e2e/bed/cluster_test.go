// SPDX-License-Identifier: Apache-2.0

package bed_test

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
)

// eventually asks until the condition holds, for at most 20 seconds, and
// prints how long it took.
func eventually(t *testing.T, what string, condition func() error) {
	t.Helper()
	start := time.Now()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := condition()
		if err == nil {
			t.Logf("%s: %s", what, time.Since(start).Round(time.Millisecond))
			return
		}
		if time.Since(start) > 20*time.Second {
			t.Fatalf("%s: not within 20 s: %v", what, err)
		}
		<-ticker.C
	}
}

func TestTwoClustersSideBySide(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	start := time.Now()
	clusters := make([]*bed.Cluster, 2)
	var group sync.WaitGroup
	for i, name := range []string{"east", "west"} {
		network := must(w.Network("n-"+name, bed.NetworkConfig{}))(t)
		group.Go(func() {
			var err error
			if clusters[i], err = w.Cluster(name, bed.ClusterConfig{Network: network}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("two clusters ready in %s", time.Since(start).Round(time.Millisecond))
	east, west := clusters[0], clusters[1]

	t.Run("same issuer and ranges, different keys", func(t *testing.T) { checkTokens(t, east, west) })
	t.Run("a LoadBalancer address balances", func(t *testing.T) { checkLoadBalancer(t, east) })
	t.Run("a laptop reaches both", func(t *testing.T) { checkLaptop(t, w) })
	t.Run("an API server restarts with its data", func(t *testing.T) { checkRestart(t, west) })
}

func checkTokens(t *testing.T, east, west *bed.Cluster) {
	ctx := t.Context()
	if a, b := must(east.UID(ctx))(t), must(west.UID(ctx))(t); a == b {
		t.Errorf("both clusters have the UID %s", a)
	}
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{"isthmus-ca"}}}
	answer := must(east.Client().CoreV1().ServiceAccounts("default").CreateToken(ctx, "default", request, metav1.CreateOptions{}))(t)
	verdict := func(c *bed.Cluster) authenticationv1.TokenReviewStatus {
		review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: answer.Status.Token, Audiences: []string{"isthmus-ca"}}}
		return must(c.Client().AuthenticationV1().TokenReviews().Create(ctx, review, metav1.CreateOptions{}))(t).Status
	}
	if got := verdict(east); !got.Authenticated || got.User.Username != "system:serviceaccount:default:default" {
		t.Errorf("east does not know its own token: %+v", got)
	}
	if got := verdict(west); got.Authenticated {
		t.Errorf("west takes east's token: %+v", got)
	}
	path := func(c *bed.Cluster, path string) string {
		return string(must(c.Client().Discovery().RESTClient().Get().AbsPath(path).DoRaw(ctx))(t))
	}
	const configuration, keys = "/.well-known/openid-configuration", "/openid/v1/jwks"
	for _, c := range []*bed.Cluster{east, west} {
		if text := path(c, configuration); !strings.Contains(text, `"issuer":"`+bed.Issuer+`"`) {
			t.Errorf("%s: issuer is not %s: %s", c.Name(), bed.Issuer, text)
		}
	}
	if path(east, keys) == path(west, keys) {
		t.Error("both clusters have the same signing key")
	}
	first := func(c *bed.Cluster) string {
		return must(c.Client().CoreV1().Services("default").Get(ctx, "kubernetes", metav1.GetOptions{}))(t).Spec.ClusterIP
	}
	if first(east) != "10.96.0.1" || first(west) != "10.96.0.1" {
		t.Errorf("ClusterIPs of the API servers are %s and %s, want 10.96.0.1 for both", first(east), first(west))
	}
}

func checkLoadBalancer(t *testing.T, c *bed.Cluster) {
	ctx := t.Context()
	client := must(c.Namespace().World().Host("client"))(t)
	pod(t, c.Network(), "lb-a", "10.244.1.2")
	pod(t, c.Network(), "lb-b", "10.244.1.3")
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "gateway"},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer, Ports: []corev1.ServicePort{{Name: "tls", Port: 15443}}},
	}
	must(c.Client().CoreV1().Services("default").Create(ctx, service, metav1.CreateOptions{}))(t)
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "gateway-1", Labels: map[string]string{discoveryv1.LabelServiceName: "gateway"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("tls"), Port: ptr.To[int32](8080)}},
		Endpoints: []discoveryv1.Endpoint{
			{Addresses: []string{"10.244.1.2"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)}},
			{Addresses: []string{"10.244.1.3"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(false)}},
		},
	}
	slice = must(c.Client().DiscoveryV1().EndpointSlices("default").Create(ctx, slice, metav1.CreateOptions{}))(t)

	var address netip.Addr
	var node uint16
	eventually(t, "the Service has an address", func() error {
		s, err := c.Client().CoreV1().Services("default").Get(ctx, "gateway", metav1.GetOptions{})
		if err != nil || len(s.Status.LoadBalancer.Ingress) == 0 {
			return fmt.Errorf("no address: %w", err)
		}
		address, node = netip.MustParseAddr(s.Status.LoadBalancer.Ingress[0].IP), uint16(s.Spec.Ports[0].NodePort)
		return nil
	})
	answers := func(at netip.AddrPort, want ...string) func() error {
		return func() error {
			seen := make(map[string]bool)
			for range 6 {
				body, err := reach(t, client, at.String())
				if err != nil {
					return err
				}
				seen[body] = true
			}
			for _, name := range want {
				if !seen[name] || len(seen) != len(want) {
					return fmt.Errorf("answers come from %v, want %v", seen, want)
				}
			}
			return nil
		}
	}
	front := netip.AddrPortFrom(address, 15443)
	eventually(t, "the ready pod answers", answers(front, "lb-a"))
	eventually(t, "the node port answers", answers(netip.AddrPortFrom(c.Addr(), node), "lb-a"))
	slice.Endpoints[1].Conditions.Ready = ptr.To(true)
	must(c.Client().DiscoveryV1().EndpointSlices("default").Update(ctx, slice, metav1.UpdateOptions{}))(t)
	eventually(t, "both answer when both are ready", answers(front, "lb-a", "lb-b"))
	if err := c.Client().CoreV1().Services("default").Delete(ctx, "gateway", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nobody answers when the Service is gone", func() error {
		if body, err := reach(t, client, front.String()); err == nil {
			return fmt.Errorf("%s still answers", body)
		}
		return nil
	})
}

func checkLaptop(t *testing.T, w *bed.World) {
	laptop := must(w.Laptop("laptop"))(t)
	for _, name := range []string{"east", "west"} {
		output := must(laptop.Shell(t.Context(), "kubectl --context "+name+" get namespaces -o name"))(t)
		if !bytes.Contains(output, []byte("namespace/kube-system")) {
			t.Errorf("kubectl in %s: %s", name, output)
		}
	}
}

func checkRestart(t *testing.T, c *bed.Cluster) {
	ctx := t.Context()
	before := must(c.UID(ctx))(t)
	for _, p := range []*bed.Process{c.APIServer, c.Etcd} {
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	dead, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := c.UID(dead); err == nil {
		t.Error("a dead API server answers")
	}
	for _, p := range []*bed.Process{c.Etcd, c.APIServer} {
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "ready again", func() error { return c.WaitReady(ctx) })
	if after := must(c.UID(ctx))(t); after != before {
		t.Errorf("UID is %s after the restart, was %s", after, before)
	}
}

func TestExternalEtcd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	start := time.Now()
	e := must(w.Etcd("etcd", 3))(t)
	t.Logf("three members healthy in %s", time.Since(start).Round(time.Millisecond))
	if err := e.Members[0].Kill(); err != nil {
		t.Fatal(err)
	}
	if err := e.WaitReady(t.Context()); err != nil {
		t.Errorf("two of three: %v", err)
	}
}
