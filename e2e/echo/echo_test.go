// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

// serveAll starts every protocol on free loopback ports and returns their URLs by scheme.
func serveAll(t *testing.T, s *server) map[string]string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	urls := map[string]string{}
	done := make(chan struct{}, 5)
	start := func(serve func(context.Context, net.Listener) error, schemes ...string) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		for _, scheme := range schemes {
			urls[scheme] = scheme + "://" + l.Addr().String()
		}
		go func() {
			if err := serve(ctx, l); err != nil {
				t.Error(err)
			}
			done <- struct{}{}
		}()
	}
	start(s.serveHTTP, "http", "h2c", "ws")
	start(s.serveGRPC, "grpc")
	start(s.serveTCP, "tcp")
	start(s.serveFirst, "first")
	start(s.serveTLS, "https")
	t.Cleanup(func() {
		cancel()
		for range 5 {
			<-done
		}
	})
	return urls
}

func callerOf(t *testing.T, raw string) *caller {
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return &caller{url: u, n: 3, concurrency: 1, timeout: 5 * time.Second, body: "hello", every: time.Millisecond, want: "east"}
}

func TestEveryProtocolTellsWhoAnswered(t *testing.T) {
	t.Parallel()
	urls := serveAll(t, &server{place: Place{Cluster: "east", Pod: "web-1"}})
	for scheme, raw := range urls {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			if err := callerOf(t, raw).run(t.Context(), &out); err != nil {
				t.Fatalf("%v\n%s", err, &out)
			}
			if !strings.Contains(out.String(), "3 answers: east 3\npods: east/web-1 3\n0 failed") {
				t.Errorf("report:\n%s", &out)
			}
		})
	}
}

func TestStreamsAreHeld(t *testing.T) {
	t.Parallel()
	urls := serveAll(t, &server{place: Place{Cluster: "east"}})
	for _, scheme := range []string{"ws", "grpc", "tcp", "first"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			c := callerOf(t, urls[scheme])
			c.hold = 50 * time.Millisecond
			var out bytes.Buffer
			if err := c.run(t.Context(), &out); err != nil {
				t.Fatalf("%v\n%s", err, &out)
			}
		})
	}
}

func TestItDoesAsItIsTold(t *testing.T) {
	t.Parallel()
	s := &server{place: Place{Cluster: "east"}}
	h := s.handler("http")
	do := func(method, path string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w.Code
	}
	for _, step := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/ready", 200},
		{"POST", "/control/unready", 200},
		{"GET", "/ready", 503},
		{"GET", "/", 200}, // it still answers
		{"POST", "/control/ready", 200},
		{"GET", "/ready", 200},
		{"POST", "/control/fail?n=1", 200},
		{"GET", "/", 503},
		{"GET", "/", 200},
		{"POST", "/control/fail?share=1", 200},
		{"GET", "/", 503},
		{"POST", "/control/fail?share=2", 400},
		{"GET", "/status/418", 503},
		{"POST", "/control/fail?share=0", 200},
		{"GET", "/status/418", 418},
	} {
		if got := do(step.method, step.path); got != step.want {
			t.Errorf("%s %s: %d, want %d", step.method, step.path, got, step.want)
		}
	}
}

func TestPeerOfForwardedCertificate(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]string{
		"": "",
		"By=spiffe://a/ns/x/sa/y;Hash=12;Subject=\"\";URI=spiffe://a/ns/shop/sa/web":          "spiffe://a/ns/shop/sa/web",
		"Hash=1;URI=spiffe://a/ns/one/sa/one,By=spiffe://b;Hash=2;URI=spiffe://a/ns/t/sa/two": "spiffe://a/ns/t/sa/two",
	} {
		if got := peerOf(http.Header{"X-Forwarded-Client-Cert": {header}}); got != want {
			t.Errorf("%q: %q, want %q", header, got, want)
		}
	}
}

func FuzzParseAnswer(f *testing.F) {
	f.Add(Answer{Protocol: "tcp", Body: "x"}.line())
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := parseAnswer(b); err == nil && a.Protocol == "" {
			t.Error("accepted an answer without a protocol")
		}
	})
}

func TestTheShopShowsWhereAnswersComeFrom(t *testing.T) {
	t.Parallel()
	urls := serveAll(t, &server{place: Place{Cluster: "west", Pod: "payments-1"}})
	s := &shop{
		place: Place{Cluster: "east"}, client: http.DefaultClient,
		backends: []backend{{"payments", urls["http"] + "/"}, {"stock", "http://127.0.0.1:1/"}},
	}
	w := httptest.NewRecorder()
	s.handler().ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	for _, want := range []string{"<b>east</b>", `<td class="where">west</td>`, "connection refused"} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("the page lacks %q:\n%s", want, w.Body)
		}
	}
}
