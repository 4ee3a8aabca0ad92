// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/registry/kube"
)

// joinFlags are the flags of mesh join cluster.
type joinFlags struct {
	network, apiServer, tlsServerName, remoteSecret, outputDir, proxyImage string
	gatewayAddresses, grants                                               []string
	gatewayReplicas                                                        int
	primary, allowIstioCA, noGateway, dryRun, replace, noWait              bool
	yes                                                                    bool
	timeout                                                                time.Duration
}

func (s *session) joinClusterCommand() *cobra.Command {
	var f joinFlags
	cmd := &cobra.Command{
		Use:   "cluster NAME",
		Short: "Join a Kubernetes cluster",
		Long: `Join a Kubernetes cluster.

What is done, in this order: your permissions in the cluster are checked, meshd
shows that it reaches the API server itself, the namespace isthmus-system with a
reader account, a writer account and an east-west gateway is applied, meshd gets a
credential that lives for a day and renews it from then on. At the end the path
to the other networks is proven by mutual TLS, in both directions. Nothing is
changed before the checks have passed.

The command can be run again at any time: what is done already says "unchanged".
Ctrl-C stops it between two steps.`,
		Example: `  mesh join cluster east --context prod-east --network east-net --primary
  mesh join cluster west --context prod-west --network west-net --api-server https://10.2.0.10:6443
  mesh join cluster west --network west-net --remote-secret west-secret.yaml
  mesh join cluster west --context prod-west --network west-net --output-dir manifests/`,
		Args: arguments(1, 1, "a name for the cluster"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.joinCluster(cmd.Context(), args[0], f)
		},
	}
	s.addMemberFlags(cmd)
	s.addProgressFlags(cmd, &f.timeout, 5*time.Minute)
	fl := cmd.Flags()
	fl.StringVar(&f.network, "network", "", "network of the cluster's pods: what reaches each other directly (required)")
	fl.BoolVar(&f.primary, "primary", false, "the cluster contributes configuration too, not only services")
	fl.StringVar(&f.apiServer, "api-server", "", "URL at which meshd reaches the API server; default: that of the kubeconfig")
	fl.StringVar(&f.tlsServerName, "tls-server-name", "", "name to verify the API server's certificate against")
	fl.StringArrayVar(&f.gatewayAddresses, "gateway-address", nil, "HOST[:PORT] at which other networks reach the gateway; repeatable; default: what its Service says")
	fl.IntVar(&f.gatewayReplicas, "gateway-replicas", 1, "pods of the gateway")
	fl.BoolVar(&f.noGateway, "no-gateway", false, "install no gateway: another cluster on this network has one")
	fl.StringVar(&f.proxyImage, "proxy-image", "isthmus/proxy:dev", "image of the gateway")
	fl.BoolVar(&f.allowIstioCA, "allow-istio-ca", false, "accept the tokens of Istio's own agent (audience istio-ca)")
	fl.StringArrayVar(&f.grants, "grant", nil, "NAMESPACE or NAMESPACE/ACCOUNT the cluster may contribute, with one trailing *; repeatable; default: all but kube-*")
	fl.BoolVar(&f.replace, "replace", false, "take the place of the member of this name, which was rebuilt")
	fl.StringVar(&f.remoteSecret, "remote-secret", "", "file with the Secret that istioctl create-remote-secret prints; nothing is applied")
	fl.StringVar(&f.outputDir, "output-dir", "", "write the manifests to this folder and stop")
	fl.BoolVar(&f.dryRun, "dry-run", false, "decide and show, and change nothing")
	fl.BoolVar(&f.noWait, "no-wait", false, "stop after the registration")
	fl.BoolVar(&f.yes, "yes", false, "do not ask; needed with --replace where there is no terminal")
	return cmd
}

// join is one run of mesh join cluster.
type join struct {
	*session
	joinFlags
	name  string
	steps *steps
	conn  *connection
	begun time.Time

	member  *member
	cluster *api.Cluster
	reader  *api.Credential
	writer  *api.Credential

	known    *api.Cluster // the member of this name as it was before; nil if none
	admitted *api.RegisterClusterResponse
	lookOnly bool // the caller may not apply; see verify
	changed  bool
	found    []string // codes of findings that were printed
}

func (s *session) joinCluster(ctx context.Context, name string, f joinFlags) error {
	j := &join{session: s, joinFlags: f, name: name, steps: s.newSteps(), begun: s.now()}
	if err := j.prepare(); err != nil {
		return err
	}
	var err error
	if j.conn, err = s.connect(); err != nil {
		return err
	}
	defer j.conn.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, f.timeout, context.DeadlineExceeded)
	defer cancel()
	for _, step := range j.plan() {
		if ctx.Err() != nil {
			return j.stopped(ctx, "between two steps")
		}
		if err := step(ctx); err != nil {
			return err
		}
	}
	j.farewell()
	return nil
}

// prepare reads the flags and what they name.
func (j *join) prepare() error {
	if j.network == "" {
		return usagef("--network is missing: name the set of addresses that reach each other directly, for example --network %s-net", j.name)
	}
	if j.replace && !j.dryRun {
		if err := j.confirm(j.yes, "The member "+j.name+" and everything it reported is replaced by this cluster.", j.name); err != nil {
			return err
		}
	}
	j.cluster = &api.Cluster{
		ApiVersion: api.Version, Kind: "Cluster", Metadata: &api.Metadata{Name: j.name},
		Spec: &api.ClusterSpec{
			Role: "remote", Network: j.network, AllowIstioCa: j.allowIstioCA, TlsServerName: j.tlsServerName, Grant: parseGrants(j.grants),
		},
	}
	if j.primary {
		j.cluster.Spec.Role = "primary"
	}
	for _, a := range j.gatewayAddresses {
		address, err := gatewayAddress(a)
		if err != nil {
			return err
		}
		j.cluster.Spec.GatewayAddresses = append(j.cluster.Spec.GatewayAddresses, address)
	}
	if j.apiServer != "" {
		if u, err := url.Parse(j.apiServer); err != nil || u.Scheme != "https" || u.Host == "" {
			return usagef("--api-server is %q, want https://HOST:PORT", j.apiServer)
		}
	}
	if j.remoteSecret != "" {
		return j.openSecret()
	}
	var err error
	j.member, err = j.openMember()
	return err
}

// gatewayAddress reads HOST[:PORT], where 15443 is the default port.
func gatewayAddress(s string) (string, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"), "15443"
	}
	_, noIP := netip.ParseAddr(host)
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || host == "" || strings.ContainsAny(host, "[]/ ") || strings.Contains(host, ":") && noIP != nil {
		return "", usagef("--gateway-address is %q, want HOST or HOST:PORT", s)
	}
	return net.JoinHostPort(host, port), nil
}

// parseGrants sorts namespaces from accounts.
func parseGrants(grants []string) *api.Grant {
	if len(grants) == 0 {
		return nil
	}
	g := &api.Grant{}
	for _, v := range grants {
		if strings.Contains(v, "/") {
			g.ServiceAccounts = append(g.ServiceAccounts, v)
		} else {
			g.Namespaces = append(g.Namespaces, v)
		}
	}
	return g
}

// plan is the steps in their order. What only looks comes first.
func (j *join) plan() []func(context.Context) error {
	if j.remoteSecret != "" {
		return j.upTo([]func(context.Context) error{j.meet, j.reach, j.admission, j.register}, j.synced, j.gateway, j.paths)
	}
	if j.outputDir != "" {
		return []func(context.Context) error{j.meet, j.admission, j.write}
	}
	return j.upTo([]func(context.Context) error{j.meet, j.permissions, j.reach, j.admission, j.apply, j.credentials, j.register}, j.synced, j.gateway, j.paths)
}

// stopped ends a join before its end.
func (j *join) stopped(ctx context.Context, last string) error {
	f := &failure{
		exit: exitInterrupted, what: "join of " + j.name + " stopped", why: "interrupted " + last,
		try: "resume: run the same command again\nundo: " + j.undo(),
	}
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		f.exit, f.code, f.why = exitTimeout, api.TimedOut, "gave up after "+short(j.timeout)+": "+last
	}
	return f
}

// undo is the command that takes back what was done so far.
func (j *join) undo() string {
	out := "mesh leave cluster " + j.name
	if j.member != nil && j.member.context != "" {
		out += " --context " + j.member.context
	}
	return out
}

// atomic is the context of a step that Ctrl-C does not tear apart.
func (j *join) atomic(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), j.requestTimeout)
}

// options of the manifests; the root and the addresses of meshd are known once
// meshd has admitted the cluster.
func (j *join) options() kube.MemberOptions {
	return kube.MemberOptions{
		ClusterName: j.name, ClusterID: j.cluster.GetMetadata().GetUid(), Network: j.network,
		TrustDomain: j.admitted.GetTrustDomain(), Meshd: j.admitted.GetAdvertised(), Root: j.admitted.GetRoot(),
		ProxyImage: j.proxyImage, GatewayReplicas: j.gatewayReplicas, Gateway: !j.noGateway,
	}
}

// meet finds out which cluster this is.
func (j *join) meet(ctx context.Context) error {
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	version, err := j.member.server.Version(ctx)
	if err != nil {
		return j.member.failure("cannot talk to the cluster", err)
	}
	uid, err := j.member.server.ClusterID(ctx)
	if apierrors.IsForbidden(err) && j.remoteSecret == "" {
		// Rather all that is missing than the first of it.
		if missing := j.permissions(ctx); missing != nil {
			return missing
		}
	}
	if err != nil {
		return j.member.failure("cannot read the UID of namespace kube-system", err)
	}
	keys, issuer, err := j.member.server.JWKS(ctx)
	if err != nil {
		return j.member.failure("cannot read the keys of the cluster's service account issuer", err)
	}
	spec := j.cluster.Spec
	j.cluster.Metadata.Uid = string(uid)
	spec.Issuer, spec.IssuerKeys = issuer, keys
	if spec.ApiServer = j.apiServer; spec.ApiServer == "" {
		spec.ApiServer = j.member.config.Host
	}
	if spec.TlsServerName == "" {
		spec.TlsServerName = j.member.config.ServerName
	}
	if spec.CertificateAuthority, err = certificateAuthority(j.member.config); err != nil {
		return usagef("kubeconfig: %v", err)
	}
	via := "context " + j.member.context
	if j.remoteSecret != "" {
		via = "remote secret"
	}
	st := j.style(j.stdout)
	j.steps.say("%s %s %s (%s, %s, uid %s, Kubernetes %s)", j.target, st.arrow(), j.name, via, j.member.host(), uid, version)
	return nil
}

// permissions asks the cluster whether everything below is allowed.
func (j *join) permissions(ctx context.Context) error {
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	wanted := kube.RequiredAccess(j.options())
	step := j.steps.begin("permissions", "checking permissions")
	missing, err := j.member.missing(ctx, wanted)
	if err != nil {
		step.fail(api.MissingPermission, "permissions could not be checked")
		return j.member.failure("cannot check your permissions in the cluster", err)
	}
	if len(missing) > 0 && j.appliedElsewhere(ctx, missing) {
		j.lookOnly = true
		step.done("permissions to install (%d of %d): what somebody else has applied is looked at instead", len(wanted)-len(missing), len(wanted))
		return nil
	}
	if len(missing) > 0 {
		step.fail(api.MissingPermission, "permissions to install (%d of %d)", len(wanted)-len(missing), len(wanted))
		return &failure{exit: exitDenied, what: "cannot join " + j.name, code: api.MissingPermission,
			why: "your account in context " + j.member.context + " may not:\n" + strings.Join(describeAccess(missing), "\n"),
			try: "use a context whose user may (usually cluster-admin), or have the manifests applied by\nsomebody who may: " + j.outputCommand() + "\nThen run the same command again: it needs only to get tokens for meshd by then\n(create serviceaccounts/token in " + kube.Namespace + ")."}
	}
	step.done("permissions to install (%d of %d)", len(wanted), len(wanted))
	return nil
}

// reach has meshd open a connection to the API server.
func (j *join) reach(ctx context.Context) error {
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	spec := j.cluster.GetSpec()
	step := j.steps.begin("reach", "meshd tries "+spec.GetApiServer())
	r, err := j.conn.CheckReach(ctx, &api.CheckReachRequest{
		Url: spec.GetApiServer(), CertificateAuthority: spec.GetCertificateAuthority(), TlsServerName: spec.GetTlsServerName(),
	})
	if err != nil {
		step.fail("", "meshd could not try %s", spec.GetApiServer())
		return j.rpcFailure("cannot join "+j.name, err)
	}
	if !r.GetReached() {
		code := api.MeshdCannotReach
		for _, f := range r.GetFindings() {
			code = api.Code(f.GetCode())
		}
		step.fail(code, "meshd does not reach %s", spec.GetApiServer())
		return &failure{exit: exitUnreachable, what: "cannot join " + j.name, code: code,
			why: fmt.Sprintf("meshd does not reach %s (%s): %s", spec.GetApiServer(), r.GetStage(), r.GetMessage()),
			try: defaultRemedy(code)}
	}
	step.done("meshd reaches %s (%s)", spec.GetApiServer(), r.GetElapsed().AsDuration().Round(time.Millisecond))
	j.findings(r.GetFindings())
	return nil
}

// findings prints what meshd found on the way, each kind once.
func (j *join) findings(findings []*api.Finding) {
	for _, f := range findings {
		if f.GetSeverity() == "ok" || slices.Contains(j.found, f.GetCode()) {
			continue
		}
		j.found = append(j.found, f.GetCode())
		j.steps.note(f.GetSeverity(), api.Code(f.GetCode()), f.GetMessage())
		if f.GetTry() != "" {
			j.steps.hint("try: %s", f.GetTry())
		}
	}
}

// admission has meshd decide, before anything is changed, whether the cluster
// can be a member.
func (j *join) admission(ctx context.Context) error {
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	step := j.steps.begin("admission", "meshd decides")
	answer, err := j.conn.RegisterCluster(ctx, &api.RegisterClusterRequest{Cluster: j.cluster, Replace: j.replace, DryRun: true})
	if err != nil {
		step.fail(api.ProblemOf(err).Code, "meshd does not admit %s", j.name)
		return j.rpcFailure("cannot join "+j.name, err)
	}
	j.admitted = answer
	switch answer.GetOutcome() {
	case "unchanged":
		step.unchanged("%s is a member", j.name)
	case "updated":
		step.done("%s is a member and will be changed", j.name)
	case "replaced":
		step.done("meshd admits %s in place of the cluster that had its name", j.name)
	default:
		step.done("meshd admits %s as %s cluster", j.name, j.cluster.GetSpec().GetRole())
	}
	if answer.GetOutcome() == "unchanged" || answer.GetOutcome() == "updated" {
		j.known = answer.GetCluster()
	}
	if answer.GetOutcome() == "updated" {
		j.differences(j.known.GetSpec(), j.cluster.GetSpec())
	}
	if answer.GetNewNetwork() {
		j.steps.note("done", "", "network "+j.network+" is new: no other member is on it")
	}
	j.steps.note("done", "", "it may contribute "+grantText(j.cluster.GetSpec().GetGrant()))
	j.findings(answer.GetFindings())
	return nil
}

// differences says what a join changes of a member: a flag that was forgotten is seen here.
func (j *join) differences(before, after *api.ClusterSpec) {
	for _, d := range []struct{ what, before, after string }{
		{"role", before.GetRole(), after.GetRole()},
		{"network", before.GetNetwork(), after.GetNetwork()},
		{"API server", before.GetApiServer(), after.GetApiServer()},
		{"gateway addresses", strings.Join(before.GetGatewayAddresses(), ", "), strings.Join(after.GetGatewayAddresses(), ", ")},
		{"grant", grantText(before.GetGrant()), grantText(after.GetGrant())},
	} {
		if d.before != d.after {
			j.steps.note("warning", "", fmt.Sprintf("%s: %s %s %s", d.what, firstOf(d.before, "none"), j.style(j.stdout).arrow(), firstOf(d.after, "none")))
		}
	}
}

func grantText(g *api.Grant) string {
	if g == nil {
		return "every namespace but kube-*"
	}
	out := "namespaces " + strings.Join(g.GetNamespaces(), ", ")
	if len(g.GetNamespaces()) == 0 {
		out = "every namespace but kube-*"
	}
	if len(g.GetServiceAccounts()) > 0 {
		out += "; service accounts " + strings.Join(g.GetServiceAccounts(), ", ")
	}
	return out
}

// apply brings the manifests to the cluster.
func (j *join) apply(ctx context.Context) error {
	objects, err := kube.Manifests(j.options())
	if err != nil {
		return fmt.Errorf("manifests: %w", err)
	}
	if j.lookOnly {
		return j.verify(ctx, objects)
	}
	step := j.steps.begin("apply", "applying objects in namespace "+kube.Namespace)
	if err := j.awaitDeletion(ctx, step); err != nil {
		return err
	}
	outcomes := map[string]int{}
	for i, obj := range objects {
		if ctx.Err() != nil {
			step.fail("", "applied %d of %d objects in namespace %s", i, len(objects), kube.Namespace)
			return j.stopped(ctx, "while objects were applied")
		}
		outcome, err := j.applyOne(ctx, obj)
		if err != nil {
			what := obj.GetKind() + " " + obj.GetName()
			step.fail(api.ApplyFailed, "applied %d of %d objects in namespace %s", i, len(objects), kube.Namespace)
			return j.member.failure("cannot apply "+what, err)
		}
		outcomes[outcome]++
	}
	if outcomes["unchanged"] == len(objects) {
		step.unchanged("%s in namespace %s unchanged", noun(len(objects), "object"), kube.Namespace)
		return nil
	}
	verb := "applied"
	if j.dryRun {
		verb = "would apply"
	}
	j.changed = true
	step.done("%s %s in namespace %s (%d created, %d changed, %d unchanged)", verb, noun(len(objects), "object"), kube.Namespace,
		outcomes["created"], outcomes["changed"], outcomes["unchanged"])
	return nil
}

// awaitDeletion waits until a namespace that a former leave has deleted is gone:
// nothing can be made in it before.
func (j *join) awaitDeletion(ctx context.Context, step *step) error {
	for {
		one, cancel := j.atomic(ctx)
		going, err := j.member.deleting(one, kube.Namespace)
		cancel()
		switch {
		case err != nil:
			step.fail(api.ApplyFailed, "namespace %s", kube.Namespace)
			return j.member.failure("cannot look at namespace "+kube.Namespace, err)
		case !going:
			return nil
		}
		last := "namespace " + kube.Namespace + " is still being deleted"
		step.waits("%s", last)
		if err := pause(ctx, pollInterval); err != nil {
			step.fail(api.ApplyFailed, "%s", last)
			return j.stopped(ctx, last)
		}
	}
}

func (j *join) applyOne(ctx context.Context, obj *unstructured.Unstructured) (string, error) {
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	return j.member.apply(ctx, obj, j.dryRun)
}

// renewBefore is the life that meshd's credential must have left for a join to
// leave it alone.
const renewBefore = 12 * time.Hour

// credentials gets tokens for meshd, unless it has good ones.
func (j *join) credentials(ctx context.Context) error {
	if j.dryRun {
		return nil
	}
	st := j.known.GetStatus()
	if left := st.GetCredentialsExpire().AsTime().Sub(j.now()); j.known != nil && st.GetCredentialsExpire() != nil && left > renewBefore && credentialsValid(st) {
		j.steps.begin("credentials", "").unchanged("credential of meshd is good for %s", short(left))
		return nil
	}
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	step := j.steps.begin("credentials", "obtaining a credential for meshd")
	var err error
	if j.reader, err = j.member.token(ctx, kube.ReaderAccount); err == nil {
		j.writer, err = j.member.token(ctx, kube.WriterAccount)
	}
	if err != nil {
		step.fail(api.ApplyFailed, "credential for meshd")
		return j.member.failure("cannot obtain a token for meshd", err)
	}
	j.changed = true
	step.done("credential for meshd: %s, renewed by meshd itself", short(j.reader.GetExpires().AsTime().Sub(j.now())+time.Second))
	return nil
}

func credentialsValid(st *api.ClusterStatus) bool {
	for _, c := range st.GetConditions() {
		if c.GetType() == "CredentialsValid" && c.GetStatus() != "True" {
			return false
		}
	}
	return true
}

// register makes the cluster a member.
func (j *join) register(ctx context.Context) error {
	if j.dryRun {
		return nil
	}
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	step := j.steps.begin("register", "registering")
	answer, err := j.conn.RegisterCluster(ctx, &api.RegisterClusterRequest{Cluster: j.cluster, Reader: j.reader, Writer: j.writer, Replace: j.replace})
	if err != nil {
		step.fail(api.ProblemOf(err).Code, "registration of %s", j.name)
		return j.rpcFailure("cannot join "+j.name, err)
	}
	if answer.GetOutcome() == "unchanged" {
		step.unchanged("registration unchanged")
	} else {
		j.changed = true
		step.done("registered: %s", answer.GetOutcome())
	}
	j.findings(answer.GetFindings())
	return nil
}

func (j *join) farewell() {
	switch {
	case j.outputDir != "":
		j.steps.say("Apply them, then run the same command without --output-dir.")
	case j.dryRun:
		j.steps.say("Nothing was changed (dry run).")
	case !j.changed:
		j.steps.say("unchanged")
	default:
		j.steps.say("Joined in %s. Undo: mesh leave cluster %s", short(j.now().Sub(j.begun)), j.name)
	}
}
