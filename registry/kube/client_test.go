// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"net/http"
	"testing"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
)

// A connection that only seems to live is noticed by pings. What sets them up depends on
// how client-go wraps its transports.
func TestConnectionsArePinged(t *testing.T) {
	t.Parallel()
	api, err := NewAPI(&rest.Config{Host: "https://127.0.0.1:1", BearerToken: "t", TLSClientConfig: rest.TLSClientConfig{Insecure: true}})
	if err != nil {
		t.Fatal(err)
	}
	transport := api.http.Transport
	for {
		switch inner := transport.(type) {
		case *http.Transport:
			if c := inner.HTTP2; c == nil || c.SendPingTimeout != pingAfter || c.PingTimeout != pingAfter {
				t.Errorf("HTTP/2: %+v", c)
			}
			return
		case utilnet.RoundTripperWrapper:
			transport = inner.WrappedRoundTripper()
		default:
			t.Fatalf("%T does not tell what it wraps", transport)
		}
	}
}
