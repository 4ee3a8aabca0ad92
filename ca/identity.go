// SPDX-License-Identifier: Apache-2.0

package ca

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of the SPIFFE ID specification (2.3) that go-spiffe does not enforce, in bytes.
const (
	maxTrustDomain = 255
	maxID          = 2048
)

// Source names what vouches for a workload: "kube:<uid of kube-system>", "vm:<network>" or "meshd".
// It is the organizational unit of every certificate, which holds at most 64 characters.
type Source string

// SourceMeshd is the source of the control service's own certificates and of its administrators'.
const SourceMeshd Source = "meshd"

// The namespace and the accounts that only SourceMeshd may have, whatever a cluster's grant says.
const (
	ControlNamespace = "isthmus-system"
	ControlAccount   = "meshd"
	AdminAccount     = "admin"
)

var (
	sourceShape   = regexp.MustCompile(`^(kube|vm):[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)
	instanceShape = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)
	labelShape    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	subdomain     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
)

// ParseSource checks that s is a source.
func ParseSource(s string) (Source, error) {
	if s == string(SourceMeshd) {
		return SourceMeshd, nil
	}
	if len(s) > 64 {
		return "", fmt.Errorf("source %.80q has %d characters, at most 64 fit a certificate", s, len(s))
	}
	if !sourceShape.MatchString(s) {
		return "", fmt.Errorf("source %q is not kube:<uid>, vm:<network> or meshd", s)
	}
	return Source(s), nil
}

// Cluster gives the UID of a joined cluster, and false for any other source.
func (s Source) Cluster() (string, bool) { return strings.CutPrefix(string(s), "kube:") }

// Network gives the network of a source of virtual machines, and false for any other source.
func (s Source) Network() (string, bool) { return strings.CutPrefix(string(s), "vm:") }

// Subject is an attested workload: what a credential proved, never what its holder claimed.
type Subject struct {
	Source         Source
	Instance       string // pod UID or name of the virtual machine; at most 64 characters
	Namespace      string
	ServiceAccount string
}

// Check reports what keeps the subject from being written into a certificate.
func (s Subject) Check() error {
	if _, err := ParseSource(string(s.Source)); err != nil {
		return fmt.Errorf("%w: %w", ErrSubject, err)
	}
	switch {
	case len(s.Instance) > 64 || !instanceShape.MatchString(s.Instance):
		return fmt.Errorf("%w: instance %.80q: want 1 to 64 letters, digits, dots, underscores or dashes", ErrSubject, s.Instance)
	case len(s.Namespace) > 63 || !labelShape.MatchString(s.Namespace):
		return fmt.Errorf("%w: namespace %.80q: want a lower-case DNS label", ErrSubject, s.Namespace)
	case len(s.ServiceAccount) > 253 || !subdomain.MatchString(s.ServiceAccount):
		return fmt.Errorf("%w: service account %.80q: want a lower-case DNS name", ErrSubject, s.ServiceAccount)
	}
	return nil
}

// reserved tells whether the identity belongs to the control service alone.
func (s Subject) reserved() bool {
	return s.Namespace == ControlNamespace && (s.ServiceAccount == ControlAccount || s.ServiceAccount == AdminAccount)
}

// ID is the subject's SPIFFE ID in the trust domain.
func (s Subject) ID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	id, err := spiffeid.FromSegments(td, "ns", s.Namespace, "sa", s.ServiceAccount)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("%w: %w", ErrSubject, err)
	}
	if len(id.String()) > maxID {
		return spiffeid.ID{}, fmt.Errorf("%w: SPIFFE ID has %d bytes, at most %d", ErrSubject, len(id.String()), maxID)
	}
	return id, nil
}

// Identity is what a verified certificate says about its holder.
type Identity struct {
	Subject
	ID        spiffeid.ID
	Serial    string // lower-case hexadecimal, as in the audit log
	Authority string // ID of the issuer that signed it, see Issuer
	NotBefore time.Time
	NotAfter  time.Time
}

// IsAdmin tells whether this is an administrator of the control service (the holder of admin.conf).
func (i Identity) IsAdmin() bool {
	return i.Source == SourceMeshd && i.Namespace == ControlNamespace && i.ServiceAccount == AdminAccount
}

// ParseTrustDomain accepts the name of a trust domain, within the limits of the specification.
func ParseTrustDomain(name string) (spiffeid.TrustDomain, error) {
	if len(name) > maxTrustDomain {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %.80q… has %d bytes, at most %d", name, len(name), maxTrustDomain)
	}
	if strings.Contains(name, "/") {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: want the bare name, without scheme and path", name)
	}
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: %w", name, err)
	}
	return td, nil
}

// ParseID accepts a SPIFFE ID within the limits of the specification. Nothing is folded or cleaned.
func ParseID(s string) (spiffeid.ID, error) {
	if len(s) > maxID {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %.80q… has %d bytes, at most %d", s, len(s), maxID)
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %q: %w", s, err)
	}
	if n := len(id.TrustDomain().Name()); n > maxTrustDomain {
		return spiffeid.ID{}, fmt.Errorf("SPIFFE ID %.80q…: trust domain has %d bytes, at most %d", s, n, maxTrustDomain)
	}
	return id, nil
}

// workloadOf reads namespace and service account out of /ns/<namespace>/sa/<account>.
func workloadOf(id spiffeid.ID) (namespace, account string, err error) {
	parts := strings.Split(id.Path(), "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" {
		return "", "", fmt.Errorf("SPIFFE ID %q: path is not /ns/<namespace>/sa/<account>", id)
	}
	return parts[2], parts[4], nil
}
