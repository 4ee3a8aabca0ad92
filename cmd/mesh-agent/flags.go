// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/isthmus-mesh/isthmus/agent"
	"github.com/isthmus-mesh/isthmus/agent/redirect"
)

// errFlag means that the command line or the environment cannot be understood.
var errFlag = errors.New("invalid option")

// environment binds flags to variables: the flag wins, then the variable, then
// the standard value.
type environment struct {
	flags *pflag.FlagSet
	get   func(string) string
}

func (e environment) text(p *string, name, variable, standard, usage string) {
	if value := e.get(variable); value != "" {
		standard = value
	}
	e.flags.StringVar(p, name, standard, usage+" ($"+variable+")")
}

// ruleFlags are the options of redirection, as text until rules reads them.
type ruleFlags struct {
	outboundTo, excludeTo, excludeToPorts, inboundPorts, excludeInboundPorts string
	noInbound, noOutbound, noDNS                                             string
}

func (f *ruleFlags) bind(flags *pflag.FlagSet, get func(string) string) {
	e := environment{flags, get}
	e.text(&f.outboundTo, "outbound-to", "MESH_OUTBOUND_TO", "", "capture only connections to these ranges, separated by commas")
	e.text(&f.excludeTo, "exclude-to", "MESH_EXCLUDE_TO", "", "leave connections to these ranges alone")
	e.text(&f.excludeToPorts, "exclude-to-ports", "MESH_EXCLUDE_TO_PORTS", "", "leave connections to these ports alone")
	e.text(&f.inboundPorts, "inbound-ports", "MESH_INBOUND_PORTS", "", "capture only connections to these ports of the workload")
	e.text(&f.excludeInboundPorts, "exclude-inbound-ports", "MESH_EXCLUDE_INBOUND_PORTS", "", "leave these ports of the workload alone")
	e.text(&f.noInbound, "no-inbound", "MESH_NO_INBOUND", "false", "capture nothing inbound")
	e.text(&f.noOutbound, "no-outbound", "MESH_NO_OUTBOUND", "false", "capture nothing outbound")
	e.text(&f.noDNS, "no-dns", "MESH_NO_DNS", "false", "leave name queries alone")
}

// parse reads everything but resolvers.
func (f *ruleFlags) parse() (redirect.Rules, error) {
	var r redirect.Rules
	err := errors.Join(
		list(&r.OutboundTo, "outbound-to", f.outboundTo, parsePrefix),
		list(&r.ExcludeTo, "exclude-to", f.excludeTo, parsePrefix),
		list(&r.ExcludeToPorts, "exclude-to-ports", f.excludeToPorts, parsePort),
		list(&r.InboundPorts, "inbound-ports", f.inboundPorts, parsePort),
		list(&r.ExcludeInboundPorts, "exclude-inbound-ports", f.excludeInboundPorts, parsePort),
		boolean(&r.NoInbound, "no-inbound", f.noInbound),
		boolean(&r.NoOutbound, "no-outbound", f.noOutbound),
		boolean(&r.NoDNS, "no-dns", f.noDNS),
	)
	return r, err
}

// rules are complete, with the resolvers of the given file.
func (f *ruleFlags) rules(resolvConf string) (redirect.Rules, error) {
	r, err := f.parse()
	if err != nil {
		return r, err
	}
	conf, err := resolvers(resolvConf)
	if err != nil {
		return r, err
	}
	r.Resolvers = conf.Captured()
	return r, nil
}

// proxyFlags are the options of the agent.
type proxyFlags struct {
	agent     agent.Config
	rules     ruleFlags
	role      string
	configDoc string
	addresses string
	labels    string
	redirect  string

	drain, drainAtLeast, concurrency, envoyUID string
	logLevel, logFormat, accessLog             string
	workloadUsers                              string
}

func (f *proxyFlags) bind(flags *pflag.FlagSet, get func(string) string) {
	e := environment{flags, get}
	c := &f.agent
	e.text(&f.role, "role", "MESH_ROLE", "sidecar", "sidecar, gateway or vm")
	e.text(&f.configDoc, "config", "MESH_CONFIG", "", "onboarding configuration of a virtual machine (JSON)")
	e.text(&c.Server, "server", "MESH_SERVER", "", "host:port of meshd; several, separated by commas, where it has replicas")
	e.text(&c.RootCertFile, "root-cert", "MESH_ROOT_CERT_FILE", "/var/run/secrets/isthmus/root-cert.pem", "PEM roots to verify meshd with")
	e.text(&c.TokenFile, "token-file", "MESH_TOKEN_FILE", "/var/run/secrets/tokens/isthmus-token", "credential for the first certificate")
	e.text(&c.Name, "name", "MESH_POD_NAME", "", "name of pod or machine")
	e.text(&c.Namespace, "namespace", "MESH_POD_NAMESPACE", "", "namespace of the workload")
	e.text(&c.UID, "uid", "MESH_POD_UID", "", "UID of the pod")
	e.text(&c.ServiceAccount, "service-account", "MESH_SERVICE_ACCOUNT", "", "service account of the workload")
	e.text(&c.NodeName, "node", "MESH_NODE_NAME", "", "node of the pod")
	e.text(&f.addresses, "addresses", "MESH_POD_IPS", "", "addresses of the workload, separated by commas")
	e.text(&c.Network, "network", "MESH_NETWORK", "", "network of these addresses")
	e.text(&c.ClusterID, "cluster", "MESH_CLUSTER_ID", "", "member cluster of the pod")
	e.text(&c.Domain, "domain", "MESH_DOMAIN", "", "domain of the cluster; empty is cluster.local")
	e.text(&f.labels, "labels", "MESH_LABELS", "", "labels of the workload, key=value separated by commas")
	e.text(&c.LabelsFile, "labels-file", "MESH_LABELS_FILE", "/etc/isthmus/pod/labels", "labels in the format of the downward API, if the file exists")
	e.text(&c.Locality, "locality", "MESH_LOCALITY", "", "region/zone/subzone")
	e.text(&c.Envoy, "envoy", "MESH_ENVOY", "envoy", "the Envoy program")
	e.text(&f.envoyUID, "envoy-uid", "MESH_ENVOY_UID", strconv.Itoa(redirect.UID), "user and group that Envoy runs as if the agent is root")
	e.text(&c.EnvoyLogLevel, "envoy-log-level", "MESH_ENVOY_LOG_LEVEL", "warning", "Envoy's log level")
	e.text(&f.accessLog, "access-log", "MESH_ACCESS_LOG", "false", "write a line to standard output for each request and connection")
	e.text(&f.concurrency, "concurrency", "MESH_CONCURRENCY", "0", "Envoy's worker threads; 0 is one per processor")
	e.text(&c.RunDir, "run-dir", "MESH_RUN_DIR", "/var/run/isthmus", "folder for socket and bootstrap")
	e.text(&c.StateDir, "state-dir", "MESH_STATE_DIR", "", "folder for key and certificate; the run folder if empty")
	e.text(&c.ResolvConf, "resolv-conf", "MESH_RESOLV_CONF", "/etc/resolv.conf", "file that names the resolvers for other names")
	e.text(&c.WorkloadSocket, "workload-socket", "MESH_WORKLOAD_SOCKET", "", "serve the SPIFFE Workload API to the workload on this Unix socket; empty is nowhere")
	e.text(&f.workloadUsers, "workload-users", "MESH_WORKLOAD_USERS", "", "users that may ask the Workload API, names or numbers separated by commas; empty is everybody who can open the socket, on a virtual machine root alone")
	e.text(&f.redirect, "redirect", "MESH_REDIRECT", "", "program redirection and undo it at the end: true or false; empty is true on a virtual machine")
	e.text(&f.drain, "drain", "MESH_DRAIN_DURATION", "0s", "how long connections may finish at the end; 0 is 5s, for a gateway 30s")
	e.text(&f.drainAtLeast, "drain-at-least", "MESH_DRAIN_AT_LEAST", "0s", "how long to wait even without connections; 0 is 2s, for a gateway 10s")
	e.text(&c.Probes, "probes", "MESH_APP_PROBES", "", "the workload's probes as JSON, written by injection")
	e.text(&c.WorkloadMetrics, "workload-metrics", "MESH_APP_METRICS", "", "URL of the workload's own metrics, to be merged")
	e.text(&f.logLevel, "log-level", "MESH_LOG_LEVEL", "info", "debug, info, warn or error")
	e.text(&f.logFormat, "log-format", "MESH_LOG_FORMAT", "text", "text or json")
	f.rules.bind(flags, get)
}

// config reads all options.
func (f *proxyFlags) config() (agent.Config, error) {
	c := f.agent
	c.Role, c.Version = agent.Role(f.role), version()
	var err error
	if c.Rules, err = f.rules.parse(); err != nil {
		return c, err
	}
	c.NoDNS = c.Rules.NoDNS
	c.Redirect = c.Role == agent.VM
	if f.redirect != "" {
		err = boolean(&c.Redirect, "redirect", f.redirect)
	}
	if f.labels != "" {
		c.Labels = map[string]string{}
		for _, pair := range strings.Split(f.labels, ",") {
			key, value, _ := strings.Cut(pair, "=")
			c.Labels[strings.TrimSpace(key)] = value
		}
	}
	err = errors.Join(err,
		list(&c.Addresses, "addresses", f.addresses, netip.ParseAddr),
		list(&c.WorkloadUsers, "workload-users", f.workloadUsers, parseUser),
		duration(&c.Drain, "drain", f.drain),
		duration(&c.DrainAtLeast, "drain-at-least", f.drainAtLeast),
		boolean(&c.AccessLog, "access-log", f.accessLog),
		number(&c.Concurrency, "concurrency", f.concurrency),
		number(&c.EnvoyUID, "envoy-uid", f.envoyUID),
	)
	if f.configDoc != "" {
		var problem error
		c.Onboard, problem = onboarded(f.configDoc)
		err = errors.Join(err, problem)
	}
	return c, err
}

func (f *proxyFlags) logger(to io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return nil, fmt.Errorf("%w: log-level %q: want debug, info, warn or error", errFlag, f.logLevel)
	}
	options := &slog.HandlerOptions{Level: level}
	switch f.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(to, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(to, options)), nil
	}
	return nil, fmt.Errorf("%w: log-format %q: want text or json", errFlag, f.logFormat)
}

// list reads values separated by commas.
func list[T any](to *[]T, name, text string, parse func(string) (T, error)) error {
	for _, part := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' }) {
		value, err := parse(part)
		if err != nil {
			return fmt.Errorf("%w: %s: %w", errFlag, name, err)
		}
		*to = append(*to, value)
	}
	return nil
}

func parsePrefix(text string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(address, address.BitLen()), nil
	}
	return netip.ParsePrefix(text)
}

func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	return uint16(n), err
}

// parseUser accepts the number of a user, or a name that this machine knows.
func parseUser(text string) (uint32, error) {
	if n, err := strconv.ParseUint(text, 10, 32); err == nil {
		return uint32(n), nil
	}
	known, err := user.Lookup(text)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(known.Uid, 10, 32)
	return uint32(n), err
}

func boolean(to *bool, name, text string) error {
	value, err := strconv.ParseBool(text)
	if err != nil {
		return fmt.Errorf("%w: %s %q: want true or false", errFlag, name, text)
	}
	*to = value
	return nil
}

func duration(to *time.Duration, name, text string) error {
	value, err := time.ParseDuration(text)
	if err != nil || value < 0 {
		return fmt.Errorf("%w: %s %q: want a duration such as 5s", errFlag, name, text)
	}
	*to = value
	return nil
}

func number(to *int, name, text string) error {
	value, err := strconv.Atoi(text)
	if err != nil || value < 0 {
		return fmt.Errorf("%w: %s %q: want a number that is not negative", errFlag, name, text)
	}
	*to = value
	return nil
}
