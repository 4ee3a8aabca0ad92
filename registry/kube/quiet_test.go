// SPDX-License-Identifier: Apache-2.0

package kube_test

import (
	"crypto/tls"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
	"github.com/isthmus-mesh/isthmus/registry/kube"
)

// muzzle stands before an API server and keeps quiet about one kind, as a server does that
// is stuck with it, or a proxy that has lost what is behind it. Its connections live.
type muzzle struct {
	*httptest.Server
	mu      sync.Mutex
	quiet   string // what becomes of requests for the kind: "", "unanswered", "headers only"
	streams []*stream
}

const muzzled = "endpointslices"

func newMuzzle(t *testing.T, c *cluster) *muzzle {
	m := &muzzle{}
	backend, err := url.Parse(c.url())
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(backend) },
		FlushInterval: -1,
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true},
		ModifyResponse: func(r *http.Response) error {
			if path.Base(r.Request.URL.Path) == muzzled {
				r.Body = m.pass(r.Body, r.Request)
			}
			return nil
		},
		ErrorLog:     log.New(io.Discard, "", 0),
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	m.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m.mu.Lock()
		quiet := m.quiet
		m.mu.Unlock()
		if quiet == "" || path.Base(r.URL.Path) != muzzled {
			proxy.ServeHTTP(w, r)
			return
		}
		if quiet == "headers only" {
			w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
		}
		<-r.Context().Done()
	}))
	m.EnableHTTP2 = true
	m.StartTLS()
	t.Cleanup(func() {
		m.CloseClientConnections()
		m.Close()
	})
	return m
}

// keep says what becomes of requests for the kind from now on.
func (m *muzzle) keep(quiet string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.quiet = quiet
}

// mute lets nothing more through on the watches that are on.
func (m *muzzle) mute() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.streams {
		s.mute.Store(true)
	}
	m.streams = nil
}

func (m *muzzle) pass(body io.ReadCloser, r *http.Request) io.ReadCloser {
	s := &stream{ReadCloser: body, end: r.Context().Done()}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.streams = append(m.streams, s)
	return s
}

// stream is an answer that may stop coming.
type stream struct {
	io.ReadCloser
	mute atomic.Bool
	end  <-chan struct{}
}

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	if s.mute.Load() {
		<-s.end
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// TestQuiet tells of an API server that answers, but not about one kind.
func TestQuiet(t *testing.T) {
	t.Parallel()
	b := joined(t)
	uid := b.shop(t)
	m := newMuzzle(t, b.cluster)
	err := b.store.UpdateMember(t.Context(), b.member.ID, func(r *registry.Member) error {
		r.APIServer = m.URL
		r.CertificateAuthority = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Certificate().Raw})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	impatient := func(c *kube.SourceConfig) { c.Answer, c.Silence = 500*time.Millisecond, 2*time.Second }
	// ready makes the endpoint ready or not, and waits until the mesh knows.
	ready := func(is bool) {
		t.Helper()
		b.slice("shop", "cart", "cart-abc", endpoint("cart-1", uid, "10.244.0.5", is))
		b.sees(t, "the endpoint is as it is", func(s *federation.Snapshot) bool {
			r := b.record(s, "shop", "cart")
			return r != nil && len(r.Endpoints) == 1 && (r.Endpoints[0].Health == federation.Ready) == is
		})
	}
	// status waits until what is told of the source is so.
	status := func(what string, is func(s registry.Status, synced federation.Condition) bool) {
		t.Helper()
		b.eventually(t, what, func() bool {
			s := b.runner.Sources()
			if len(s) != 1 {
				return false
			}
			synced, known := s[0].Status.Condition(federation.Synced)
			return known && is(s[0].Status, synced)
		})
	}
	// told waits until the status names the kind that is not heard, and nothing else is amiss.
	told := func(reason string) {
		t.Helper()
		status("the kind is named", func(s registry.Status, synced federation.Condition) bool {
			reachable, _ := s.Condition(federation.Reachable)
			return !synced.Status && synced.Reason == reason && strings.Contains(synced.Message, muzzled) && reachable.Status && !s.Unheard.IsZero()
		})
	}
	well := func() {
		t.Helper()
		status("all is heard", func(s registry.Status, synced federation.Condition) bool { return synced.Status && s.Unheard.IsZero() })
	}

	for _, quiet := range []string{"unanswered", "headers only"} {
		t.Run("requests are "+quiet, func(t *testing.T) {
			m.keep(quiet)
			defer b.sync(t, impatient)()
			told("Waiting")
			m.keep("")
			well()
			ready(false)
			ready(true)
		})
	}
	t.Run("a watch goes quiet", func(t *testing.T) {
		defer b.sync(t, impatient)()
		well()
		m.mute()
		ready(false)
		ready(true)
	})
	t.Run("a watch goes quiet, and the next ones are unanswered", func(t *testing.T) {
		defer b.sync(t, impatient)()
		well()
		m.keep("unanswered")
		m.mute()
		told("Silent")
		m.keep("")
		well()
		ready(false)
	})
}
