// SPDX-License-Identifier: Apache-2.0

package registrytest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// Record is a service of one HTTP port with so many ready endpoints, as an ordinary
// cluster reports it: accounts, labels and localities like those of a Deployment.
func Record(source federation.SourceID, namespace, name string, endpoints int) *federation.Record {
	r := &federation.Record{
		Source: source, Name: federation.ServiceName{Namespace: namespace, Name: name}, Type: federation.ClusterIP,
		Created:    time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Ports:      []federation.Port{{Number: 80, Name: "http", Protocol: federation.HTTP}},
		ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.10")},
		Labels:     map[string]string{"app": name},
	}
	labels := map[string]string{"app": name, "version": "v1", "pod-template-hash": "7d9f8c6b5"}
	ports := map[uint32]uint32{80: 8080}
	for i := range endpoints {
		r.Endpoints = append(r.Endpoints, federation.Endpoint{
			Workload:  fmt.Sprintf("%s-7d9f8c6b5-%05d", name, i),
			UID:       fmt.Sprintf("00000000-0000-4000-8000-%012d", i),
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)})},
			Health:    federation.Ready, Network: "n1", TargetPorts: ports, Labels: labels, Mesh: true,
			Locality:       federation.Locality{Region: "eu", Zone: fmt.Sprintf("eu-%d", i%3)},
			ServiceAccount: name,
		})
	}
	return r
}

// Change is a copy of a record with one endpoint changed.
func Change(r *federation.Record, endpoint int, change func(e *federation.Endpoint)) *federation.Record {
	c := *r
	c.Endpoints = append([]federation.Endpoint(nil), r.Endpoints...)
	change(&c.Endpoints[endpoint])
	return &c
}

// Records is a level's map of records.
func Records(records ...*federation.Record) map[federation.ServiceName]*federation.Record {
	out := make(map[federation.ServiceName]*federation.Record, len(records))
	for _, r := range records {
		out[r.Name] = r
	}
	return out
}

// Member is a cluster that can join, with a signing key of its own.
func Member(t testing.TB, id federation.ClusterID, name string) *registry.Member {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: private.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	return &registry.Member{
		Cluster: federation.Cluster{
			ID: id, Name: name, Network: "n1", Role: federation.Primary, APIServer: "https://192.0.2.1:6443",
		},
		Issuer: "https://kubernetes.default.svc", IssuerKeys: keys,
	}
}

// Token is a credential of a reader.
func Token(token string) registry.Credentials {
	return registry.Credentials{Reader: registry.Credential{Token: token}}
}
