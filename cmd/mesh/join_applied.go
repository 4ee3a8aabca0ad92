// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/registry/kube"
)

// appliedElsewhere tells whether a join can go on without the missing permissions, since
// somebody else has applied the manifests of --output-dir: the namespace is there, and what
// the join itself still has to do, to ask for meshd's tokens, is allowed.
func (j *join) appliedElsewhere(ctx context.Context, missing []authorizationv1.ResourceAttributes) bool {
	for _, m := range missing {
		if m.Resource == "serviceaccounts" && m.Subresource == "token" {
			return false
		}
	}
	_, err := j.member.objects.Resource(namespaces).Get(ctx, kube.Namespace, metav1.GetOptions{})
	return err == nil || apierrors.IsForbidden(err)
}

// verify looks whether all objects are in the cluster as apply would have made them.
func (j *join) verify(ctx context.Context, objects []*unstructured.Unstructured) error {
	ctx, cancel := j.atomic(ctx)
	defer cancel()
	step := j.steps.begin("apply", "looking at the objects in namespace "+kube.Namespace)
	var wrong []string
	unseen := 0
	for _, obj := range objects {
		what := obj.GetKind() + " " + obj.GetName()
		live, err := j.member.resource(obj).Get(ctx, obj.GetName(), metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			wrong = append(wrong, what+" is not there")
		case apierrors.IsForbidden(err):
			unseen++
		case err != nil:
			step.fail(api.ApplyFailed, "%s", what)
			return j.member.failure("cannot look at "+what, err)
		default:
			if field := differing("", obj.Object, live.Object); field != "" {
				wrong = append(wrong, what+" is another: "+field)
			}
		}
	}
	if len(wrong) > 0 {
		step.fail(api.MissingPermission, "%d of %d objects are as they are to be", len(objects)-unseen-len(wrong), len(objects))
		return &failure{exit: exitDenied, what: "cannot join " + j.name, code: api.MissingPermission,
			why: "you may not apply what is not there, or is not what the join needs:\n" + strings.Join(wrong, "\n"),
			try: "have these applied by somebody who may: " + j.outputCommand() + "\nThen run the same command again."}
	}
	text := fmt.Sprintf("%s in namespace %s applied by somebody else", noun(len(objects), "object"), kube.Namespace)
	if unseen > 0 {
		text += fmt.Sprintf(" (%d of them you may not look at)", unseen)
	}
	step.unchanged("%s", text)
	return nil
}

// outputCommand is the command that writes the manifests.
func (j *join) outputCommand() string {
	out := "mesh join cluster " + j.name
	if j.member != nil && j.member.context != "" {
		out += " --context " + j.member.context
	}
	out += " --network " + j.network
	if j.primary {
		out += " --primary"
	}
	return out + " --output-dir DIR"
}

// differing names the first field of want that live has otherwise; "" if there is none.
// What live has besides is the API server's or somebody else's.
func differing(path string, want, live any) string {
	switch want := want.(type) {
	case map[string]any:
		have, ok := live.(map[string]any)
		if !ok {
			return path
		}
		for key, value := range want {
			if field := differing(strings.TrimPrefix(path+"."+key, "."), value, have[key]); field != "" {
				return field
			}
		}
		return ""
	case []any:
		have, ok := live.([]any)
		if !ok || len(have) != len(want) {
			return path
		}
		for i := range want {
			if field := differing(fmt.Sprintf("%s[%d]", path, i), want[i], have[i]); field != "" {
				return field
			}
		}
		return ""
	}
	if fmt.Sprint(want) != fmt.Sprint(live) {
		return path
	}
	return ""
}
