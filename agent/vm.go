// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/agent/dns"
	"github.com/isthmus-mesh/isthmus/agent/health"
	"github.com/isthmus-mesh/isthmus/agent/onboard"
	"github.com/isthmus-mesh/isthmus/agent/redirect"
	"github.com/isthmus-mesh/isthmus/agent/report"
)

// newChecker checks the machine's workload as its owner said, else by a
// connection to its first port. A machine that only calls is always healthy.
func (a *Agent) newChecker() *report.Checker {
	var spec onboard.Health
	var ports []onboard.Port
	if o := a.config.Onboard; o != nil {
		ports = o.Ports
		if o.Health != nil {
			spec = *o.Health
		}
	}
	checker := &report.Checker{
		Interval:  time.Duration(spec.IntervalSeconds) * time.Second,
		Failures:  spec.FailureThreshold,
		Successes: spec.SuccessThreshold,
		Log:       a.log,
	}
	if spec.Port == 0 && len(ports) > 0 {
		spec.Port = ports[0].Port
	}
	if spec.Port == 0 {
		checker.Check = func(context.Context) error { return nil }
		return checker
	}
	probe := health.Probe{TCP: &health.TCPProbe{Port: spec.Port}, TimeoutSeconds: int32(spec.TimeoutSeconds)}
	if spec.Path != "" {
		probe.TCP, probe.HTTP = nil, &health.HTTPProbe{Port: spec.Port, Path: spec.Path}
	}
	prober := a.prober()
	checker.Check = func(ctx context.Context) error {
		// A machine whose proxy cannot take connections is no use either.
		if err := a.status.Ready(ctx); err != nil {
			return err
		}
		return prober.Check(ctx, probe)
	}
	return checker
}

func (a *Agent) newReporter() *report.Reporter {
	r := &report.Reporter{
		Connection: a.connection(),
		Checker:    a.checker,
		Version:    a.config.Version,
		Platform:   platform(),
		Expires:    func() time.Time { at, _ := a.expires(); return at },
	}
	for _, address := range a.config.Addresses {
		r.Addresses = append(r.Addresses, address.String())
	}
	if o := a.config.Onboard; o != nil {
		for _, p := range o.Ports {
			r.Ports = append(r.Ports, uint32(p.Port))
		}
	}
	return r
}

// platform is for inventory: the distribution's own name and the kernel.
func platform() string {
	name := "Linux"
	if data, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.Lines(string(data)) {
			if value, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
				name = strings.Trim(value, `"`)
			}
		}
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		name += ", " + unix.ByteSliceToString(uts.Release[:])
	}
	return name
}

// keepRedirected applies the rules once names can be answered, follows changes
// of the machine's resolvers, and undoes everything at the end: a stopped agent
// must not leave a machine that cannot resolve names.
func (a *Agent) keepRedirected(ctx context.Context) error {
	defer func() {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := redirect.Undo(undo); err != nil {
			a.log.Error("redirection not undone", "error", err)
		}
	}()
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	applied := ""
	for {
		rules := a.config.Rules
		rules.UID = a.config.EnvoyUID
		rules.NoDNS = rules.NoDNS || a.names == nil
		if conf, err := dns.ReadResolvConf(a.config.ResolvConf); err == nil || applied == "" {
			rules.Resolvers = conf.Captured()
			if text := rules.Text(); text != applied {
				if err := redirect.Apply(ctx, rules); err != nil {
					return err
				}
				applied = text
				a.log.Info("traffic redirected", "outbound", rules.OutboundTo, "inbound", rules.InboundPorts, "resolvers", rules.Resolvers)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
