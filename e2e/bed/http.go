// SPDX-License-Identifier: Apache-2.0

package bed

import (
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"time"
)

// HTTPClient returns a client whose connections start in the namespace. It
// opens a new one for each request, so that every request meets the network as
// it is at that moment.
func (n *Namespace) HTTPClient() *http.Client { return httpClient(n.Dial, nil) }

func httpClient(dial dialer, config *tls.Config) *http.Client {
	return &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{DialContext: dial, TLSClientConfig: config, DisableKeepAlives: true},
	}
}

// Get asks for a URL from inside the namespace and returns the status code and
// the body.
func (n *Namespace) Get(ctx context.Context, url string) (status int, body string, err error) {
	return get(ctx, n.HTTPClient(), url)
}

func get(ctx context.Context, client *http.Client, url string) (int, string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	var body strings.Builder
	_, err = io.Copy(&body, response.Body)
	return response.StatusCode, body.String(), err
}
