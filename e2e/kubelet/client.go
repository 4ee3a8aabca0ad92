// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"net/http"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// NewClient makes a client for a kubelet: without the limit of requests per
// second that clients have otherwise, and with watches that come back soon
// after an outage of the API server instead of up to a minute later.
func NewClient(config *rest.Config) (kubernetes.Interface, error) {
	config = rest.CopyConfig(config)
	config.QPS = -1
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return persistent{next} })
	return kubernetes.NewForConfig(config)
}

// retryWatch is the pause between attempts to reach an API server that is away.
const retryWatch = 300 * time.Millisecond

// persistent repeats the lists and watches of informers until the server takes
// them. Informers themselves would wait longer and longer.
type persistent struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (p persistent) RoundTrip(r *http.Request) (*http.Response, error) {
	for {
		response, err := p.next.RoundTrip(r)
		if err == nil || r.Method != http.MethodGet || !r.URL.Query().Has("resourceVersion") {
			return response, err
		}
		if !sleep(r.Context(), retryWatch) {
			return nil, err
		}
	}
}
