// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/isthmus-mesh/isthmus/api"
)

// pollInterval is how often a waiting join looks.
const pollInterval = 500 * time.Millisecond

// upTo leaves out the waiting where it is not wanted.
func (j *join) upTo(steps []func(context.Context) error, await ...func(context.Context) error) []func(context.Context) error {
	if j.dryRun || j.noWait {
		return steps
	}
	return append(steps, await...)
}

// look asks meshd for the cluster until ready says that it is as wanted. ready
// returns what it waits for otherwise.
func (j *join) look(ctx context.Context, step *step, ready func(*api.Cluster) (waitsFor string, ok bool)) (*api.Cluster, string, error) {
	last := "no answer of meshd yet"
	for {
		one, cancel := context.WithTimeout(ctx, j.requestTimeout)
		c, err := j.conn.GetCluster(one, &api.GetClusterRequest{Name: j.name})
		cancel()
		switch {
		case err == nil:
			var ok bool
			if last, ok = ready(c); ok {
				return c, "", nil
			}
		case ctx.Err() == nil && !transient(err):
			return nil, last, j.rpcFailure("cannot see how "+j.name+" is", err)
		case ctx.Err() == nil:
			last = api.ProblemOf(err).Message
		}
		step.waits("%s", last)
		if err := pause(ctx, pollInterval); err != nil {
			return nil, last, err
		}
	}
}

// synced waits until meshd has read every kind of object of the cluster.
func (j *join) synced(ctx context.Context) error {
	step := j.steps.begin("sync", "waiting for meshd to read the cluster")
	c, last, err := j.look(ctx, step, func(c *api.Cluster) (string, bool) {
		for _, kind := range []string{"SameCluster", "CredentialsValid", "Reachable", "Synced"} {
			condition := conditionOf(c, kind)
			switch {
			case condition.GetStatus() == "True", condition == nil && kind != "Synced":
			case condition == nil:
				return "waiting for meshd to begin", false
			default:
				return kind + ": " + firstOf(condition.GetMessage(), condition.GetReason(), "not yet"), false
			}
		}
		if st := c.GetStatus(); st.GetSyncedBy() != "" && st.GetLastSynced() == nil {
			return "its services are being stored", false
		}
		return "", true
	})
	if err != nil {
		step.fail(api.NotSyncedInTime, "registry synced: %s", last)
		return j.waitEnded(ctx, err, api.NotSyncedInTime, "waiting for the services of "+j.name, last)
	}
	step.done("registry synced: %s, %s", counted(c.GetStatus().GetServices(), "service"), counted(c.GetStatus().GetEndpoints(), "endpoint"))
	return nil
}

// gateway waits until the gateway has an address and is ready.
func (j *join) gateway(ctx context.Context) error {
	if j.noGateway {
		return nil
	}
	step := j.steps.begin("gateway", "waiting for the address of the gateway")
	c, last, err := j.look(ctx, step, func(c *api.Cluster) (string, bool) {
		last := "the gateway's Service is not there yet"
		for _, g := range c.GetStatus().GetGateways() {
			if g.GetReady() && g.GetAddress() != "" {
				return "", true
			}
			last = firstOf(g.GetMessage(), "no gateway pod is ready")
		}
		return last, false
	})
	if err != nil {
		step.fail(api.NoGatewayAddress, "gateway: %s", last)
		return j.waitEnded(ctx, err, api.NoGatewayAddress, "waiting for the gateway of "+j.name, last)
	}
	for _, g := range c.GetStatus().GetGateways() {
		if g.GetReady() && g.GetAddress() != "" {
			step.done("gateway %s", net.JoinHostPort(g.GetAddress(), strconv.Itoa(int(g.GetPort()))))
			break
		}
	}
	return nil
}

// waitEnded explains a wait that ended without what it waited for.
func (j *join) waitEnded(ctx context.Context, err error, code api.Code, what, last string) error {
	if ctx.Err() == nil {
		return err
	}
	f := j.stopped(ctx, what+"; last state: "+last).(*failure)
	if f.exit == exitTimeout {
		f.code, f.try = code, defaultRemedy(code)+"\nThe same command goes on from here."
	}
	return f
}

// paths has meshd and the gateways of the other networks try the way in, and the
// new gateway the way out.
func (j *join) paths(ctx context.Context) error {
	if j.noGateway && len(j.gatewayAddresses) == 0 {
		return nil
	}
	step := j.steps.begin("paths", "trying the paths from and to "+j.name)
	report, err := j.provePaths(ctx, step)
	if err != nil {
		step.fail(api.PathNotProven, "the paths could not be tried")
		if ctx.Err() != nil {
			return j.stopped(ctx, "while the paths were tried")
		}
		return j.rpcFailure("cannot try the paths", err)
	}
	broken := 0
	if len(report.GetPaths()) == 0 {
		step.unchanged("no path to try: there is no other network yet")
		return nil
	}
	step.done("%s", provenText(report.GetPaths()))
	for _, p := range report.GetPaths() {
		broken += j.showPath(p)
	}
	if broken > 0 {
		return &failure{exit: exitFindings, what: j.name + " has joined, but " + noun(broken, "path") + " did not work",
			why: "see above", code: api.PathBroken, try: defaultRemedy(api.PathBroken) + "\nThen: mesh check"}
	}
	return nil
}

// provenText says how many of the paths were proven.
func provenText(paths []*api.Path) string {
	proven := 0
	for _, p := range paths {
		if p.GetState() == "verified" {
			proven++
		}
	}
	if proven < len(paths) {
		return fmt.Sprintf("paths tried: %d, proven by mTLS: %d", len(paths), proven)
	}
	return fmt.Sprintf("%d of %s proven by mTLS", proven, noun(len(paths), "path"))
}

// provePatience is how long a path may take to come up: the others' gateways
// learn of the new one meanwhile, and its agent opens its streams to meshd.
const provePatience = 20 * time.Second

// provePaths repeats the trial until all paths are tried and work, or patience ends.
func (j *join) provePaths(ctx context.Context, step *step) (*api.PathReport, error) {
	patience := j.now().Add(min(provePatience, j.timeout/4))
	for {
		one, cancel := context.WithTimeout(ctx, j.requestTimeout)
		report, err := j.conn.ProbePaths(one, &api.ProbePathsRequest{Cluster: j.name})
		cancel()
		if err != nil {
			return nil, err
		}
		waiting := ""
		for _, p := range report.GetPaths() {
			if p.GetState() == "failed" || p.GetState() == "unknown" {
				waiting = p.GetFrom() + " to " + p.GetTo() + ": " + p.GetMessage()
			}
		}
		if waiting == "" || !j.now().Before(patience) {
			return report, nil
		}
		step.waits("%s", waiting)
		if err := pause(ctx, time.Second); err != nil {
			return nil, err
		}
	}
}

// showPath prints the outcome for one path; 1 if it is broken.
func (j *join) showPath(p *api.Path) int {
	arrow := j.style(j.stdout).arrow()
	head := p.GetFrom() + " " + arrow + " " + p.GetTo()
	if p.GetAddress() != "" {
		head += " " + p.GetAddress()
	}
	took := p.GetElapsed().AsDuration().Round(time.Millisecond)
	switch p.GetState() {
	case "verified":
		j.steps.note("done", "", fmt.Sprintf("%s: mTLS with %s in %s", head, firstOf(p.GetService(), "the gateway"), took))
	case "reached":
		j.steps.note("warning", api.PathNotProven, head+": "+p.GetMessage())
	case "unknown":
		j.steps.note("warning", api.PathNotProven, head+": "+p.GetMessage())
	default:
		j.steps.note("failed", api.PathBroken, head+": "+p.GetMessage())
		return 1
	}
	return 0
}

func conditionOf(c *api.Cluster, kind string) *api.Condition {
	for _, condition := range c.GetStatus().GetConditions() {
		if condition.GetType() == kind {
			return condition
		}
	}
	return nil
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
