// SPDX-License-Identifier: Apache-2.0

package config

import (
	"strings"

	"google.golang.org/protobuf/proto"
	extensions "istio.io/api/extensions/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	networkingbeta "istio.io/api/networking/v1beta1"
	security "istio.io/api/security/v1beta1"
	telemetry "istio.io/api/telemetry/v1alpha1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayalpha "sigs.k8s.io/gateway-api/apis/v1alpha2"
	gatewaybeta "sigs.k8s.io/gateway-api/apis/v1beta1"
	mcsalpha "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"
	mcs "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"
)

// The API groups whose objects the mesh understands.
const (
	NetworkingGroup = "networking.istio.io"
	SecurityGroup   = "security.istio.io"
	TelemetryGroup  = "telemetry.istio.io"
	ExtensionsGroup = "extensions.istio.io"
	GatewayGroup    = "gateway.networking.k8s.io"
	MCSGroup        = "multicluster.x-k8s.io"
)

// kind knows how to read one kind. Istio's have the same shape in all their versions, and
// only a spec; the others are whole objects of a version.
type kind struct {
	spec   func() proto.Message
	object map[string]func() any // by version
	table  fields                // what is translated; nil: nothing yet
}

// kinds by group and kind.
var kinds = map[string]kind{
	NetworkingGroup + "/VirtualService":  {spec: func() proto.Message { return &networking.VirtualService{} }, table: virtualServiceFields},
	NetworkingGroup + "/DestinationRule": {spec: func() proto.Message { return &networking.DestinationRule{} }, table: destinationRuleFields},
	NetworkingGroup + "/Sidecar":         {spec: func() proto.Message { return &networking.Sidecar{} }, table: sidecarFields},
	NetworkingGroup + "/Gateway":         {spec: func() proto.Message { return &networking.Gateway{} }},
	NetworkingGroup + "/ServiceEntry":    {spec: func() proto.Message { return &networking.ServiceEntry{} }},
	NetworkingGroup + "/WorkloadEntry":   {spec: func() proto.Message { return &networking.WorkloadEntry{} }},
	NetworkingGroup + "/WorkloadGroup":   {spec: func() proto.Message { return &networking.WorkloadGroup{} }},
	NetworkingGroup + "/EnvoyFilter":     {spec: func() proto.Message { return &networking.EnvoyFilter{} }},
	NetworkingGroup + "/ProxyConfig":     {spec: func() proto.Message { return &networkingbeta.ProxyConfig{} }},

	SecurityGroup + "/PeerAuthentication":    {spec: func() proto.Message { return &security.PeerAuthentication{} }, table: peerAuthenticationFields},
	SecurityGroup + "/RequestAuthentication": {spec: func() proto.Message { return &security.RequestAuthentication{} }},
	SecurityGroup + "/AuthorizationPolicy":   {spec: func() proto.Message { return &security.AuthorizationPolicy{} }},

	TelemetryGroup + "/Telemetry":         {spec: func() proto.Message { return &telemetry.Telemetry{} }},
	ExtensionsGroup + "/WasmPlugin":       {spec: func() proto.Message { return &extensions.WasmPlugin{} }},
	ExtensionsGroup + "/TrafficExtension": {spec: func() proto.Message { return &extensions.TrafficExtension{} }},

	GatewayGroup + "/GatewayClass": {object: map[string]func() any{
		"v1": func() any { return &gatewayv1.GatewayClass{} }, "v1beta1": func() any { return &gatewaybeta.GatewayClass{} }}},
	GatewayGroup + "/Gateway": {object: map[string]func() any{
		"v1": func() any { return &gatewayv1.Gateway{} }, "v1beta1": func() any { return &gatewaybeta.Gateway{} }}},
	GatewayGroup + "/HTTPRoute": {object: map[string]func() any{
		"v1": func() any { return &gatewayv1.HTTPRoute{} }, "v1beta1": func() any { return &gatewaybeta.HTTPRoute{} }}},
	GatewayGroup + "/GRPCRoute": {object: map[string]func() any{"v1": func() any { return &gatewayv1.GRPCRoute{} }}},
	GatewayGroup + "/TLSRoute": {object: map[string]func() any{
		"v1": func() any { return &gatewayv1.TLSRoute{} }, "v1alpha2": func() any { return &gatewayalpha.TLSRoute{} }}},
	GatewayGroup + "/TCPRoute": {object: map[string]func() any{
		"v1": func() any { return &gatewayv1.TCPRoute{} }, "v1alpha2": func() any { return &gatewayalpha.TCPRoute{} }}},
	GatewayGroup + "/UDPRoute": {object: map[string]func() any{
		"v1": func() any { return &gatewayv1.UDPRoute{} }, "v1alpha2": func() any { return &gatewayalpha.UDPRoute{} }}},
	GatewayGroup + "/ListenerSet":      {object: map[string]func() any{"v1": func() any { return &gatewayv1.ListenerSet{} }}},
	GatewayGroup + "/BackendTLSPolicy": {object: map[string]func() any{"v1": func() any { return &gatewayv1.BackendTLSPolicy{} }}},
	GatewayGroup + "/ReferenceGrant": {object: map[string]func() any{
		"v1": func() any { return &gatewayv1.ReferenceGrant{} }, "v1beta1": func() any { return &gatewaybeta.ReferenceGrant{} }}},

	MCSGroup + "/ServiceExport": {object: map[string]func() any{
		"v1beta1": func() any { return &mcs.ServiceExport{} }, "v1alpha1": func() any { return &mcsalpha.ServiceExport{} }}},
	MCSGroup + "/ServiceImport": {object: map[string]func() any{
		"v1beta1": func() any { return &mcs.ServiceImport{} }, "v1alpha1": func() any { return &mcsalpha.ServiceImport{} }}},
}

// istioVersions are the versions under which Istio's kinds may come.
var istioVersions = []string{"v1", "v1beta1", "v1alpha3", "v1alpha1"}

// Known tells whether objects of that group and kind are understood, whatever their
// version: those are the kinds worth watching.
func Known(group, name string) bool {
	_, ok := kinds[group+"/"+name]
	return ok
}

// splitAPIVersion is group and version of "group/version"; the core group is empty.
func splitAPIVersion(apiVersion string) (group, version string) {
	if group, version, ok := strings.Cut(apiVersion, "/"); ok {
		return group, version
	}
	return "", apiVersion
}
