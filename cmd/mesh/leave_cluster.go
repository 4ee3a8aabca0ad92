// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/registry/kube"
)

// leaveFlags are the flags of mesh leave cluster.
type leaveFlags struct {
	force, yes, keepObjects bool
	drain, timeout          time.Duration
}

func (s *session) leaveClusterCommand() *cobra.Command {
	var f leaveFlags
	cmd := &cobra.Command{
		Use:   "cluster NAME",
		Short: "Take a cluster out, after its traffic has moved",
		Long: `Take a cluster out, after its traffic has moved.

First the other clusters stop calling it, then it is removed from the registry and
its identities are no longer issued or renewed, at last the objects that the join
applied are deleted from it. With --force nothing is waited for: the cluster is
dead. What a join left that was interrupted before its end is deleted too; then
--context is needed.`,
		Example: `  mesh leave cluster west --context prod-west
  mesh leave cluster west --force --yes`,
		Args: arguments(1, 1, "the name of the cluster"), ValidArgsFunction: s.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.leaveCluster(cmd.Context(), args[0], f)
		},
	}
	s.addMemberFlags(cmd)
	s.addProgressFlags(cmd, &f.timeout, 5*time.Minute)
	fl := cmd.Flags()
	fl.BoolVar(&f.force, "force", false, "do not drain, and do not touch the cluster: it is dead")
	fl.BoolVar(&f.keepObjects, "keep-objects", false, "delete nothing from the cluster")
	fl.DurationVar(&f.drain, "drain-timeout", 30*time.Second, "how long the traffic may take to move")
	fl.BoolVar(&f.yes, "yes", false, "do not ask")
	return cmd
}

func (s *session) leaveCluster(ctx context.Context, name string, f leaveFlags) error {
	c, err := s.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeoutCause(ctx, f.timeout, context.DeadlineExceeded)
	defer cancel()
	departure, err := c.DescribeDeparture(ctx, &api.DescribeDepartureRequest{Name: name})
	if err != nil {
		if cluster := s.neverJoined(ctx, c, name, err); cluster != nil {
			return s.undoJoin(ctx, c, cluster, f)
		}
		return s.rpcFailure("cannot take out "+printable(name), err)
	}
	cluster := departure.GetCluster()
	name = cluster.GetMetadata().GetName()
	p := s.newSteps()
	p.say("%s (uid %s, %s)", name, cluster.GetMetadata().GetUid(), cluster.GetSpec().GetApiServer())
	if text := departureText(departure); text != "" {
		p.say("%s", text)
	}
	question := "Drain first, then remove?"
	if f.force {
		question = "Remove without draining?"
	}
	if err := s.confirm(f.yes, question, name); err != nil {
		return err
	}
	if err := s.removeCluster(ctx, c, p, name, f); err != nil {
		return err
	}
	if err := s.cleanMember(ctx, c, p, cluster, f); err != nil {
		return err
	}
	p.say("%s has left.", name)
	return nil
}

// neverJoined is the cluster of --context if meshd knows it by no name at all and a join has
// left objects in it; else nil.
func (s *session) neverJoined(ctx context.Context, c *connection, name string, err error) *api.Cluster {
	if api.ProblemOf(err).Status != codes.NotFound || s.member.context == "" {
		return nil
	}
	m, err := s.openMember()
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.requestTimeout)
	defer cancel()
	uid, err1 := m.server.ClusterID(ctx)
	known, err2 := c.ListClusters(ctx, &api.ListClustersRequest{})
	_, err3 := m.objects.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}).Get(ctx, kube.Namespace, metav1.GetOptions{})
	if errors.Join(err1, err2, err3) != nil {
		return nil
	}
	for _, cluster := range known.GetItems() {
		if cluster.GetMetadata().GetUid() == string(uid) {
			return nil
		}
	}
	return &api.Cluster{
		Metadata: &api.Metadata{Name: name, Uid: string(uid)}, Spec: &api.ClusterSpec{Network: name, ApiServer: m.config.Host},
	}
}

// undoJoin deletes what a join that was interrupted has left in a cluster.
func (s *session) undoJoin(ctx context.Context, c *connection, cluster *api.Cluster, f leaveFlags) error {
	p := s.newSteps()
	name := cluster.GetMetadata().GetName()
	p.say("%s (uid %s, %s) is no member; an interrupted join has left objects in it.", name, cluster.GetMetadata().GetUid(), cluster.GetSpec().GetApiServer())
	if err := s.confirm(f.yes, "Delete them?", name); err != nil {
		return err
	}
	return s.cleanMember(ctx, c, p, cluster, f)
}

// departureText says what will be lost.
func departureText(d *api.Departure) string {
	const most = 5
	only := d.GetOnlyHere()
	if len(only) == 0 {
		return ""
	}
	shownNames := strings.Join(only[:min(most, len(only))], ", ")
	if len(only) > most {
		shownNames += fmt.Sprintf(" and %d more", len(only)-most)
	}
	out := fmt.Sprintf("%s serves %s nobody else has: %s", d.GetCluster().GetMetadata().GetName(), noun(len(only), "service"), shownNames)
	if d.GetCallers() > 0 {
		proxies := fmt.Sprintf("%d proxies", d.GetCallers())
		if d.GetCallers() == 1 {
			proxies = "1 proxy"
		}
		out += fmt.Sprintf(" (%s in %s)", proxies, noun(int(d.GetCallerClusters()), "other cluster"))
	}
	return out
}

// removeCluster shows the steps that meshd takes.
func (s *session) removeCluster(ctx context.Context, c *connection, p *steps, name string, f leaveFlags) error {
	stream, err := c.RemoveCluster(ctx, &api.RemoveClusterRequest{Name: name, Force: f.force, DrainTimeout: durationpb.New(f.drain)})
	if err != nil {
		return s.rpcFailure("cannot take out "+name, err)
	}
	var step *step
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			if step != nil {
				step.fail("", "%s", step.message)
			}
			return s.leaveStopped(ctx, name, err)
		}
		if step == nil || step.name != event.GetStep() {
			step = p.begin(event.GetStep(), event.GetMessage())
		}
		if event.GetState() == "running" {
			step.waits("%s", event.GetMessage())
			continue
		}
		step.finish(event.GetState(), api.Code(event.GetCode()), "%s", event.GetMessage())
		step = nil
	}
}

func (s *session) leaveStopped(ctx context.Context, name string, err error) error {
	wrapped := s.rpcFailure("cannot take out "+name, err)
	var f *failure
	if errors.As(wrapped, &f) && ctx.Err() != nil {
		f.try = "resume: mesh leave cluster " + name + "; it stays drained until then. Undo: mesh join cluster " + name + " again"
	}
	return wrapped
}

// cleanMember deletes from the cluster what the join applied.
func (s *session) cleanMember(ctx context.Context, c *connection, p *steps, cluster *api.Cluster, f leaveFlags) error {
	name := cluster.GetMetadata().GetName()
	// Only the names of the objects matter here.
	objects, err := kube.Manifests(kube.MemberOptions{
		ClusterName: name, ClusterID: cluster.GetMetadata().GetUid(), Network: cluster.GetSpec().GetNetwork(),
		Gateway: true, Root: []byte(c.config.Root), Meshd: []string{s.target},
	})
	if err != nil {
		return fmt.Errorf("manifests: %w", err)
	}
	m := s.findMember(ctx, cluster)
	if f.force || f.keepObjects || m == nil {
		p.note("warning", api.LeftBehind, fmt.Sprintf("%s remain in %s", noun(len(objects), "object"), name))
		p.hint("delete them: kubectl --context CONTEXT delete namespace %s", kube.Namespace)
		for _, o := range objects {
			if o.GetNamespace() == "" && o.GetKind() != "Namespace" {
				p.hint("             kubectl --context CONTEXT delete %s %s", strings.ToLower(o.GetKind()), o.GetName())
			}
		}
		return nil
	}
	step := p.begin("clean", "deleting objects from "+name)
	removed := 0
	for _, bundle := range kube.TrustBundles() {
		// Where the kind is not served there is none; who may not delete it may not know whether it is.
		ok, err := m.remove(ctx, bundle)
		if err != nil && !apierrors.IsForbidden(err) {
			step.fail(api.LeftBehind, "%s deleted from %s", noun(removed, "object"), name)
			return m.failure("cannot delete "+bundle.GetKind()+" "+bundle.GetName(), err)
		}
		if ok {
			removed++
		}
	}
	for i := len(objects) - 1; i >= 0; i-- {
		ok, err := m.remove(ctx, objects[i])
		if err != nil {
			step.fail(api.LeftBehind, "%s deleted from %s", noun(removed, "object"), name)
			return m.failure("cannot delete "+objects[i].GetKind()+" "+objects[i].GetName(), err)
		}
		if ok {
			removed++
		}
	}
	step.done("%s deleted from %s", noun(removed, "object"), name)
	s.reportRemains(ctx, p, m)
	return nil
}

// reportRemains tells what is left on purpose: running proxies still mount it.
func (s *session) reportRemains(ctx context.Context, p *steps, m *member) {
	list, err := m.objects.Resource(schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}).
		List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + kube.RootConfigMap})
	if err != nil {
		p.note("warning", api.LeftBehind, "what else remains could not be looked up: "+shortURLError(err))
		return
	}
	left := 0
	for _, item := range list.Items {
		if item.GetNamespace() != kube.Namespace {
			left++
		}
	}
	if left > 0 {
		p.note("done", "", fmt.Sprintf("%s left on purpose: ConfigMap %s in injected namespaces", noun(left, "object"), kube.RootConfigMap))
		p.hint("delete them: kubectl --context %s delete configmap -A --field-selector metadata.name=%s", m.context, kube.RootConfigMap)
	}
}

// findMember opens the cluster that leaves: through --context, or through the
// context of the kubeconfig that has its address. Only a cluster with the right
// UID is ever touched; nil if there is none.
func (s *session) findMember(ctx context.Context, cluster *api.Cluster) *member {
	if s.member.context == "" {
		raw, err := s.clientConfig().RawConfig()
		if err != nil {
			return nil
		}
		for name, c := range raw.Contexts {
			if at := raw.Clusters[c.Cluster]; at != nil && at.Server == cluster.GetSpec().GetApiServer() {
				s.member.context = name
			}
		}
	}
	if s.member.context == "" {
		return nil
	}
	m, err := s.openMember()
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.requestTimeout)
	defer cancel()
	if uid, err := m.server.ClusterID(ctx); err != nil || string(uid) != cluster.GetMetadata().GetUid() {
		return nil
	}
	return m
}
