// SPDX-License-Identifier: Apache-2.0

package sds

import (
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
)

// receive turns blocking reads into a channel; it ends with the stream.
func receive[T any](done <-chan struct{}, recv func() (T, error)) (<-chan T, <-chan error) {
	requests, failed := make(chan T), make(chan error, 1)
	go func() {
		for {
			request, err := recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- request:
			case <-done:
				return
			}
		}
	}()
	return requests, failed
}

func endOf(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// StreamSecrets serves the state-of-the-world variant. Envoy opens one stream
// per secret.
func (s *Server) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	requests, failed := receive(stream.Context().Done(), stream.Recv)
	holds := s.join()
	defer s.leave(holds)
	var names []string
	var sent, nonce string
	for count := 1; ; {
		changed := s.Source.Changed()
		found, err := s.secrets()
		if err != nil {
			return err
		}
		response := stateOfTheWorld(found, names)
		if len(response.GetResources()) > 0 && response.GetVersionInfo() != sent {
			nonce = strconv.Itoa(count)
			count++
			response.Nonce, sent = nonce, response.GetVersionInfo()
			if slices.Contains(names, RootsName) {
				s.sent(holds, nonce, found[RootsName].version)
			}
			if err := stream.Send(response); err != nil {
				return err
			}
		}
		select {
		case err := <-failed:
			return endOf(err)
		case <-stream.Context().Done():
			return nil
		case <-changed:
		case request := <-requests:
			if request.GetResponseNonce() != "" && request.GetResponseNonce() != nonce {
				continue // about an answer that was already replaced
			}
			if detail := request.GetErrorDetail(); detail != nil {
				s.refused(strings.Join(names, ","), detail.GetMessage())
			}
			s.heard(holds, request.GetResponseNonce(), request.GetErrorDetail())
			if !slices.Equal(names, request.GetResourceNames()) {
				names, sent = request.GetResourceNames(), ""
				s.wants(holds, slices.Contains(names, RootsName), "")
			}
		}
	}
}

// DeltaSecrets serves the incremental variant.
func (s *Server) DeltaSecrets(stream secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	requests, failed := receive(stream.Context().Done(), stream.Recv)
	holds := s.join()
	defer s.leave(holds)
	held := map[string]string{} // subscribed name -> version Envoy has, "" for none
	for count := 1; ; {
		changed := s.Source.Changed()
		found, err := s.secrets()
		if err != nil {
			return err
		}
		response := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: SecretType, Nonce: strconv.Itoa(count)}
		for name, version := range held {
			if one, ok := found[name]; ok && one.version != version {
				held[name] = one.version
				response.Resources = append(response.Resources, &discoveryv3.Resource{Name: name, Version: one.version, Resource: one.body})
				if name == RootsName {
					s.sent(holds, response.GetNonce(), one.version)
				}
			}
		}
		if len(response.GetResources()) > 0 {
			count++
			if err := stream.Send(response); err != nil {
				return err
			}
		}
		select {
		case err := <-failed:
			return endOf(err)
		case <-stream.Context().Done():
			return nil
		case <-changed:
		case request := <-requests:
			if detail := request.GetErrorDetail(); detail != nil {
				s.refused(strings.Join(slices.Sorted(maps.Keys(held)), ","), detail.GetMessage())
			}
			s.heard(holds, request.GetResponseNonce(), request.GetErrorDetail())
			subscribe(held, request)
			version, wants := held[RootsName]
			s.wants(holds, wants, version)
		}
	}
}

// subscribe applies one request to what the client holds. Naming a secret
// again asks for it again, even if unchanged.
func subscribe(held map[string]string, request *discoveryv3.DeltaDiscoveryRequest) {
	for _, name := range request.GetResourceNamesSubscribe() {
		held[name] = request.GetInitialResourceVersions()[name]
	}
	for _, name := range request.GetResourceNamesUnsubscribe() {
		delete(held, name)
	}
}
