// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	security "istio.io/api/security/v1alpha1"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/api"
)

// Certificate asks meshd for a certificate as a pod's agent does: with a token of the
// workload's first pod. The request names name besides, where it is not empty. The
// answer is PEM, key and chain.
func (s *Stage) Certificate(ctx context.Context, cluster, workload, name string) ([]byte, error) {
	token, err := s.podToken(ctx, cluster, workload)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.CertificateRequest{}
	if name != "" {
		uri, err := url.Parse(name)
		if err != nil {
			return nil, err
		}
		template.URIs = []*url.URL{uri}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, err
	}
	conn, err := s.dialAuthority()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token), Patience)
	defer cancel()
	answer, err := security.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &security.IstioCertificateRequest{
		Csr: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})),
	})
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for _, c := range answer.GetCertChain() {
		out = append(out, strings.TrimSpace(c)+"\n"...)
	}
	return out, nil
}

// podToken asks the cluster for a token as the kubelet does for a pod's volume.
func (s *Stage) podToken(ctx context.Context, cluster, workload string) (string, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return "", err
	}
	pods, err := s.Pods(ctx, cluster, workload)
	if err != nil || len(pods) == 0 {
		return "", fmt.Errorf("no pod of %s in %s: %w", workload, cluster, err)
	}
	pod, lifetime := pods[0], int64(3600)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: []string{"isthmus-ca"}, ExpirationSeconds: &lifetime,
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	answer, err := c.Client().CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, pod.Spec.ServiceAccountName, request, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return answer.Status.Token, nil
}

// dialAuthority connects the laptop to the first meshd's certificate authority.
func (s *Stage) dialAuthority() (*grpc.ClientConn, error) {
	admin, err := api.LoadAdminConfig(filepath.Join(s.first.dataDir, "admin.conf"))
	if err != nil {
		return nil, err
	}
	trust, err := admin.TLS()
	if err != nil {
		return nil, err
	}
	trust.Certificates, trust.GetClientCertificate = nil, nil // the pod's token is who asks
	dial := func(ctx context.Context, address string) (net.Conn, error) { return s.Laptop.Dial(ctx, "tcp", address) }
	return grpc.NewClient("passthrough:///"+s.first.Host.Addr().String()+":15012",
		grpc.WithTransportCredentials(credentials.NewTLS(trust)), grpc.WithContextDialer(dial))
}

// Knock is a connection to a gateway by somebody who makes up what a proxy would say.
type Knock struct {
	SNI         string // byte for byte
	ALPN        []string
	Certificate string // file with key and chain; "" shows none
}

// ErrGateway and ErrCallee say who closed the connection.
var (
	ErrGateway = errors.New("refused by the gateway")
	ErrCallee  = errors.New("refused by the workload behind the gateway")
)

// Knock connects from the transit network to a cluster's gateway, and asks what answers
// for one page by HTTP. A refusal is ErrGateway or ErrCallee; any other error means that
// the try itself went wrong.
func (s *Stage) Knock(ctx context.Context, cluster string, k Knock) (string, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return "", err
	}
	service, err := c.Client().CoreV1().Services("isthmus-system").Get(ctx, "isthmus-eastwestgateway", metav1.GetOptions{})
	if err != nil || len(service.Status.LoadBalancer.Ingress) == 0 {
		return "", fmt.Errorf("the gateway of %s has no address: %w", cluster, err)
	}
	conn, err := s.Laptop.Dial(ctx, "tcp", net.JoinHostPort(service.Status.LoadBalancer.Ingress[0].IP, "15443"))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	heard := &listener{Conn: conn}
	text, err := k.ask(heard)
	if timeout := net.Error(nil); errors.As(err, &timeout) && timeout.Timeout() {
		return "", fmt.Errorf("%s: neither answered nor refused: %w", k.SNI, err)
	}
	switch {
	case err == nil:
		return text, nil
	case !heard.any:
		return "", fmt.Errorf("%s: %w: %w", k.SNI, ErrGateway, err)
	}
	return "", fmt.Errorf("%s: %w: %w", k.SNI, ErrCallee, err)
}

func (k Knock) ask(conn net.Conn) (string, error) {
	config := &tls.Config{ServerName: k.SNI, NextProtos: k.ALPN, InsecureSkipVerify: true}
	if bare, ok := strings.CutSuffix(k.SNI, "."); ok {
		// Go's client cuts the dot off, so it is written into the hello afterwards. Who
		// answers such a hello is not understood, but has answered.
		config.ServerName = bare + "x"
		conn = &renamed{conn, []byte(config.ServerName), []byte(k.SNI)}
	}
	if k.Certificate != "" {
		text, err := os.ReadFile(k.Certificate)
		if err != nil {
			return "", err
		}
		pair, err := tls.X509KeyPair(text, text)
		if err != nil {
			return "", fmt.Errorf("%s: %w", k.Certificate, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	session := tls.Client(conn, config)
	if _, err := fmt.Fprint(session, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return "", err
	}
	answer := make([]byte, 4096)
	n, err := session.Read(answer)
	if err != nil {
		return "", err
	}
	return string(answer[:n]), nil
}

// listener notices whether anything was said: a gateway itself never says a word.
type listener struct {
	net.Conn
	any bool
}

func (l *listener) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	l.any = l.any || n > 0
	return n, err
}

// renamed replaces a name in what is written.
type renamed struct {
	net.Conn
	from, to []byte
}

func (r *renamed) Write(b []byte) (int, error) {
	return r.Conn.Write(bytes.ReplaceAll(b, r.from, r.to))
}
