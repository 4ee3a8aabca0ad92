// SPDX-License-Identifier: Apache-2.0

// Package bootstrap writes the configuration that an Envoy starts with: who it
// is, and that everything else comes over the agent's Unix socket.
//
// It is pure: from a Config to Envoy's own message, rendered as JSON.
package bootstrap

import (
	"fmt"
	"net/netip"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	downstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/downstream_connections/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	// AdminPort is Envoy's admin interface, on loopback only.
	AdminPort = 15000
	// StatsPort serves Envoy's own metrics, and nothing else of the admin
	// interface, on all addresses.
	StatsPort = 15090
	// XDSCluster and SDSCluster are the static clusters on the agent's socket.
	XDSCluster = "xds-grpc"
	// SDSCluster is what TLS contexts name for their secrets.
	SDSCluster = "sds-grpc"
)

// Config says who the Envoy is. NodeType, Name, Namespace, Address and Socket
// are required.
type Config struct {
	// NodeType is "sidecar" or "router".
	NodeType string
	// Name of the pod or VM, and its namespace.
	Name, Namespace string
	// Domain of the cluster; empty means cluster.local.
	Domain string
	// Address is the workload's first address.
	Address netip.Addr
	// Cluster is Envoy's own "cluster" label: what the proxies of one workload
	// have in common; empty means name.namespace.
	Cluster string
	// Region, Zone and SubZone, where known.
	Region, Zone, SubZone string
	// Metadata is sent as it is, in Istio's keys.
	Metadata map[string]any
	// Socket is the path of the agent's Unix socket.
	Socket string
	// AdminPort and StatsPort replace the standard ones; 0 means standard.
	AdminPort, StatsPort uint16
	// AccessLog writes a line for each request and connection from the start. Without it
	// POST /runtime_modify?isthmus.access_log=100 at the admin port turns it on.
	AccessLog bool
	// MaxConnections bounds downstream connections; 0 means 100,000.
	MaxConnections int64
}

// NodeID is type~address~name.namespace~namespace.svc.domain, as Istio has it.
func (c *Config) NodeID() string {
	return fmt.Sprintf("%s~%s~%s.%s~%s.svc.%s", c.NodeType, c.Address, c.Name, c.Namespace, c.Namespace, c.domain())
}

func (c *Config) domain() string {
	if c.Domain == "" {
		return "cluster.local"
	}
	return c.Domain
}

// JSON renders the bootstrap for Envoy's --config-path.
func (c *Config) JSON() ([]byte, error) {
	b, err := c.Build()
	if err != nil {
		return nil, err
	}
	data, err := protojson.MarshalOptions{Multiline: true, UseProtoNames: true}.Marshal(b)
	if err != nil {
		return nil, fmt.Errorf("render bootstrap: %w", err)
	}
	return append(data, '\n'), nil
}

// Build makes the message.
func (c *Config) Build() (*bootstrapv3.Bootstrap, error) {
	if c.NodeType != "sidecar" && c.NodeType != "router" {
		return nil, fmt.Errorf("bootstrap: node type %q: want sidecar or router", c.NodeType)
	}
	if c.Name == "" || c.Namespace == "" || !c.Address.IsValid() || c.Socket == "" {
		return nil, fmt.Errorf("bootstrap of %q in namespace %q at %s on socket %q: all four are needed", c.Name, c.Namespace, c.Address, c.Socket)
	}
	metadata, err := structpb.NewStruct(c.Metadata)
	if err != nil {
		return nil, fmt.Errorf("bootstrap: metadata: %w", err)
	}
	stats, err := statsListener(orDefault(c.StatsPort, StatsPort))
	if err != nil {
		return nil, err
	}
	overload, err := c.overload()
	if err != nil {
		return nil, err
	}
	clusters, err := staticClusters(c.Socket, orDefault(c.AdminPort, AdminPort))
	if err != nil {
		return nil, err
	}
	cluster := c.Cluster
	if cluster == "" {
		cluster = c.Name + "." + c.Namespace
	}
	return &bootstrapv3.Bootstrap{
		Node: &corev3.Node{
			Id:       c.NodeID(),
			Cluster:  cluster,
			Metadata: metadata,
			Locality: &corev3.Locality{Region: c.Region, Zone: c.Zone, SubZone: c.SubZone},
		},
		Admin:              &bootstrapv3.Admin{Address: address("127.0.0.1", orDefault(c.AdminPort, AdminPort))},
		DynamicResources:   dynamicResources(),
		StaticResources:    &bootstrapv3.Bootstrap_StaticResources{Clusters: clusters, Listeners: stats},
		LayeredRuntime:     c.runtime(),
		OverloadManager:    overload,
		StatsFlushInterval: durationpb.New(10 * time.Second),
	}, nil
}

func orDefault(port, standard uint16) uint16 {
	if port == 0 {
		return standard
	}
	return port
}

// dynamicResources asks for listeners and clusters incrementally on one
// stream. An initial fetch never times out: an Envoy without configuration
// must not call itself ready.
func dynamicResources() *bootstrapv3.Bootstrap_DynamicResources {
	overADS := func() *corev3.ConfigSource {
		return &corev3.ConfigSource{
			ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
			ResourceApiVersion:    corev3.ApiVersion_V3,
			InitialFetchTimeout:   durationpb.New(0),
		}
	}
	return &bootstrapv3.Bootstrap_DynamicResources{
		LdsConfig: overADS(),
		CdsConfig: overADS(),
		AdsConfig: &corev3.ApiConfigSource{
			ApiType:                   corev3.ApiConfigSource_DELTA_GRPC,
			TransportApiVersion:       corev3.ApiVersion_V3,
			SetNodeOnFirstMessageOnly: true,
			GrpcServices: []*corev3.GrpcService{{
				TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: XDSCluster}},
				// The agent is next door and waits for meshd itself, so there is
				// no herd to spread: come back soon.
				RetryPolicy: &corev3.RetryPolicy{RetryBackOff: &corev3.BackoffStrategy{
					BaseInterval: durationpb.New(200 * time.Millisecond),
					MaxInterval:  durationpb.New(5 * time.Second),
				}},
			}},
		},
	}
}

// accessLogKey is where the resources of meshd look for the share, in percent, of what
// is to be logged.
const accessLogKey = "isthmus.access_log"

// runtime is what a person at the admin port may change, over what is set here.
func (c *Config) runtime() *bootstrapv3.LayeredRuntime {
	share := 0.0
	if c.AccessLog {
		share = 100
	}
	return &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{
		{Name: "agent", LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: &structpb.Struct{
			Fields: map[string]*structpb.Value{accessLogKey: structpb.NewNumberValue(share)},
		}}},
		{Name: "admin", LayerSpecifier: &bootstrapv3.RuntimeLayer_AdminLayer_{AdminLayer: &bootstrapv3.RuntimeLayer_AdminLayer{}}},
	}}
}

// overload refuses connections beyond a bound instead of running out of file
// descriptors.
func (c *Config) overload() (*overloadv3.OverloadManager, error) {
	most := c.MaxConnections
	if most == 0 {
		most = 100_000
	}
	monitor, err := pack(&downstreamv3.DownstreamConnectionsConfig{MaxActiveDownstreamConnections: most})
	if err != nil {
		return nil, err
	}
	return &overloadv3.OverloadManager{ResourceMonitors: []*overloadv3.ResourceMonitor{{
		Name:       "envoy.resource_monitors.global_downstream_max_connections",
		ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: monitor},
	}}}, nil
}

func address(host string, port uint16) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       host,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}

func pack(message proto.Message) (*anypb.Any, error) {
	packed, err := anypb.New(message)
	if err != nil {
		return nil, fmt.Errorf("bootstrap: encode %s: %w", message.ProtoReflect().Descriptor().FullName(), err)
	}
	return packed, nil
}
