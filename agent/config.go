// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/agent/onboard"
	"github.com/isthmus-mesh/isthmus/agent/redirect"
	"github.com/isthmus-mesh/isthmus/agent/servers"
	"github.com/isthmus-mesh/isthmus/api"
)

// ErrConfig means that a Config cannot be run.
var ErrConfig = errors.New("invalid agent configuration")

// Role is what the Envoy is for.
type Role string

const (
	// Sidecar is an Envoy in a workload's pod.
	Sidecar Role = "sidecar"
	// Gateway is an east-west gateway.
	Gateway Role = "gateway"
	// VM is an Envoy on a machine outside Kubernetes.
	VM Role = "vm"
)

// Config says whose agent this is and how to reach meshd. Role, Server, Name,
// Namespace and Addresses are required; on a VM all but Role come from Onboard.
type Config struct {
	// Role decides defaults and which parts run.
	Role Role
	// Server is meshd's host:port for discovery and certificates; several, separated
	// by commas, where it has replicas.
	Server string
	// RootCertFile is the PEM bundle to verify meshd with at first, and, in a
	// pod, always besides what meshd answers.
	RootCertFile string
	// TokenFile is the credential for the first certificate.
	TokenFile string

	// Name, UID, Namespace, ServiceAccount and NodeName of the pod; the name of
	// a VM. Only metadata: identity comes from the credential.
	Name, UID, Namespace, ServiceAccount, NodeName string
	// Addresses of the workload, most preferred first. On a VM, if empty, the
	// one from which meshd is reached.
	Addresses []netip.Addr
	// Network the addresses belong to; ClusterID is the member cluster.
	Network, ClusterID string
	// Domain of the cluster; empty means cluster.local.
	Domain string
	// Labels of the workload. LabelsFile, if set, is read at the start, in the
	// format of the downward API.
	Labels     map[string]string
	LabelsFile string
	// Locality is region/zone/subzone.
	Locality string

	// Envoy is the program; empty means "envoy" in PATH.
	Envoy string
	// EnvoyUID is the user and group it runs as when the agent is root; 0 means
	// 1337, -1 means the agent's own. EnvoyLogLevel and Concurrency are passed
	// on.
	EnvoyUID      int
	EnvoyLogLevel string
	Concurrency   int
	// AccessLog writes a line to standard output for each request and connection.
	AccessLog bool

	// RunDir holds socket, bootstrap and process number; empty means
	// /var/run/isthmus. StateDir holds key and certificate; empty means RunDir.
	RunDir, StateDir string
	// WorkloadSocket is where the SPIFFE Workload API is served; empty means nowhere.
	// WorkloadUsers are the user IDs that may ask it; nil means everybody who can open
	// the socket, and on a VM root alone.
	WorkloadSocket string
	WorkloadUsers  []uint32
	// ResolvConf; empty means /etc/resolv.conf.
	ResolvConf string

	// NoDNS leaves names to the machine's resolvers.
	NoDNS bool
	// Redirect makes the agent itself program redirection by Rules, keep it,
	// and undo it at the end. In pods an init container does it instead.
	Redirect bool
	// Rules of redirection. On a VM, empty means what Onboard says.
	Rules redirect.Rules

	// Drain and DrainAtLeast: see envoy.Process. Zero means 5 s and 2 s, and
	// 30 s and 10 s for a gateway.
	Drain, DrainAtLeast time.Duration

	// Probes of the workload as JSON; see health.ParseProbes.
	Probes string
	// WorkloadMetrics is the URL of the workload's own metrics, if any.
	WorkloadMetrics string

	// Onboard is the configuration of a VM.
	Onboard *onboard.Config

	// ReadyAddress, StatusAddress and DNSAddresses are where the agent listens;
	// empty means :15021, :15020, and port 15053 of both loopback addresses.
	// ProbeAddress is where a gateway's answers probes of the path, which come to it
	// through its Envoy; empty means 127.0.0.1:15023.
	ReadyAddress, StatusAddress, ProbeAddress string
	DNSAddresses                              []string
	// AdminPort and StatsPort are Envoy's; 0 means 15000 and 15090.
	AdminPort, StatsPort uint16

	// Version of the agent.
	Version string

	servers servers.List // of Server
}

// complete fills in defaults and refuses what cannot work.
func (c *Config) complete() error {
	if c.Onboard != nil {
		if err := c.fromOnboard(); err != nil {
			return err
		}
	}
	switch c.Role {
	case Sidecar, VM:
		c.Drain, c.DrainAtLeast = orDuration(c.Drain, 5*time.Second), orDuration(c.DrainAtLeast, 2*time.Second)
	case Gateway:
		c.Drain, c.DrainAtLeast = orDuration(c.Drain, 30*time.Second), orDuration(c.DrainAtLeast, 10*time.Second)
		c.NoDNS, c.Redirect = true, false
	default:
		return fmt.Errorf("%w: role %q: want sidecar, gateway or vm", ErrConfig, c.Role)
	}
	c.defaults()
	var err error
	if c.servers, err = servers.Parse(c.Server); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if c.Name == "" || c.Namespace == "" {
		return fmt.Errorf("%w: name %q and namespace %q: both are needed", ErrConfig, c.Name, c.Namespace)
	}
	if len(c.Addresses) == 0 && c.Role == VM {
		address, err := sourceAddress(c.servers)
		if err != nil {
			return err
		}
		c.Addresses = []netip.Addr{address}
	}
	if len(c.Addresses) == 0 {
		return fmt.Errorf("%w: no address of the workload", ErrConfig)
	}
	if c.WorkloadSocket != "" && !filepath.IsAbs(c.WorkloadSocket) {
		return fmt.Errorf("%w: workload socket %q: want an absolute path", ErrConfig, c.WorkloadSocket)
	}
	return c.readLabels()
}

func (c *Config) defaults() {
	for _, field := range []struct {
		value    *string
		standard string
	}{
		{&c.Domain, "cluster.local"},
		{&c.Envoy, "envoy"},
		{&c.RunDir, "/var/run/isthmus"},
		{&c.ResolvConf, "/etc/resolv.conf"},
		{&c.ReadyAddress, ":15021"},
		{&c.StatusAddress, ":15020"},
		{&c.ProbeAddress, net.JoinHostPort("127.0.0.1", strconv.Itoa(api.ProbePort))},
	} {
		if *field.value == "" {
			*field.value = field.standard
		}
	}
	if c.StateDir == "" {
		c.StateDir = c.RunDir
	}
	switch c.EnvoyUID {
	case 0:
		c.EnvoyUID = redirect.UID
	case -1:
		c.EnvoyUID = os.Geteuid()
	}
	if len(c.DNSAddresses) == 0 {
		port := strconv.Itoa(redirect.DNSPort)
		c.DNSAddresses = []string{net.JoinHostPort("127.0.0.1", port), net.JoinHostPort("::1", port)}
	}
}

func orDuration(d, standard time.Duration) time.Duration {
	if d == 0 {
		return standard
	}
	return d
}

// fromOnboard takes over what meshd said about this machine, except where the
// command line says otherwise.
func (c *Config) fromOnboard() error {
	o := c.Onboard
	for _, field := range []struct {
		value *string
		from  string
	}{
		{&c.Server, o.Server}, {&c.Name, o.Name}, {&c.Namespace, o.Namespace},
		{&c.ServiceAccount, o.ServiceAccount}, {&c.Network, o.Network},
		{&c.Domain, o.Domain}, {&c.Locality, o.Locality},
	} {
		if *field.value == "" {
			*field.value = field.from
		}
	}
	if c.Labels == nil {
		c.Labels = o.Labels
	}
	capture, err := o.Capture()
	if err != nil {
		return err
	}
	if len(c.Rules.OutboundTo) == 0 {
		c.Rules.OutboundTo = capture
	}
	for _, p := range o.Ports {
		c.Rules.InboundPorts = append(c.Rules.InboundPorts, p.Port)
	}
	c.Rules.NoInbound = len(o.Ports) == 0
	return nil
}

// sourceAddress is the local address from which a server is reached, the first that is.
// Nothing is sent: connecting a UDP socket only looks up the route.
func sourceAddress(list servers.List) (netip.Addr, error) {
	var last error
	for _, server := range list {
		conn, err := redirect.Dialer(5*time.Second).Dial("udp", server)
		if err != nil {
			last = err
			continue
		}
		defer conn.Close()
		return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
	}
	return netip.Addr{}, fmt.Errorf("%w: no address given, and none found from which %s is reached: %w", ErrConfig, list, last)
}

func (c *Config) readLabels() error {
	if c.LabelsFile == "" {
		return nil
	}
	f, err := os.Open(c.LabelsFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("labels: %w", err)
	}
	defer f.Close()
	labels := map[string]string{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		key, quoted, ok := strings.Cut(lines.Text(), "=")
		if !ok {
			continue
		}
		value, err := strconv.Unquote(quoted)
		if err != nil {
			value = quoted
		}
		labels[key] = value
	}
	for key, value := range c.Labels {
		labels[key] = value
	}
	c.Labels = labels
	return lines.Err()
}

func (c *Config) socket() string        { return filepath.Join(c.RunDir, "agent.sock") }
func (c *Config) bootstrapPath() string { return filepath.Join(c.RunDir, "envoy.json") }
func (c *Config) pidFile() string       { return filepath.Join(c.RunDir, "envoy.pid") }
func (c *Config) memoryPath() string    { return filepath.Join(c.StateDir, "configuration") }
func (c *Config) identityPath() string  { return IdentityPath(c.StateDir) }

// IdentityPath is the file of the certificate in a state folder.
func IdentityPath(stateDir string) string { return filepath.Join(stateDir, "identity.pem") }

func (c *Config) adminAddress() string {
	port := c.AdminPort
	if port == 0 {
		port = 15000
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port)))
}
