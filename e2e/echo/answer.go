// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
)

// Place is where a process runs.
type Place struct {
	Cluster   string `json:"cluster,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Node      string `json:"node,omitempty"`
	Version   string `json:"version,omitempty"`
}

// here reads the place from the environment; CLUSTER is what the bed's kubelet sets for
// every pod, HOSTNAME stands in for POD on a VM.
func here() Place {
	host, _ := os.Hostname()
	p := Place{
		Cluster: os.Getenv("CLUSTER"), Namespace: os.Getenv("NAMESPACE"), Pod: os.Getenv("POD"),
		Node: os.Getenv("NODE"), Version: os.Getenv("VERSION"),
	}
	if p.Pod == "" {
		p.Pod = host
	}
	return p
}

// Answer is what every protocol answers with, as one line of JSON.
type Answer struct {
	Place
	Protocol string              `json:"protocol"`
	Remote   string              `json:"remote,omitempty"` // peer's address as the server saw it
	Local    string              `json:"local,omitempty"`
	Method   string              `json:"method,omitempty"`
	Host     string              `json:"host,omitempty"`
	Path     string              `json:"path,omitempty"`
	Headers  map[string][]string `json:"headers,omitempty"`
	Peer     string              `json:"peer,omitempty"` // SPIFFE ID of the caller, as the proxy forwarded it
	Body     string              `json:"body,omitempty"`
}

func (a Answer) line() []byte {
	b, err := json.Marshal(a)
	if err != nil {
		panic(err) // strings and maps of strings always marshal
	}
	return append(b, '\n')
}

// parseAnswer reads what line wrote.
func parseAnswer(b []byte) (Answer, error) {
	var a Answer
	if err := json.Unmarshal(b, &a); err != nil {
		return a, fmt.Errorf("not an answer of echo: %.120q: %w", b, err)
	}
	if a.Protocol == "" {
		return a, fmt.Errorf("not an answer of echo: %.120q has no protocol", b)
	}
	return a, nil
}

// peerOf takes the caller's URI from Envoy's x-forwarded-client-cert: the last element's
// URI, since each proxy on the way appends.
func peerOf(h http.Header) string {
	elements := strings.Split(h.Get("X-Forwarded-Client-Cert"), ",")
	for pair := range strings.SplitSeq(elements[len(elements)-1], ";") {
		if uri, ok := strings.CutPrefix(strings.TrimSpace(pair), "URI="); ok {
			return strings.Trim(uri, `"`)
		}
	}
	return ""
}
