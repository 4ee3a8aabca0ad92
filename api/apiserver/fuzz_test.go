// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"net/url"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
)

// Whatever stands in an address is either refused with a problem or makes a
// request that can be written down again.
func FuzzFields(f *testing.F) {
	for _, q := range []string{"name=east&force=true", "drainTimeout=30s", "clusters=a&clusters=b", "since=1h&limit=5", "x", "name=%ff", "force=&force="} {
		f.Add(q)
	}
	f.Fuzz(func(t *testing.T, query string) {
		values, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		for _, m := range []proto.Message{&api.RemoveClusterRequest{}, &api.CheckRequest{}, &api.TailActivityRequest{}, &api.ListProxiesRequest{}} {
			if err := setFields(m, values); err != nil {
				if problemOf(err).Code != api.InvalidInput {
					t.Errorf("%q: %v", query, err)
				}
				continue
			}
			if _, err := protojson.Marshal(m); err != nil && !strings.Contains(err.Error(), "out of range") {
				t.Errorf("%q: %v", query, err)
			}
		}
	})
}

// A body of any kind leads to a member that the store would take, or to a problem.
func FuzzRegisterBody(f *testing.F) {
	f.Add([]byte(`{"cluster":{"metadata":{"name":"east","uid":"u"},"spec":{"role":"primary","network":"n1","apiServer":"https://x","issuerKeys":"e30="}}}`))
	f.Add([]byte(`{"cluster":null}`))
	f.Add([]byte(`{"reader":{"token":"a.b.c"}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var req api.RegisterClusterRequest
		if err := decodeBody(body, &req); err != nil {
			return
		}
		m, err := memberIn(req.GetCluster())
		if err != nil {
			if problemOf(err).Code != api.InvalidInput {
				t.Errorf("%s: %v", body, err)
			}
			return
		}
		if err := m.Validate(); err != nil {
			t.Errorf("%s: %v", body, err)
		}
	})
}

func FuzzHealthCheck(f *testing.F) {
	for _, s := range []string{"http://:8080/ready", "tcp://:80", "http://h:80", "x", "http://:0/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, err := healthCheck(s)
		if err == nil && s != "" && h.Port == 0 {
			t.Errorf("%q became %+v", s, h)
		}
	})
}

func FuzzHealthReport(f *testing.F) {
	f.Add("10.0.0.1", "::1")
	f.Fuzz(func(t *testing.T, a, b string) {
		h, err := healthIn(&api.HealthReport{Addresses: []string{a, b}})
		if err != nil {
			return
		}
		for _, addr := range h.Addresses {
			if !addr.IsValid() || addr.IsLoopback() || addr.Zone() != "" || addr.Is4In6() {
				t.Errorf("%q %q: %v", a, b, addr)
			}
		}
	})
}
