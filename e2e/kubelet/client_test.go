// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// awayUntil is a transport to a server that is away for a while.
type awayUntil struct{ back time.Time }

func (a awayUntil) RoundTrip(*http.Request) (*http.Response, error) {
	if time.Now().Before(a.back) {
		return nil, errors.New("connection refused")
	}
	return &http.Response{StatusCode: http.StatusOK}, nil
}

func TestPersistent(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		why, method, url string
		ok               bool
		took             time.Duration
	}{
		{"a watch waits for the server", http.MethodGet, "/api/v1/pods?watch=1&resourceVersion=7", true, 60 * time.Second},
		{"so does an informer's list", http.MethodGet, "/api/v1/pods?limit=500&resourceVersion=0", true, 60 * time.Second},
		{"a single read does not", http.MethodGet, "/api/v1/namespaces/a/configmaps/b", false, 0},
		{"nor does a write", http.MethodPatch, "/api/v1/pods?resourceVersion=7", false, 0},
	} {
		t.Run(c.why, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				request, err := http.NewRequestWithContext(t.Context(), c.method, "http://api"+c.url, nil)
				if err != nil {
					t.Fatal(err)
				}
				_, err = persistent{awayUntil{start.Add(time.Minute)}}.RoundTrip(request)
				if took := time.Since(start); (err == nil) != c.ok || took != c.took {
					t.Errorf("got %v after %s, want success %t after %s", err, took, c.ok, c.took)
				}
			})
		})
	}
	t.Run("unless nobody waits for it", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://api/pods?resourceVersion=7", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := (persistent{awayUntil{time.Now().Add(time.Hour)}}).RoundTrip(request); err == nil {
				t.Error("a server that is away answers")
			}
		})
	})
}
