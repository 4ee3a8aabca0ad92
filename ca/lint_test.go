// SPDX-License-Identifier: Apache-2.0

package ca_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// Whatever differs from what was decided is noticed before it leaves.
func TestLintNoticesEveryDeviation(t *testing.T) {
	t.Parallel()
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	other := uri("spiffe://cluster.local/ns/shop/sa/admin")
	for name, test := range map[string]struct {
		change func(*x509.Certificate)
		want   string // empty: passes
	}{
		"as decided":            {func(*x509.Certificate) {}, ""},
		"another identity":      {func(c *x509.Certificate) { c.URIs = []*url.URL{other} }, "X-1"},
		"a second identity":     {func(c *x509.Certificate) { c.URIs = append(c.URIs, other) }, "X-1"},
		"no identity":           {func(c *x509.Certificate) { c.URIs = nil }, "X-1"},
		"a DNS name":            {func(c *x509.Certificate) { c.DNSNames = []string{"a.test"} }, "names"},
		"an address":            {func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }, "names"},
		"an email address":      {func(c *x509.Certificate) { c.EmailAddresses = []string{"a@b.test"} }, "unexpected"},
		"an authority":          {func(c *x509.Certificate) { c.IsCA = true }, "X-4"},
		"no basic constraints":  {func(c *x509.Certificate) { c.BasicConstraintsValid = false }, "X-4"},
		"more key usages":       {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyAgreement }, "X-5"},
		"signs certificates":    {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, "X-5"},
		"client only":           {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }, "X-6"},
		"signs code, too":       {func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageCodeSigning) }, "X-6"},
		"lives longer":          {func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(-time.Second) }, "valid"},
		"outlives its issuer":   {func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) }, "outside"},
		"begins earlier":        {func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(-time.Hour) }, "outside"},
		"another source":        {func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"kube:c2"} }, "subject"},
		"another instance":      {func(c *x509.Certificate) { c.Subject.SerialNumber = "pod-2" }, "subject"},
		"a common name":         {func(c *x509.Certificate) { c.Subject.CommonName = "x" }, "subject"},
		"a small serial number": {func(c *x509.Certificate) { c.SerialNumber = big.NewInt(7) }, "serial"},
		"a foreign key ID":      {func(c *x509.Certificate) { c.SubjectKeyId = []byte{1} }, "key identifier"},
		"another extension": {func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}}}
		}, "extension"},
		"an endless request": {func(c *x509.Certificate) { c.OCSPServer = []string{"http://a.test"} }, "extension"},
	} {
		err := ca.LintLeaf(t, test.change)
		if test.want == "" && err != nil || test.want != "" && (!errors.Is(err, ca.ErrLint) || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v; want %q", name, err, test.want)
		}
	}
	for name, test := range map[string]struct {
		change func(*x509.Certificate)
		want   string
	}{
		"as it is":               {func(*x509.Certificate) {}, ""},
		"no authority":           {func(c *x509.Certificate) { c.IsCA, c.MaxPathLenZero = false, false }, "X-8"},
		"signs messages":         {func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }, "X-8"},
		"for servers":            {func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "extension"},
		"an identity":            {func(c *x509.Certificate) { c.URIs = []*url.URL{other} }, "X-9"},
		"another trust domain":   {func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://evil.test")} }, "X-9"},
		"authorities below it":   {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false }, "further authorities"},
		"no constraint":          {func(c *x509.Certificate) { c.PermittedURIDomains = nil }, "constrained"},
		"a wider constraint":     {func(c *x509.Certificate) { c.PermittedURIDomains = append(c.PermittedURIDomains, "evil.test") }, "constrained"},
		"another source's":       {func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"kube:c2"} }, "kube:c2"},
		"longer than its issuer": {func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) }, "outside"},
	} {
		err := ca.LintAuthority(t, test.change)
		if test.want == "" && err != nil || test.want != "" && (!errors.Is(err, ca.ErrLint) || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("authority: %s: %v; want %q", name, err, test.want)
		}
	}
}

// notOurs are zlint's rules that the SPIFFE specification or the house overrules.
var notOurs = map[string]string{
	"e_ext_san_uri_host_not_fqdn_or_ip": "a trust domain is no host name",
}

// What zlint, which knows nothing of this house, makes of every profile.
func TestZlintFindsNothing(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: lint.SourceList{lint.RFC5280, lint.RFC5480}})
	if err != nil {
		t.Fatal(err)
	}
	serving, admin := c.Serving(t, "meshd.example", "127.0.0.1", "::1"), c.Admin(t)
	pod, machine := c.Leaf(t, reviews), c.Leaf(t, catest.Subject("vm:n1", "web-1", "legacy"))
	all := map[string][]byte{
		"root": c.Bundle().Roots[0].Raw, "serving": serving.Certificate[0], "admin": admin.Certificate[0], "issuer of meshd": admin.Certificate[1],
		"pod": pod.Certificate[0], "issuer of a cluster": pod.Certificate[1], "machine": machine.Certificate[0], "issuer of a network": machine.Certificate[1],
	}
	for name, der := range all {
		parsed, err := zx509.ParseCertificate(der)
		if err != nil {
			t.Errorf("%s: zcrypto: %v", name, err)
			continue
		}
		ran := 0
		for rule, result := range zlint.LintCertificateEx(parsed, registry).Results {
			if result.Status != lint.NA && result.Status != lint.NE {
				ran++
			}
			if result.Status >= lint.Notice && notOurs[rule] == "" {
				t.Errorf("%s: %s: %v %s", name, rule, result.Status, result.Details)
			}
		}
		if ran < 20 {
			t.Errorf("%s: only %d rules applied", name, ran)
		}
	}
}

// Prepare decides by what it is given: the same again is the same, and nothing is changed by deciding.
func TestDecisionIsPure(t *testing.T) {
	t.Parallel()
	c := catest.New(t)
	before, err := c.State.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	lines, now := len(c.AuditEntries(t)), time.Now()
	for _, req := range []ca.Request{
		request(t, nil), request(t, &x509.CertificateRequest{DNSNames: []string{"evil.test"}}), {Subject: reviews}, {},
		{Subject: ca.Subject{Source: "kube:new", Instance: "p", Namespace: "shop", ServiceAccount: "x"}, CSR: request(t, nil).CSR},
	} {
		first := c.Decide(req, now)
		for range 3 {
			if again := c.Decide(req, now); again != first {
				t.Errorf("decided %q, then %q", first, again)
			}
		}
	}
	after, err := c.State.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(after) != len(before) || len(c.AuditEntries(t)) != lines {
		t.Errorf("deciding wrote: %d values, then %d; %d audit lines, then %d", len(before), len(after), lines, len(c.AuditEntries(t)))
	}
}

func TestLifetimesOfNamespaces(t *testing.T) {
	t.Parallel()
	c := catest.New(t, func(cfg *ca.Config) {
		cfg.Lifetimes = map[string]time.Duration{"payments": 10 * time.Minute, "batch": 7 * 24 * time.Hour, ca.ControlNamespace: time.Hour}
	})
	for _, test := range []struct {
		source             ca.Source
		namespace, account string
		wish, want         time.Duration
	}{
		{east, "shop", "web", 0, 24 * time.Hour},
		{east, "payments", "web", 0, 10 * time.Minute},
		{"vm:n1", "payments", "web", 24 * time.Hour, 10 * time.Minute},
		{east, "payments", "web", time.Minute, 5 * time.Minute},
		{east, "batch", "web", 0, 7 * 24 * time.Hour},
		{east, "batch", "web", 48 * time.Hour, 48 * time.Hour},
		{east, ca.ControlNamespace, "isthmus-eastwestgateway", 0, time.Hour},
		{ca.SourceMeshd, ca.ControlNamespace, ca.ControlAccount, 0, 24 * time.Hour},
		{ca.SourceMeshd, ca.ControlNamespace, ca.AdminAccount, 0, 365 * 24 * time.Hour},
	} {
		req := request(t, nil)
		req.Subject = ca.Subject{Source: test.source, Instance: "i", Namespace: test.namespace, ServiceAccount: test.account}
		req.Lifetime = test.wish
		issued, err := c.Issue(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if got := time.Until(issued.Leaf.NotAfter); got > test.want || got < test.want-time.Minute {
			t.Errorf("%s/%s of %s, wish %v: lives %v, want %v", test.namespace, test.account, test.source, test.wish, got, test.want)
		}
	}
	for _, bad := range []time.Duration{0, time.Second, ca.MaxLifetime + time.Second} {
		_, err := replica(t, new(ca.Memory), sealer(t), func(cfg *ca.Config) { cfg.Lifetimes = map[string]time.Duration{"shop": bad} })
		if err == nil || !strings.Contains(err.Error(), "shop") {
			t.Errorf("a lifetime of %v: %v; want the namespace named", bad, err)
		}
	}
}
