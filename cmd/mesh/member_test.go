// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// memberAPI is as much of a Kubernetes API server as the command line talks to.
// What only a real one decides is tried in e2e.
//
//	denied "verb resource"   a permission that the caller does not have
//	allowed all              and all of them again
//	gone "/name"             an object is there no more
//	status 401               every answer from now on
//	uid UID                  of kube-system
type memberAPI struct {
	*httptest.Server
	keys []byte

	mu       sync.Mutex
	settings map[string]string
	denied   map[string]bool
	objects  map[string]map[string]any // by path
	version  int
}

func startMember(t testing.TB) *memberAPI {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	m := &memberAPI{
		keys: keys, denied: map[string]bool{}, objects: map[string]map[string]any{},
		settings: map[string]string{"uid": "4f1c5d0e-0000-4000-8000-000000000001"},
	}
	m.Server = httptest.NewTLSServer(http.HandlerFunc(m.serve))
	t.Cleanup(m.Close)
	return m
}

func (m *memberAPI) set(key, value string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch key {
	case "denied":
		m.denied[value] = true
		return
	case "allowed":
		clear(m.denied)
		return
	case "gone": // the path of an object, or its end
		for path := range m.objects {
			if strings.HasSuffix(path, value) {
				delete(m.objects, path)
			}
		}
		return
	}
	m.settings[key] = value
}

func (m *memberAPI) kubeconfig() []byte {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.Certificate().Raw})
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: c1
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: c1, context: {cluster: c, user: u}}]
`, m.URL, base64.StdEncoding.EncodeToString(ca))
}

func (m *memberAPI) serve(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	if m.settings["status"] == "401" {
		m.fail(w, http.StatusUnauthorized, metav1.StatusReasonUnauthorized, "Unauthorized")
		return
	}
	body, _ := io.ReadAll(r.Body)
	switch {
	case r.URL.Path == "/version":
		io.WriteString(w, `{"gitVersion":"v1.36.3"}`)
	case r.URL.Path == "/.well-known/openid-configuration":
		io.WriteString(w, `{"issuer":"https://kubernetes.default.svc.cluster.local"}`)
	case r.URL.Path == "/openid/v1/jwks":
		w.Write(m.keys)
	case r.URL.Path == "/api/v1/namespaces/kube-system":
		ns := corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kube-system", UID: types.UID(m.settings["uid"])}}
		ns.APIVersion, ns.Kind = "v1", "Namespace"
		json.NewEncoder(w).Encode(ns)
	case strings.HasSuffix(r.URL.Path, "/selfsubjectaccessreviews"):
		m.review(w, body)
	case strings.HasSuffix(r.URL.Path, "/token"):
		m.token(w)
	default:
		m.object(w, r, body)
	}
}

func (m *memberAPI) fail(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Reason: reason, Message: message, Code: int32(code),
	})
}

func (m *memberAPI) review(w http.ResponseWriter, body []byte) {
	var review map[string]any
	json.Unmarshal(body, &review)
	at := review["spec"].(map[string]any)["resourceAttributes"].(map[string]any)
	verb := fmt.Sprintf("%v %v", at["verb"], at["resource"])
	review["status"] = map[string]any{"allowed": !m.denied[verb]}
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(review)
}

// token answers with something that looks like one.
func (m *memberAPI) token(w http.ResponseWriter) {
	ends := time.Now().Add(24 * time.Hour)
	claims := fmt.Sprintf(`{"iat":%d,"exp":%d,"sub":"system:serviceaccount:isthmus-system:isthmus-reader"}`, time.Now().Unix(), ends.Unix())
	part := base64.RawURLEncoding.EncodeToString
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(authenticationv1.TokenRequest{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenRequest"},
		Status: authenticationv1.TokenRequestStatus{
			Token:               part([]byte(`{"alg":"ES256"}`)) + "." + part([]byte(claims)) + "." + part([]byte("signature")),
			ExpirationTimestamp: metav1.NewTime(ends),
		},
	})
}

// object keeps what is applied; the version rises only when something changes.
func (m *memberAPI) object(w http.ResponseWriter, r *http.Request, body []byte) {
	have, ok := m.objects[r.URL.Path]
	switch r.Method {
	case http.MethodGet:
		if strings.HasSuffix(r.URL.Path, "/configmaps") {
			io.WriteString(w, `{"apiVersion":"v1","kind":"ConfigMapList","items":[]}`)
			return
		}
		if !ok {
			m.fail(w, http.StatusNotFound, metav1.StatusReasonNotFound, "not found")
			return
		}
		json.NewEncoder(w).Encode(have)
	case http.MethodPatch:
		var want map[string]any
		if err := yaml.Unmarshal(body, &want); err != nil {
			m.fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
			return
		}
		text, _ := json.Marshal(want)
		if ok && have["isthmus-test"] == string(text) {
			json.NewEncoder(w).Encode(have)
			return
		}
		m.version++
		want["metadata"].(map[string]any)["resourceVersion"] = fmt.Sprint(m.version)
		want["isthmus-test"] = string(text)
		if r.URL.Query().Get("dryRun") == "" {
			m.objects[r.URL.Path] = want
		}
		json.NewEncoder(w).Encode(want)
	case http.MethodDelete:
		if !ok {
			m.fail(w, http.StatusNotFound, metav1.StatusReasonNotFound, "not found")
			return
		}
		delete(m.objects, r.URL.Path)
		io.WriteString(w, `{"apiVersion":"v1","kind":"Status","status":"Success"}`)
	default:
		m.fail(w, http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, r.Method)
	}
}
