// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/connrotation"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// TokenLifetime is what meshd asks for; it renews at a third of what it gets.
const TokenLifetime = 24 * time.Hour

// The few API groups that are read as typed protobuf. The typed client set would link
// every API of Kubernetes.
var (
	typedScheme = newScheme()
	codecs      = serializer.NewCodecFactory(typedScheme)
)

func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, discoveryv1.AddToScheme, coordinationv1.AddToScheme, authenticationv1.AddToScheme,
	} {
		if err := add(s); err != nil {
			panic(err) // the same types twice: a mistake in this list
		}
	}
	return s
}

// RESTConfig is how to reach a member with a credential.
func RESTConfig(m *registry.Member, c registry.Credential) (*rest.Config, error) {
	if c.Empty() {
		return nil, fmt.Errorf("cluster %q: no credential", m.Name)
	}
	return &rest.Config{
		Host:        m.APIServer,
		BearerToken: c.Token,
		TLSClientConfig: rest.TLSClientConfig{
			CAData: m.CertificateAuthority, ServerName: m.TLSServerName,
			CertData: c.ClientCertificate, KeyData: c.ClientKey,
		},
		UserAgent: "isthmus-meshd",
		QPS:       -1, // watches are few; a burst at the start must not be stretched
	}, nil
}

// API is a member's API server through one credential.
type API struct {
	http      *http.Client
	core      *rest.RESTClient
	discovery *rest.RESTClient
	leases    *rest.RESTClient
	tokens    *rest.RESTClient
	dynamic   *dynamic.DynamicClient
	dialer    *connrotation.Dialer
}

// NewAPI connects lazily: it fails only for a configuration that cannot be right.
func NewAPI(config *rest.Config) (*API, error) {
	config = rest.CopyConfig(config)
	dial := config.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 10 * time.Second}).DialContext
	}
	a := &API{dialer: connrotation.NewDialer(connrotation.DialFunc(dial))}
	config.Dial = a.dialer.DialContext
	config.Wrap(pingOften)
	var err error
	if a.http, err = rest.HTTPClientFor(config); err != nil {
		return nil, fmt.Errorf("api server %s: %w", config.Host, err)
	}
	for _, c := range []struct {
		to   **rest.RESTClient
		path string
		gv   schema.GroupVersion
	}{
		{&a.core, "/api", corev1.SchemeGroupVersion},
		{&a.discovery, "/apis", discoveryv1.SchemeGroupVersion},
		{&a.leases, "/apis", coordinationv1.SchemeGroupVersion},
		{&a.tokens, "/api", corev1.SchemeGroupVersion},
	} {
		typed := rest.CopyConfig(config)
		typed.APIPath, typed.GroupVersion = c.path, &c.gv
		typed.NegotiatedSerializer = codecs.WithoutConversion()
		typed.ContentType = runtime.ContentTypeProtobuf
		typed.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
		if *c.to, err = rest.RESTClientForConfigAndClient(typed, a.http); err != nil {
			return nil, fmt.Errorf("api server %s: %w", config.Host, err)
		}
	}
	if a.dynamic, err = dynamic.NewForConfigAndClient(config, a.http); err != nil {
		return nil, fmt.Errorf("api server %s: %w", config.Host, err)
	}
	return a, nil
}

// pingOften makes HTTP/2 connections that bring nothing be tried after pingAfter, and closed
// if they do not answer as quickly: else that takes 45 s, which is client-go's choice.
func pingOften(transport http.RoundTripper) http.RoundTripper {
	inner := transport
	for {
		switch t := inner.(type) {
		case *http.Transport:
			t.HTTP2 = &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingAfter}
			return transport
		case utilnet.RoundTripperWrapper:
			inner = t.WrappedRoundTripper()
		default:
			return transport
		}
	}
}

// pingAfter is how long a connection may bring nothing, and a ping take.
const pingAfter = 5 * time.Second

// hangUp closes all connections. What was waiting on them fails now, instead of when TCP
// gives up.
func (a *API) hangUp() { a.dialer.CloseAll() }

// ClusterID asks who the cluster is: the UID of its namespace kube-system.
func (a *API) ClusterID(ctx context.Context) (federation.ClusterID, error) {
	var ns corev1.Namespace
	if err := a.core.Get().Resource("namespaces").Name(metav1.NamespaceSystem).Do(ctx).Into(&ns); err != nil {
		return "", err
	}
	return federation.ClusterID(ns.UID), nil
}

// Version is the API server's, "v1.36.3".
func (a *API) Version(ctx context.Context) (string, error) {
	body, err := a.core.Get().AbsPath("/version").SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw()
	if err != nil {
		return "", err
	}
	var v struct {
		GitVersion string `json:"gitVersion"`
	}
	if err := json.Unmarshal(body, &v); err != nil {
		return "", fmt.Errorf("/version: %w", err)
	}
	return v.GitVersion, nil
}

// JWKS fetches the keys of the cluster's service account issuer (RFC 7517) and its name.
func (a *API) JWKS(ctx context.Context) (keys json.RawMessage, issuer string, err error) {
	body, err := a.core.Get().AbsPath("/.well-known/openid-configuration").SetHeader("Accept", "*/*").Do(ctx).Raw()
	if err != nil {
		return nil, "", fmt.Errorf("issuer of service account tokens: %w", err)
	}
	var discovery struct {
		Issuer string `json:"issuer"`
	}
	if err := json.Unmarshal(body, &discovery); err != nil {
		return nil, "", fmt.Errorf("issuer of service account tokens: %w", err)
	}
	keys, err = a.core.Get().AbsPath("/openid/v1/jwks").SetHeader("Accept", "*/*").Do(ctx).Raw()
	if err != nil {
		return nil, "", fmt.Errorf("keys of service account tokens: %w", err)
	}
	thumbprints, err := registry.KeyThumbprints(keys)
	if err != nil {
		return nil, "", fmt.Errorf("keys of service account tokens: %w", err)
	}
	if len(thumbprints) == 0 {
		return nil, "", errors.New("keys of service account tokens: the API server publishes none")
	}
	return keys, discovery.Issuer, nil
}

// RequestToken asks for a token of a service account, for the API server itself (empty
// audiences) or for others. The API server may grant another lifetime.
func (a *API) RequestToken(ctx context.Context, namespace, account string, lifetime time.Duration, audiences ...string) (registry.Credential, error) {
	seconds := int64(lifetime / time.Second)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences, ExpirationSeconds: &seconds}}
	var answer authenticationv1.TokenRequest
	err := a.tokens.Post().Namespace(namespace).Resource("serviceaccounts").Name(account).SubResource("token").
		Body(request).Do(ctx).Into(&answer)
	if err != nil {
		return registry.Credential{}, fmt.Errorf("token of service account %s/%s: %w", namespace, account, err)
	}
	return tokenCredential(answer.Status.Token, answer.Status.ExpirationTimestamp.Time)
}

func tokenCredential(token string, expires time.Time) (registry.Credential, error) {
	c := registry.Credential{Token: token, Expires: expires}
	issued, until, err := registry.ParseTokenTimes(token)
	if err != nil {
		return c, err
	}
	c.Issued = issued
	if c.Expires.IsZero() {
		c.Expires = until
	}
	return c, nil
}

// ParseRemoteSecret reads the Secret that `istioctl create-remote-secret` prints: a
// kubeconfig for each cluster, under the cluster's name. Only APIServer,
// CertificateAuthority, TLSServerName and Name of the member are set. ID is not: it has to
// be asked from the API server.
func ParseRemoteSecret(secret []byte) (*registry.Member, registry.Credential, error) {
	var none registry.Credential
	var s corev1.Secret
	if _, _, err := codecs.UniversalDeserializer().Decode(secret, nil, &s); err != nil {
		return nil, none, fmt.Errorf("remote secret: %w", err)
	}
	data := map[string][]byte{}
	for k, v := range s.Data {
		data[k] = v
	}
	for k, v := range s.StringData {
		data[k] = []byte(v)
	}
	if len(data) != 1 {
		return nil, none, fmt.Errorf("remote secret %q: has %d entries, want one kubeconfig", s.Name, len(data))
	}
	for name, kubeconfig := range data {
		m, c, err := parseKubeconfig(name, kubeconfig)
		if err != nil {
			return nil, none, fmt.Errorf("remote secret %q, entry %q: %w", s.Name, name, err)
		}
		return m, c, nil
	}
	panic("unreachable")
}

func parseKubeconfig(name string, kubeconfig []byte) (*registry.Member, registry.Credential, error) {
	var none registry.Credential
	file, err := clientcmd.Load(kubeconfig)
	if err != nil {
		return nil, none, err
	}
	current := file.Contexts[file.CurrentContext]
	if current == nil {
		return nil, none, fmt.Errorf("current-context %q does not exist", file.CurrentContext)
	}
	cluster, user := file.Clusters[current.Cluster], file.AuthInfos[current.AuthInfo]
	if cluster == nil || user == nil {
		return nil, none, fmt.Errorf("context %q names cluster %q and user %q, and one of them does not exist", file.CurrentContext, current.Cluster, current.AuthInfo)
	}
	switch {
	case user.Exec != nil, user.AuthProvider != nil, user.TokenFile != "", user.ClientKey != "", cluster.CertificateAuthority != "":
		// A Secret from elsewhere must not make meshd run a program or read a file.
		return nil, none, errors.New("uses exec, an auth provider or files; want a token or certificate inside the kubeconfig")
	case cluster.InsecureSkipTLSVerify:
		return nil, none, errors.New("insecure-skip-tls-verify is set; want certificate-authority-data")
	case user.Token == "" && len(user.ClientCertificateData) == 0:
		return nil, none, fmt.Errorf("user %q has neither token nor client certificate", current.AuthInfo)
	}
	m := &registry.Member{CertificateAuthority: cluster.CertificateAuthorityData, TLSServerName: cluster.TLSServerName}
	m.Name, m.APIServer = name, cluster.Server
	c := registry.Credential{Token: user.Token, ClientCertificate: user.ClientCertificateData, ClientKey: user.ClientKeyData}
	if user.Token != "" {
		if parsed, err := tokenCredential(user.Token, time.Time{}); err == nil {
			c = parsed
		}
	}
	return m, c, nil
}

// tokenAccount is the service account of a token, from its claims.
func tokenAccount(token string) (namespace, name string, ok bool) {
	subject, err := registry.TokenSubject(token)
	if err != nil {
		return "", "", false
	}
	rest, ok := strings.CutPrefix(subject, "system:serviceaccount:")
	if !ok {
		return "", "", false
	}
	return strings.Cut(rest, ":")
}

// resources lists what can be watched in an API group: its preferred version, and nothing
// if there is no such group.
func (a *API) resources(ctx context.Context, group string) ([]schema.GroupVersionResource, map[schema.GroupVersionResource]string, error) {
	get := func(path string, into any) error {
		body, err := a.core.Get().AbsPath(path).SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw()
		if err != nil {
			return err
		}
		return json.Unmarshal(body, into)
	}
	var g metav1.APIGroup
	if err := get("/apis/"+group, &g); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil, nil
		}
		return nil, nil, err
	}
	var out []schema.GroupVersionResource
	kinds := map[schema.GroupVersionResource]string{}
	seen := map[string]bool{}
	versions := []metav1.GroupVersionForDiscovery{g.PreferredVersion}
	for _, v := range g.Versions {
		if v != g.PreferredVersion {
			versions = append(versions, v)
		}
	}
	for _, v := range versions {
		var list metav1.APIResourceList
		if err := get("/apis/"+v.GroupVersion, &list); err != nil {
			if apierrors.IsNotFound(err) {
				continue
			}
			return nil, nil, err
		}
		for _, r := range list.APIResources {
			if strings.Contains(r.Name, "/") || seen[r.Name] || !slices.Contains(r.Verbs, "watch") || !slices.Contains(r.Verbs, "list") {
				continue
			}
			seen[r.Name] = true
			gvr := schema.GroupVersionResource{Group: group, Version: v.Version, Resource: r.Name}
			out = append(out, gvr)
			kinds[gvr] = r.Kind
		}
	}
	return out, kinds, nil
}
