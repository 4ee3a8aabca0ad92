// SPDX-License-Identifier: Apache-2.0

package xds

import (
	networking "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/federation"
)

// Index answers what users want.
type Index interface {
	SelectorKeys() []string
	MutualTLS(namespace string, labels map[string]string, port uint32) string
	Imports(namespace string, labels map[string]string, service federation.ServiceName, port uint32) bool
	RegistryOnly(namespace string, labels map[string]string) bool
	DestinationRule(namespace string, labels map[string]string, service federation.ServiceName) (*networking.DestinationRule, string)
	VirtualService(namespace string, labels map[string]string, host string) (*networking.VirtualService, string)
}
