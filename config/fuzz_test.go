// SPDX-License-Identifier: Apache-2.0

package config_test

import (
	"errors"
	"testing"

	. "github.com/isthmus-mesh/isthmus/config"
	"github.com/isthmus-mesh/isthmus/federation"
)

// FuzzDecode: what a member sends is never fatal, and never both read and refused.
func FuzzDecode(f *testing.F) {
	for _, doc := range []string{
		routes("shop", "a", toCart),
		routes("shop", "a", "{hosts: ['*'], http: [{timeout: 1h, match: [{headers: {x: {regex: a+}}}], fault: {delay: {fixedDelay: 1s}}, route: [{destination: {host: cart}, weight: 3}]}]}"),
		rule("shop", "a", "{host: cart, subsets: [{name: v1, labels: {a: b}}], trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3}}}"),
		peer("shop", "a", "{selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: STRICT}}}"),
		sidecar("shop", "a", `{egress: [{hosts: ["*/*", "~a/b"], port: {number: 80}}]}`),
		"apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {namespace: shop, name: x}\nspec: {rules: [{backendRefs: [{name: cart, port: 80}]}]}\n",
		"apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceImport\nmetadata: {namespace: shop, name: x}\nspec: {ports: [{port: 80}]}\n",
		"apiVersion: networking.istio.io/v1alpha3\nkind: EnvoyFilter\nmetadata: {namespace: shop, name: x}\nspec: {configPatches: [{patch: {value: {a: [1, null, {b: c}]}}}]}\n",
	} {
		o := object(f, doc)
		f.Add(o.APIVersion, o.Kind, o.Raw)
	}
	f.Fuzz(func(t *testing.T, apiVersion, kind string, raw []byte) {
		o := &federation.Object{Source: "file:f", APIVersion: apiVersion, Kind: kind, Namespace: "shop", Name: "x", Raw: raw}
		d, err := Decode(o)
		if (d == nil) == (err == nil) {
			t.Fatalf("%v and %v", d, err)
		}
		if err != nil && !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnknownKind) {
			t.Fatalf("an error of no kind: %v", err)
		}
		x := New(&federation.Snapshot{Objects: []*federation.Object{o}})
		if _, ok := x.Status(o); !ok {
			t.Fatal("no status")
		}
		x.VirtualService("shop", nil, "cart.shop.svc.cluster.local")
		x.DestinationRule("shop", nil, federation.ServiceName{Namespace: "shop", Name: "cart"})
		x.Imports("shop", nil, federation.ServiceName{Namespace: "shop", Name: "cart"}, 80)
		x.ClassKey("shop", map[string]string{"a": "b"})
		x.MutualTLS("shop", map[string]string{"a": "b"}, 80)
	})
}
