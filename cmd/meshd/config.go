// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
)

// Configuration of meshd: a file of this form (--config), and flags that win over it. An
// unknown key is an error.
//
//	apiVersion: config.isthmus-mesh.io/v1alpha1
//	kind: ServerConfiguration
//	dataDir: /var/lib/meshd
//	advertise: [mesh.example.org:15012]
type Configuration struct {
	APIVersion string `json:"apiVersion,omitempty"`
	Kind       string `json:"kind,omitempty"`

	// DataDir holds the embedded etcd, the audit log, admin.conf and the sealing key.
	DataDir string `json:"dataDir,omitempty"`

	// Advertise are the host:port that proxies of every network dial; its certificate is
	// for these names. Members are given all of them, and go to any that answers.
	Advertise []string `json:"advertise,omitempty"`

	// AdvertiseAdmin are the host:port under which `mesh` and machines that onboard reach
	// the admin address; the hosts of Advertise with the port of Listen.Admin if empty.
	AdvertiseAdmin []string `json:"advertiseAdmin,omitempty"`

	// Replica names this meshd among those that share an etcd; the name of the machine if
	// empty. No two that run may have the same.
	Replica string `json:"replica,omitempty"`

	// AdminAddress is the host:port at which the other replicas reach this very one; see
	// ownAdminAddress if empty.
	AdminAddress string `json:"adminAddress,omitempty"`

	// TrustDomain is the name after spiffe://. It cannot be changed later.
	TrustDomain string `json:"trustDomain,omitempty"`

	// SealingKey is the file of the key that seals authorities and credentials at rest;
	// in the data directory if empty. Replicas need the same one.
	SealingKey string `json:"sealingKey,omitempty"`

	// CADir is a folder with an authority of your own, in the layout of Istio's cacerts; see
	// ca.ReadBrought. meshd makes a root of its own if empty.
	CADir string `json:"caDir,omitempty"`

	// Etcd is where the state is; embedded below DataDir if it has no endpoints.
	Etcd EtcdConfiguration `json:"etcd,omitzero"`

	Listen ListenConfiguration `json:"listen,omitzero"`
	Log    LogConfiguration    `json:"log,omitzero"`

	// DrainDelay is how long it goes on after it was told to stop, not ready any more, so
	// that whoever balances over replicas learns of it.
	DrainDelay Duration `json:"drainDelay,omitzero"`

	// AgentProgram and EnvoyProgram are handed to machines that onboard; mesh-agent beside
	// meshd if empty, and none.
	AgentProgram string `json:"agentProgram,omitempty"`
	EnvoyProgram string `json:"envoyProgram,omitempty"`

	// VirtualIPv4 and VirtualIPv6 are the ranges of virtual addresses, which no cluster and
	// no machine may use otherwise. They cannot be changed while addresses are in use.
	VirtualIPv4 string `json:"virtualIPv4,omitempty"`
	VirtualIPv6 string `json:"virtualIPv6,omitempty"`

	// CertificateLifetime of workloads; 24h if empty.
	CertificateLifetime Duration `json:"certificateLifetime,omitzero"`

	// DemoteAfter is how long a member's API server may be away before the others call its
	// endpoints last; DrainAfter is from when on they leave them to themselves if its
	// gateways are away too. See federation.StalePolicy.
	DemoteAfter Duration `json:"demoteAfter,omitzero"`
	DrainAfter  Duration `json:"drainAfter,omitzero"`

	// CertificateLifetimes is the same for the workloads of some namespaces, by name.
	CertificateLifetimes Lifetimes `json:"certificateLifetimes,omitempty"`

	// OfflineBudget is how long a replica that cannot read etcd goes on issuing certificates,
	// and ClockSkew how far the clocks of a mesh may be apart: a rotation waits for both.
	OfflineBudget Duration `json:"offlineBudget,omitzero"`
	ClockSkew     Duration `json:"clockSkew,omitzero"`

	// AllowShortLifetimes lifts the lower bounds of the durations above, for tests.
	AllowShortLifetimes bool `json:"allowShortLifetimes,omitempty"`
}

// EtcdConfiguration is an etcd cluster of your own.
type EtcdConfiguration struct {
	Endpoints []string `json:"endpoints,omitempty"`
	CACert    string   `json:"caCert,omitempty"` // files
	Cert      string   `json:"cert,omitempty"`
	Key       string   `json:"key,omitempty"`
	Prefix    string   `json:"prefix,omitempty"` // of all keys; /isthmus/ if empty
}

// ListenConfiguration are the addresses to listen on.
type ListenConfiguration struct {
	Mesh        string `json:"mesh,omitempty"`        // proxies: xDS and certificates
	Admin       string `json:"admin,omitempty"`       // mesh, and machines that onboard
	Diagnostics string `json:"diagnostics,omitempty"` // metrics and health, without TLS
}

// LogConfiguration says what is logged, and how.
type LogConfiguration struct {
	Level  string `json:"level,omitempty"`  // debug, info, warn, error
	Format string `json:"format,omitempty"` // text, json
	Access string `json:"access,omitempty"` // format of the proxies' access logs; see xds.AccessLogFormat
}

// Duration is written as "30s", "24h".
type Duration time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	*d = Duration(parsed)
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// Lifetimes are durations by namespace, on the command line as "payments=1h,batch=10m".
type Lifetimes map[string]Duration

// Set implements pflag.Value: it adds to what is there.
func (l *Lifetimes) Set(text string) error {
	if *l == nil {
		*l = Lifetimes{}
	}
	for part := range strings.SplitSeq(text, ",") {
		namespace, life, ok := strings.Cut(part, "=")
		var d Duration
		if !ok || namespace == "" {
			return fmt.Errorf("%q: want NAMESPACE=DURATION, for example payments=1h", part)
		}
		if err := d.UnmarshalText([]byte(life)); err != nil {
			return err
		}
		(*l)[namespace] = d
	}
	return nil
}

// String implements pflag.Value.
func (l *Lifetimes) String() string {
	var parts []string
	for _, namespace := range slices.Sorted(maps.Keys(*l)) {
		parts = append(parts, namespace+"="+time.Duration((*l)[namespace]).String())
	}
	return strings.Join(parts, ",")
}

// Type implements pflag.Value.
func (l *Lifetimes) Type() string { return "NAMESPACE=DURATION" }

const (
	configVersion = "config.isthmus-mesh.io/v1alpha1"
	configKind    = "ServerConfiguration"
)

// flagValues are the flags; what was set wins over the file.
type flagValues struct {
	file string
	c    Configuration
}

func (f *flagValues) add(fs *pflag.FlagSet) {
	c := &f.c
	fs.StringVar(&f.file, "config", "", "configuration file (YAML); flags win over it")
	fs.StringVar(&c.DataDir, "data-dir", "", "where state, audit log, admin.conf and the sealing key are kept")
	fs.StringSliceVar(&c.Advertise, "advertise", nil, "HOST:PORT that proxies of every network dial (port 15012)")
	fs.StringSliceVar(&c.AdvertiseAdmin, "advertise-admin", nil, "HOST:PORT under which mesh and machines that onboard reach it (default: the hosts of --advertise, port 8443)")
	fs.StringVar(&c.Replica, "replica", "", "name among the replicas that share an etcd, of its own (default: the name of the machine)")
	fs.StringVar(&c.AdminAddress, "admin-address", "", "HOST:PORT at which the other replicas reach the admin port of this very one (default: the --advertise that is an address or the name of this machine, else its name, port 8443)")
	fs.StringVar(&c.TrustDomain, "trust-domain", "cluster.local", "the name after spiffe://; it cannot be changed later")
	fs.StringVar(&c.SealingKey, "sealing-key", "", "file of the key that seals what is secret at rest (default: in the data directory)")
	fs.StringVar(&c.CADir, "ca-dir", "", "folder with an authority of your own to begin with: ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem, as Istio's cacerts (default: meshd makes a root)")
	fs.StringSliceVar(&c.Etcd.Endpoints, "etcd-endpoints", nil, "URLs of an etcd cluster of your own (default: embedded)")
	fs.StringVar(&c.Etcd.CACert, "etcd-cacert", "", "its certificate authority, a PEM file")
	fs.StringVar(&c.Etcd.Cert, "etcd-cert", "", "client certificate for it, a PEM file")
	fs.StringVar(&c.Etcd.Key, "etcd-key", "", "key of the client certificate, a PEM file")
	fs.StringVar(&c.Etcd.Prefix, "etcd-prefix", "/isthmus/", "prefix of all keys in it")
	fs.StringVar(&c.Listen.Mesh, "listen", ":15012", "address for proxies: xDS and certificates")
	fs.StringVar(&c.Listen.Admin, "listen-admin", ":8443", "address for mesh, and for machines that onboard")
	fs.StringVar(&c.Listen.Diagnostics, "listen-diagnostics", "127.0.0.1:15014", "address for metrics and health, without TLS")
	fs.StringVar(&c.Log.Level, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&c.Log.Format, "log-format", "text", "text or json")
	fs.StringVar(&c.Log.Access, "access-log-format", "", "a line of the proxies' access logs, in Envoy's commands (default: what it takes to find the other end)")
	fs.DurationVar((*time.Duration)(&c.DrainDelay), "drain-delay", 0, "how long to go on, not ready, after it was told to stop")
	fs.StringVar(&c.AgentProgram, "agent-program", "", "mesh-agent for machines that onboard (default: the one beside meshd)")
	fs.StringVar(&c.EnvoyProgram, "envoy-program", "", "Envoy for machines that onboard (default: none, they bring their own)")
	fs.StringVar(&c.VirtualIPv4, "virtual-ipv4", federation.VirtualV4.String(), "range of virtual addresses; it cannot be changed while some are in use")
	fs.StringVar(&c.VirtualIPv6, "virtual-ipv6", federation.VirtualV6.String(), "range of virtual addresses; it cannot be changed while some are in use")
	fs.DurationVar((*time.Duration)(&c.CertificateLifetime), "certificate-lifetime", 24*time.Hour, "of workloads' certificates, 5m to 168h")
	fs.Var(&c.CertificateLifetimes, "certificate-lifetime-of", "the same for the workloads of one namespace; repeatable")
	fs.DurationVar((*time.Duration)(&c.OfflineBudget), "offline-budget", ca.DefaultOfflineBudget, "how long a replica that cannot read etcd goes on issuing certificates, 1m to 24h; a rotation waits that long")
	fs.DurationVar((*time.Duration)(&c.ClockSkew), "clock-skew", ca.DefaultClockSkew, "how far the clocks of the mesh may be apart, 1m to 1h; a rotation waits that long")
	fs.BoolVar(&c.AllowShortLifetimes, "allow-short-lifetimes", false, "for tests only: the durations of certificates may be seconds")
	fs.DurationVar((*time.Duration)(&c.DemoteAfter), "demote-after", 5*time.Minute, "how long a member's API server may be away before other clusters call it last")
	fs.DurationVar((*time.Duration)(&c.DrainAfter), "drain-after", 15*time.Minute, "how long until they do not call it at all, if its gateways are away too and others have the service")
}

// configuration is what meshd runs with.
func (f *flagValues) configuration(fs *pflag.FlagSet) (Configuration, error) {
	c, err := f.read(fs)
	if err != nil {
		return c, err
	}
	return c, c.validate()
}

// read is the file, if any, with the flags that were set on top; what neither says has the
// flag's default.
func (f *flagValues) read(fs *pflag.FlagSet) (Configuration, error) {
	c := f.c
	if f.file != "" {
		text, err := os.ReadFile(f.file)
		if err != nil {
			return c, err
		}
		if c, err = parseConfiguration(text, f.c); err != nil {
			return c, fmt.Errorf("%s: %w", f.file, err)
		}
		if err := reapply(fs, f, &c); err != nil {
			return c, err
		}
	}
	return c, nil
}

// parseConfiguration reads a file over the defaults.
func parseConfiguration(text []byte, defaults Configuration) (Configuration, error) {
	c := defaults
	c.CertificateLifetimes = maps.Clone(defaults.CertificateLifetimes) // the flags' own must stay what was given
	if err := yaml.UnmarshalStrict(text, &c); err != nil {
		return c, err
	}
	if c.APIVersion != configVersion || c.Kind != configKind {
		return c, fmt.Errorf("apiVersion %q, kind %q: want %q and %q", c.APIVersion, c.Kind, configVersion, configKind)
	}
	return c, nil
}

// reapply sets the flags that were given on c, which was read from the file.
func reapply(fs *pflag.FlagSet, f *flagValues, c *Configuration) (err error) {
	over := &flagValues{}
	again := pflag.NewFlagSet("", pflag.ContinueOnError)
	over.add(again)
	over.c = *c
	fs.Visit(func(set *pflag.Flag) {
		target := again.Lookup(set.Name)
		if target == nil || err != nil {
			return
		}
		if list, ok := set.Value.(pflag.SliceValue); ok {
			err = target.Value.(pflag.SliceValue).Replace(list.GetSlice())
			return
		}
		err = target.Value.Set(set.Value.String())
	})
	*c = over.c
	return err
}

// validate names the first thing that cannot be right.
func (c *Configuration) validate() error {
	if err := c.validateState(); err != nil {
		return err
	}
	if len(c.Advertise) == 0 {
		return errors.New("--advertise is missing: name the HOST:PORT that proxies of every network dial, for example --advertise mesh.example.org:15012")
	}
	for _, a := range slices.Concat(c.Advertise, c.AdvertiseAdmin) {
		if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
			return fmt.Errorf("--advertise %q: want HOST:PORT, for example mesh.example.org:15012", a)
		}
	}
	if err := c.validateReplica(); err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Log.Level)); err != nil {
		return fmt.Errorf("--log-level %q: want debug, info, warn or error", c.Log.Level)
	}
	if c.Log.Format != "text" && c.Log.Format != "json" {
		return fmt.Errorf("--log-format %q: want text or json", c.Log.Format)
	}
	if err := xds.CheckAccessLogFormat(c.Log.Access); err != nil {
		return fmt.Errorf("--access-log-format: %w", err)
	}
	if _, err := c.virtual(); err != nil {
		return err
	}
	return errors.Join(c.validateLifetimes(), c.validateStaleness())
}

// validateLifetimes is validate for the lifetimes of certificates.
func (c *Configuration) validateLifetimes() error {
	shortest := func(usual time.Duration) time.Duration {
		if c.AllowShortLifetimes {
			return time.Second
		}
		return usual
	}
	bad := func(d Duration) bool {
		return time.Duration(d) < shortest(ca.DefaultMinLifetime) || time.Duration(d) > ca.MaxLifetime
	}
	if d := time.Duration(c.OfflineBudget); d < shortest(time.Minute) || d > 24*time.Hour {
		return fmt.Errorf("--offline-budget %v: want 1m to 24h", d)
	}
	if d := time.Duration(c.ClockSkew); d < shortest(time.Minute) || d > time.Hour {
		return fmt.Errorf("--clock-skew %v: want 1m to 1h", d)
	}
	if bad(c.CertificateLifetime) {
		return fmt.Errorf("--certificate-lifetime %v: want 5m to 168h", time.Duration(c.CertificateLifetime))
	}
	for _, namespace := range slices.Sorted(maps.Keys(c.CertificateLifetimes)) {
		if d := c.CertificateLifetimes[namespace]; bad(d) {
			return fmt.Errorf("--certificate-lifetime-of %s=%v: want 5m to 168h", namespace, time.Duration(d))
		}
	}
	return nil
}

// validateStaleness is validate for what becomes of clusters that fell silent.
func (c *Configuration) validateStaleness() error {
	if c.DemoteAfter <= 0 || c.DrainAfter < c.DemoteAfter {
		return fmt.Errorf("--demote-after %v, --drain-after %v: want the first above zero, and the second no shorter", time.Duration(c.DemoteAfter), time.Duration(c.DrainAfter))
	}
	return nil
}

// lifetimes is what the authority is told about namespaces.
func (c *Configuration) lifetimes() map[string]time.Duration {
	out := make(map[string]time.Duration, len(c.CertificateLifetimes))
	for namespace, d := range c.CertificateLifetimes {
		out[namespace] = time.Duration(d)
	}
	return out
}

// backdate is less than usual where a certificate lives for seconds, since its holder renews it by its whole
// life, from when it is valid.
func (c *Configuration) backdate() time.Duration {
	if c.AllowShortLifetimes {
		return time.Second
	}
	return ca.DefaultBackdate
}

// validateReplica is validate for what tells this replica from others.
func (c *Configuration) validateReplica() error {
	if strings.IndexFunc(c.Replica, notOfName) >= 0 || len(c.Replica) > 253 {
		return fmt.Errorf("--replica %q: want letters, digits, dots and dashes, for example meshd-1", c.Replica)
	}
	if c.AdminAddress == "" {
		return nil
	}
	if host, port, err := net.SplitHostPort(c.AdminAddress); err != nil || host == "" || port == "" {
		return fmt.Errorf("--admin-address %q: want HOST:PORT, for example meshd-1.example.org:8443", c.AdminAddress)
	}
	return nil
}

func notOfName(r rune) bool {
	return r != '.' && r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
}

// validateState is validate for what says where the state is.
func (c *Configuration) validateState() error {
	if c.DataDir == "" {
		return errors.New("--data-dir is missing: name a directory that is kept, for example --data-dir /var/lib/meshd")
	}
	for _, e := range c.Etcd.Endpoints {
		if !strings.HasPrefix(e, "https://") && !strings.HasPrefix(e, "http://") {
			return fmt.Errorf("--etcd-endpoints %q: want a URL, for example https://etcd-0:2379", e)
		}
	}
	if (c.Etcd.Cert == "") != (c.Etcd.Key == "") {
		return errors.New("--etcd-cert and --etcd-key: want both or none")
	}
	if !strings.HasSuffix(c.Etcd.Prefix, "/") {
		return fmt.Errorf("--etcd-prefix %q: want one that ends with a slash, as /isthmus/", c.Etcd.Prefix)
	}
	return nil
}

// virtual are the ranges of virtual addresses.
func (c *Configuration) virtual() (r federation.VirtualRanges, err error) {
	if r.V4, err = netip.ParsePrefix(c.VirtualIPv4); err != nil || !r.V4.Addr().Is4() {
		return r, fmt.Errorf("--virtual-ipv4 %q: want an IPv4 range, for example %s", c.VirtualIPv4, federation.VirtualV4)
	}
	if r.V6, err = netip.ParsePrefix(c.VirtualIPv6); err != nil || !r.V6.Addr().Is6() {
		return r, fmt.Errorf("--virtual-ipv6 %q: want an IPv6 range, for example %s", c.VirtualIPv6, federation.VirtualV6)
	}
	return r, nil
}

// path of a file in the data directory.
func (c *Configuration) path(elements ...string) string {
	return filepath.Join(append([]string{c.DataDir}, elements...)...)
}

// sealingKey is the file of the sealing key.
func (c *Configuration) sealingKey() string {
	if c.SealingKey != "" {
		return c.SealingKey
	}
	return c.path("sealing.key")
}

// replica is this meshd's name.
func (c *Configuration) replica() (string, error) {
	if c.Replica != "" {
		return c.Replica, nil
	}
	name, err := os.Hostname()
	if err != nil {
		err = fmt.Errorf("--replica is missing, and the machine has no name: %w", err)
	}
	return name, err
}

// adminAddresses are where the admin address is reached from elsewhere.
func (c *Configuration) adminAddresses() []string {
	if len(c.AdvertiseAdmin) > 0 {
		return c.AdvertiseAdmin
	}
	port := c.adminPort()
	var addresses []string
	for _, a := range c.Advertise {
		host, _, _ := net.SplitHostPort(a)
		addresses = append(addresses, net.JoinHostPort(host, port))
	}
	return addresses
}

func (c *Configuration) adminPort() string {
	if _, port, err := net.SplitHostPort(c.Listen.Admin); err == nil {
		return port
	}
	return "8443"
}

// hosts are the names and addresses that its certificate is for.
func (c *Configuration) hosts() []string {
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	for _, a := range slices.Concat(c.Advertise, c.AdvertiseAdmin) {
		if host, _, err := net.SplitHostPort(a); err == nil && !slices.Contains(hosts, host) {
			hosts = append(hosts, host)
		}
	}
	return hosts
}
