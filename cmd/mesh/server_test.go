// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"text/template"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/isthmus-mesh/isthmus/api"
	"github.com/isthmus-mesh/isthmus/ca/catest"
)

// server is a meshd on loopback that answers each method of the admin API with
// what a file says: JSON, one message or one message a line for streams. In it,
// {{ago "3m"}} and {{in "20h"}} are times.
type server struct {
	address string
	admin   *api.AdminConfig

	mu      sync.Mutex
	answers map[string]string
	refused map[string]api.Problem
	stuck   map[string]bool
	asked   map[string][]string
}

func startServer(t testing.TB) *server {
	t.Helper()
	authority := catest.New(t)
	s := &server{answers: map[string]string{}, refused: map[string]api.Problem{}, stuck: map[string]bool{}, asked: map[string][]string{}}
	files, err := filepath.Glob(filepath.Join("testdata", "fleet", "*.json"))
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata/fleet: %v, %d files", err, len(files))
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		s.answers[strings.TrimSuffix(filepath.Base(f), ".json")] = string(text)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address = l.Addr().String()
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(authority.ServerTLS(t, "127.0.0.1"))), grpc.UnknownServiceHandler(s.handle))
	go srv.Serve(l)
	t.Cleanup(srv.Stop)

	admin := authority.Admin(t)
	var chain bytes.Buffer
	for _, der := range admin.Certificate {
		pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	key, err := x509.MarshalPKCS8PrivateKey(admin.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	s.admin = &api.AdminConfig{
		APIVersion: api.Version, Kind: api.AdminConfigKind, Server: "https://" + s.address, TrustDomain: catest.TrustDomain,
		Root: string(authority.Bundle().PEM()), Certificate: chain.String(),
		Key: string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
	}
	return s
}

// handle answers any method of the admin API.
func (s *server) handle(_ any, stream grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(stream)
	method, err := methodOf(full)
	if err != nil {
		return err
	}
	name := string(method.Name())
	request := dynamicpb.NewMessage(method.Input())
	if err := stream.RecvMsg(request); err != nil {
		return err
	}
	s.mu.Lock()
	asked, _ := protojson.Marshal(request)
	var compact bytes.Buffer
	json.Compact(&compact, asked)
	s.asked[name] = append(s.asked[name], compact.String())
	answer, problem, stuck := s.answers[name], s.refused[name], s.stuck[name]
	s.mu.Unlock()
	switch {
	case stuck:
		<-stream.Context().Done()
		return stream.Context().Err()
	case problem.Message != "":
		return problem
	case answer == "":
		return api.Problem{Status: codes.Unimplemented, Message: "the script has no answer for " + name}
	}
	if method.IsStreamingServer() {
		for line := range strings.Lines(answer) {
			if err := send(stream, method, line); err != nil {
				return err
			}
		}
		return nil
	}
	if name == "GetCluster" || name == "DescribeDeparture" {
		answer, err = s.oneCluster(request, answer, name)
		if err != nil {
			return err
		}
	}
	return send(stream, method, answer)
}

// oneCluster is the cluster that is asked for, from a list.
func (s *server) oneCluster(request *dynamicpb.Message, answer, method string) (string, error) {
	if !strings.Contains(answer, "ClusterList") {
		return answer, nil
	}
	want := request.Get(request.Descriptor().Fields().ByName("name")).String()
	list := &api.ClusterList{}
	if err := protojson.Unmarshal([]byte(render(answer)), list); err != nil {
		return "", fmt.Errorf("answer to %s: %w", method, err)
	}
	for _, c := range list.GetItems() {
		if c.GetMetadata().GetName() == want {
			out, err := protojson.Marshal(c)
			return string(out), err
		}
	}
	return "", api.Problem{Status: codes.NotFound, Code: api.UnknownName, Message: fmt.Sprintf("there is no cluster %q", want), Try: "did you mean west?"}
}

func methodOf(full string) (protoreflect.MethodDescriptor, error) {
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(full, "/"), "/", ".")))
	if err != nil {
		return nil, err
	}
	return d.(protoreflect.MethodDescriptor), nil
}

func send(stream grpc.ServerStream, method protoreflect.MethodDescriptor, text string) error {
	answer := dynamicpb.NewMessage(method.Output())
	if err := protojson.Unmarshal([]byte(render(text)), answer); err != nil {
		return fmt.Errorf("answer to %s: %w", method.Name(), err)
	}
	return stream.SendMsg(proto.Message(answer))
}

// render fills in the times.
func render(text string) string {
	at := func(sign time.Duration) func(string) (string, error) {
		return func(d string) (string, error) {
			v, err := time.ParseDuration(d)
			return time.Now().Add(sign * v).UTC().Format(time.RFC3339Nano), err
		}
	}
	var out strings.Builder
	err := template.Must(template.New("").Funcs(template.FuncMap{"ago": at(-1), "in": at(1)}).Parse(text)).Execute(&out, nil)
	if err != nil {
		panic(err) // a mistake in testdata
	}
	return out.String()
}

func (s *server) answer(_ *testscript.TestScript, method, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answers[method] = text
	delete(s.refused, method)
}

func (s *server) refuse(ts *testscript.TestScript, method, status, code, message, try string) {
	var c codes.Code
	ts.Check(c.UnmarshalJSON([]byte(`"` + status + `"`)))
	s.mu.Lock()
	defer s.mu.Unlock()
	if code == "-" {
		code = ""
	}
	s.refused[method] = api.Problem{Status: c, Code: api.Code(code), Message: message, Try: try}
}

func (s *server) slow(method string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stuck[method] = true
}

func (s *server) requests(method string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.asked[method], "\n")
}
