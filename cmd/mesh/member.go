// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/registry/kube"
)

// member is a Kubernetes cluster as the person at the command line reaches it.
type member struct {
	context string // name in the kubeconfig; "" if it came otherwise
	config  *rest.Config
	server  *kube.API
	objects dynamic.Interface
}

// clientConfig follows kubectl: --kubeconfig, KUBECONFIG, ~/.kube/config.
func (s *session) clientConfig() clientcmd.ClientConfig {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = s.member.kubeconfig
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: s.member.context})
}

// openMember prepares the connection to the cluster that the flags name.
func (s *session) openMember() (*member, error) {
	loader := s.clientConfig()
	raw, err := loader.RawConfig()
	if err != nil {
		return nil, usagef("kubeconfig: %v", err)
	}
	name := s.member.context
	if name == "" {
		name = raw.CurrentContext
	}
	if _, ok := raw.Contexts[name]; !ok {
		return nil, unknownContext(name, raw.Contexts)
	}
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, usagef("kubeconfig: context %q: %v", name, err)
	}
	config.Impersonate = rest.ImpersonationConfig{UserName: s.member.as, Groups: s.member.asGroups}
	return newMember(name, config)
}

func unknownContext[V any](name string, contexts map[string]V) error {
	var names []string
	for n := range contexts {
		names = append(names, n)
	}
	f := &failure{exit: exitUsage, what: "cannot choose a cluster", code: api.UnknownName,
		why: fmt.Sprintf("the kubeconfig has no context %q", name), try: "kubectl config get-contexts (lists them), then --context NAME"}
	if name == "" {
		f.why, f.code = "no context is given, and the kubeconfig has no current one", ""
	} else if n := nearest(name, names); n != "" {
		f.try = "did you mean --context " + n + "?"
	}
	return f
}

func newMember(contextName string, config *rest.Config) (*member, error) {
	config.UserAgent = "mesh/" + version()
	config.QPS, config.Burst = 50, 100
	config.Timeout = 30 * time.Second
	server, err := kube.NewAPI(config)
	if err != nil {
		return nil, usagef("kubeconfig: context %q: %v", contextName, err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, usagef("kubeconfig: context %q: %v", contextName, err)
	}
	return &member{context: contextName, config: config, server: server, objects: objects}, nil
}

// host of the API server.
func (m *member) host() string {
	if u, err := url.Parse(m.config.Host); err == nil && u.Host != "" {
		return u.Host
	}
	return m.config.Host
}

// failure explains an error of the API server.
func (m *member) failure(what string, err error) error {
	f := &failure{exit: exitFailed, what: what, why: err.Error(), code: api.ApplyFailed, err: err}
	var status apierrors.APIStatus
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		f.exit, f.code = exitTimeout, api.TimedOut
	case errors.As(err, &status) && apierrors.IsUnauthorized(err):
		f.exit, f.code = exitDenied, api.CredentialRefused
		f.why = "the API server at " + m.host() + " does not accept the credentials of the kubeconfig"
		f.try = "log in to the cluster again, then run the same command"
		if m.context == "" {
			f.why = "the API server at " + m.host() + " does not accept the token of the Secret"
			f.try = "make a new one: istioctl create-remote-secret"
		}
	case errors.As(err, &status) && apierrors.IsForbidden(err):
		f.exit, f.code = exitDenied, api.MissingPermission
		if f.why == "unknown" { // what client-go makes of an answer that is no Status
			f.why = "the API server at " + m.host() + " forbids it to the user of the kubeconfig"
		}
	case !errors.As(err, &status):
		f.exit, f.code = exitUnreachable, api.MemberUnreachable
		f.why = "API server at " + m.host() + ": " + strings.TrimSpace(shortURLError(err))
	}
	if f.try == "" {
		f.try = defaultRemedy(f.code)
	}
	return f
}

// shortURLError drops the request that net/http repeats in front of the cause.
func shortURLError(err error) string {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err.Error()
	}
	return err.Error()
}

// missing returns those of the wanted permissions that the caller does not have.
func (m *member) missing(ctx context.Context, wanted []authorizationv1.ResourceAttributes) ([]authorizationv1.ResourceAttributes, error) {
	reviews := m.objects.Resource(authorizationv1.SchemeGroupVersion.WithResource("selfsubjectaccessreviews"))
	var out []authorizationv1.ResourceAttributes
	for _, w := range wanted {
		review := &authorizationv1.SelfSubjectAccessReview{
			TypeMeta: metav1.TypeMeta{APIVersion: authorizationv1.SchemeGroupVersion.String(), Kind: "SelfSubjectAccessReview"},
			Spec:     authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &w},
		}
		content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(review)
		if err != nil {
			return nil, err
		}
		answer, err := reviews.Create(ctx, &unstructured.Unstructured{Object: content}, metav1.CreateOptions{})
		if err != nil {
			return nil, err
		}
		if allowed, _, _ := unstructured.NestedBool(answer.Object, "status", "allowed"); !allowed {
			out = append(out, w)
		}
	}
	return out, nil
}

// describeAccess has a line for each resource, for example "create, patch
// deployments.apps in isthmus-system".
func describeAccess(list []authorizationv1.ResourceAttributes) []string {
	var out []string
	var verbs []string
	for i, a := range list {
		verbs = append(verbs, a.Verb)
		a.Verb = ""
		if i+1 < len(list) {
			next := list[i+1]
			next.Verb = ""
			if next == a {
				continue
			}
		}
		out = append(out, strings.Join(verbs, ", ")+" "+describeResource(a))
		verbs = nil
	}
	return out
}

func describeResource(a authorizationv1.ResourceAttributes) string {
	out := a.Resource
	if a.Subresource != "" {
		out += "/" + a.Subresource
	}
	if a.Group != "" {
		out += "." + a.Group
	}
	if a.Name != "" {
		out += " " + a.Name
	}
	if a.Namespace != "" {
		out += " in " + a.Namespace
	}
	return out
}

// resource is where objects of obj's kind are. The kinds of our manifests have
// regular plurals.
func (m *member) resource(obj *unstructured.Unstructured) dynamic.ResourceInterface {
	gvr, _ := meta.UnsafeGuessKindToResource(obj.GroupVersionKind())
	if obj.GetNamespace() == "" {
		return m.objects.Resource(gvr)
	}
	return m.objects.Resource(gvr).Namespace(obj.GetNamespace())
}

// apply brings obj to the cluster by server-side apply. The outcome is
// "created", "changed" or "unchanged".
func (m *member) apply(ctx context.Context, obj *unstructured.Unstructured, dryRun bool) (string, error) {
	at := m.resource(obj)
	before, err := at.Get(ctx, obj.GetName(), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return "", err
	}
	created := err != nil
	options := metav1.ApplyOptions{FieldManager: kube.FieldManager, Force: true}
	if dryRun {
		options.DryRun = []string{metav1.DryRunAll}
	}
	after, err := at.Apply(ctx, obj.GetName(), obj, options)
	switch {
	case err != nil && dryRun && apierrors.IsNotFound(err):
		return "created", nil // its namespace is not there yet
	case err != nil:
		return "", err
	case created:
		return "created", nil
	case sameObject(before, after):
		return "unchanged", nil
	}
	return "changed", nil
}

// sameObject compares what an apply may change. Controllers write the status whenever they
// like, also between two looks: that is no change of ours.
func sameObject(before, after *unstructured.Unstructured) bool {
	return equality.Semantic.DeepEqual(given(before), given(after))
}

// given is an object without what the cluster itself writes.
func given(o *unstructured.Unstructured) map[string]any {
	o = o.DeepCopy()
	unstructured.RemoveNestedField(o.Object, "status")
	o.SetResourceVersion("")
	o.SetManagedFields(nil)
	return o.Object
}

var namespaces = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}

// deleting tells whether a namespace is there and on its way out.
func (m *member) deleting(ctx context.Context, namespace string) (bool, error) {
	ns, err := m.objects.Resource(namespaces).Get(ctx, namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil && ns.GetDeletionTimestamp() != nil, err
}

// remove deletes obj; false if it was not there.
func (m *member) remove(ctx context.Context, obj *unstructured.Unstructured) (bool, error) {
	policy := metav1.DeletePropagationBackground
	err := m.resource(obj).Delete(ctx, obj.GetName(), metav1.DeleteOptions{PropagationPolicy: &policy})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

func (s *session) completeContexts(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	raw, err := s.clientConfig().RawConfig()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for n := range raw.Contexts {
		names = append(names, n)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
