// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/agent/onboard"
	"github.com/isthmus-mesh/isthmus/deploy"
	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/registry"
)

// routeOnboarding adds what a virtual machine fetches before it has an identity.
// Nothing of it is secret; the token that makes it useful is not here.
func (s *Server) routeOnboarding(mux *http.ServeMux) {
	for _, path := range []string{"/onboard/script", "/onboard/onboard.sh"} {
		mux.HandleFunc("GET "+path, content("text/x-shellscript", func() []byte { return deploy.OnboardScript }))
	}
	mux.HandleFunc("GET /onboard/mesh-agent.service", content("text/plain", func() []byte { return deploy.AgentUnit }))
	for _, path := range []string{"/onboard/root.pem", "/onboard/root-cert.pem"} {
		mux.HandleFunc("GET "+path, content("application/x-pem-file", func() []byte { return s.cfg.Authority.Bundle().PEM() }))
	}
	mux.HandleFunc("GET /onboard/mesh-agent", program(s.cfg.AgentBinary))
	mux.HandleFunc("GET /onboard/envoy", program(s.cfg.EnvoyBinary))
	mux.HandleFunc("GET /onboard/{name}/config", s.serveVMConfig)
}

func content(kind string, bytes func() []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", kind)
		w.Write(bytes())
	}
}

// program serves a file of this machine for the architecture that is asked for.
func program(path func(arch string) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		arch := r.URL.Query().Get("arch")
		if arch == "" {
			arch = "amd64"
		}
		// Only known names get as far as the configuration.
		if arch != "amd64" && arch != "arm64" {
			http.Error(w, fmt.Sprintf("arch %q, want amd64 or arm64", arch), http.StatusBadRequest)
			return
		}
		file := ""
		if path != nil {
			file = path(arch)
		}
		if file == "" {
			http.Error(w, "meshd does not offer this program for "+arch, http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeFile(w, r, file)
	}
}

// serveVMConfig tells a registered machine what it is registered as.
func (s *Server) serveVMConfig(w http.ResponseWriter, r *http.Request) {
	for name, vm := range s.cfg.Store.VMs() {
		if name.Name != r.PathValue("name") {
			continue
		}
		config, err := s.vmConfig(vm)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(config)
		return
	}
	http.Error(w, fmt.Sprintf("no virtual machine %q is registered: mesh vm onboard NAME", r.PathValue("name")), http.StatusNotFound)
}

func (s *Server) vmConfig(vm *registry.VM) (*onboard.Config, error) {
	health, err := healthCheck(vm.HealthCheck)
	if err != nil {
		return nil, err
	}
	c := &onboard.Config{
		V: onboard.Version, Name: vm.Name, Namespace: vm.Service.Namespace, ServiceAccount: vm.ServiceAccount,
		Service: vm.Service.Name, Network: string(vm.Network), Server: strings.Join(s.advertised(), ","),
		TrustDomain: s.cfg.Authority.Bundle().TrustDomain.Name(), Domain: federation.ClusterDomain,
		Health: health, Labels: vm.Labels, CaptureTo: s.cfg.CaptureTo,
		Locality: strings.TrimRight(vm.Locality.Region+"/"+vm.Locality.Zone+"/"+vm.Locality.Subzone, "/"),
	}
	for _, p := range vm.Ports {
		target := p.Target
		if target == 0 {
			target = p.Number
		}
		c.Ports = append(c.Ports, onboard.Port{Name: p.Name, Port: uint16(target), Protocol: string(p.Protocol)})
	}
	return c, nil
}

// healthCheck reads "http://:8080/ready" or "tcp://:8080"; nil for "".
func healthCheck(text string) (*onboard.Health, error) {
	if text == "" {
		return nil, nil
	}
	u, err := url.Parse(text)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil || port == 0 || u.Hostname() != "" || u.RawQuery != "" || u.User != nil {
		return nil, errors.New("want http://:PORT/PATH or tcp://:PORT")
	}
	switch {
	case u.Scheme == "tcp" && u.Path == "":
		return &onboard.Health{Port: uint16(port)}, nil
	case u.Scheme == "http":
		path := u.Path
		if path == "" {
			path = "/"
		}
		return &onboard.Health{Port: uint16(port), Path: path}, nil
	}
	return nil, errors.New("want http://:PORT/PATH or tcp://:PORT")
}
