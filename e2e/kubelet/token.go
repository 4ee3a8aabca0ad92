// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"fmt"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// issueToken asks the API server for a service account's token (TokenRequest).
type issueToken func(ctx context.Context, namespace, account string, request *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)

// tokens keeps the service account tokens of one pod until they must be renewed.
type tokens struct {
	issue issueToken
	now   func() time.Time

	mu   sync.Mutex
	held map[tokenKey]heldToken
}

// tokenKey is what a token was asked for; the same request in two volumes shares a token.
type tokenKey struct {
	audience string
	seconds  int64
}

type heldToken struct {
	token   string
	renew   time.Time
	expires time.Time
}

func newTokens(issue issueToken, now func() time.Time) *tokens {
	return &tokens{issue: issue, now: now, held: map[tokenKey]heldToken{}}
}

// get gives a token that need not be renewed yet. While the API server is away
// it gives the old one as long as that is valid.
func (t *tokens) get(ctx context.Context, pod *corev1.Pod, want *corev1.ServiceAccountTokenProjection) (string, error) {
	seconds := int64(time.Hour / time.Second)
	if want.ExpirationSeconds != nil {
		seconds = *want.ExpirationSeconds
	}
	key := tokenKey{audience: want.Audience, seconds: seconds}
	t.mu.Lock()
	held, have := t.held[key]
	t.mu.Unlock()
	now := t.now()
	if have && now.Before(held.renew) {
		return held.token, nil
	}
	fresh, err := t.request(ctx, pod, key)
	if err != nil {
		if have && now.Before(held.expires) {
			t.keep(key, heldToken{token: held.token, renew: now.Add(time.Second), expires: held.expires})
			return held.token, nil
		}
		return "", err
	}
	t.keep(key, fresh)
	return fresh.token, nil
}

func (t *tokens) keep(key tokenKey, token heldToken) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held[key] = token
}

// request gets a token bound to the pod.
func (t *tokens) request(ctx context.Context, pod *corev1.Pod, key tokenKey) (heldToken, error) {
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: &key.seconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	if key.audience != "" {
		request.Spec.Audiences = []string{key.audience}
	}
	asked := t.now()
	answer, err := t.issue(ctx, pod.Namespace, pod.Spec.ServiceAccountName, request)
	if err != nil {
		return heldToken{}, fmt.Errorf("token of service account %s for audience %q: %w", pod.Spec.ServiceAccountName, key.audience, err)
	}
	expires := answer.Status.ExpirationTimestamp
	return heldToken{token: answer.Status.Token, renew: renewAt(asked, expires), expires: expires.Time}, nil
}

// renewAt is at 80 % of a token's life, and after a day at the latest.
func renewAt(asked time.Time, expires metav1.Time) time.Time {
	return asked.Add(min(expires.Sub(asked)*8/10, 24*time.Hour))
}

// renewal tells when the first of the tokens must be renewed; zero means never.
func (t *tokens) renewal() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	var first time.Time
	for _, held := range t.held {
		if first.IsZero() || held.renew.Before(first) {
			first = held.renew
		}
	}
	return first
}
