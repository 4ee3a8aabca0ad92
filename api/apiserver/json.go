// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api"
)

// mux is the JSON form of the API and what virtual machines fetch. Path and
// query give the fields of the request by their JSON names, the body of a POST
// the whole request. Streams answer with one JSON object a line.
func (s *Server) mux() http.Handler {
	admin := http.NewServeMux()
	for pattern, handler := range map[string]http.HandlerFunc{
		"GET /api/v1/version":                   unary(s.GetVersion),
		"GET /api/v1/clusters":                  unary(s.ListClusters),
		"POST /api/v1/clusters":                 unary(s.RegisterCluster),
		"GET /api/v1/clusters/{name}":           unary(s.GetCluster, "name"),
		"GET /api/v1/clusters/{name}/departure": unary(s.DescribeDeparture, "name"),
		"DELETE /api/v1/clusters/{name}":        streaming(s.RemoveCluster, "name"),
		"POST /api/v1/reach":                    unary(s.CheckReach),
		"POST /api/v1/paths":                    unary(s.ProbePaths),
		"GET /api/v1/services":                  unary(s.ListServices),
		"GET /api/v1/endpoints":                 unary(s.ListEndpoints),
		"GET /api/v1/proxies":                   unary(s.ListProxies),
		"GET /api/v1/config":                    unary(s.ListConfig),
		"GET /api/v1/check":                     unary(s.Check),
		"GET /api/v1/vms":                       unary(s.ListVMs),
		"POST /api/v1/vms":                      unary(s.OnboardVM),
		"DELETE /api/v1/vms/{name}":             unary(s.OffboardVM, "name"),
		"GET /api/v1/activity":                  streaming(s.TailActivity),
		"GET /api/v1/activity/verification":     unary(s.VerifyActivity),
		"GET /api/v1/authority":                 unary(s.GetAuthority),
		"POST /api/v1/authority/rotation":       unary(s.RotateAuthority),
		"GET /api/v1/authority/trust":           unary(s.ListTrust),
	} {
		admin.HandleFunc(pattern, handler)
	}
	top := http.NewServeMux()
	top.Handle("/api/v1/", s.adminOnly(jsonErrors(admin)))
	top.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	s.routeOnboarding(top)
	return top
}

// jsonErrors words what the mux itself refuses as the API words its errors.
func jsonErrors(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, pattern := mux.Handler(r); pattern == "" {
			writeProblem(w, api.Problem{Status: codes.Unimplemented, Message: fmt.Sprintf("there is no %s %s", r.Method, r.URL.Path)})
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// unary makes a handler of a method. inPath are the fields that the pattern has.
func unary[T any, R interface {
	*T
	proto.Message
}, A proto.Message](method func(context.Context, R) (A, error), inPath ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		req := R(new(T))
		if err := readRequest(w, r, req, inPath); err != nil {
			writeProblem(w, err)
			return
		}
		answer, err := method(r.Context(), req)
		if err != nil {
			writeProblem(w, err)
			return
		}
		data, err := marshal(answer)
		if err != nil {
			writeProblem(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(append(data, '\n'))
	}
}

// streaming makes a handler of a method that answers with a stream.
func streaming[T, A any, R interface {
	*T
	proto.Message
}](method func(R, grpc.ServerStreamingServer[A]) error, inPath ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		req := R(new(T))
		if err := readRequest(w, r, req, inPath); err != nil {
			writeProblem(w, err)
			return
		}
		out := &lineStream[A]{w: w, ctx: r.Context()}
		if err := method(req, out); err != nil {
			if !out.begun {
				writeProblem(w, err)
				return
			}
			json.NewEncoder(w).Encode(bodyOf(problemOf(err))) // the status line is gone already
		}
	}
}

// lineStream sends messages as lines of JSON.
type lineStream[A any] struct {
	grpc.ServerStream // nil: nothing but Send and Context is used
	w                 http.ResponseWriter
	ctx               context.Context
	begun             bool
}

func (l *lineStream[A]) Context() context.Context { return l.ctx }

func (l *lineStream[A]) Send(m *A) error {
	data, err := marshal(any(m).(proto.Message))
	if err != nil {
		return err
	}
	if !l.begun {
		l.w.Header().Set("Content-Type", "application/x-ndjson")
		l.begun = true
	}
	if _, err := l.w.Write(append(data, '\n')); err != nil {
		return err
	}
	return http.NewResponseController(l.w).Flush()
}

// marshal is protojson without its random spaces.
func marshal(m proto.Message) ([]byte, error) {
	data, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = json.Compact(&b, data)
	return b.Bytes(), err
}

// readRequest fills req from the body, the query and the path.
func readRequest(w http.ResponseWriter, r *http.Request, req proto.Message, inPath []string) error {
	if r.Method == http.MethodPost {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
		if err != nil {
			return invalid("body: %v", err)
		}
		if err := decodeBody(body, req); err != nil {
			return err
		}
	}
	if err := setFields(req, r.URL.Query()); err != nil {
		return err
	}
	for _, name := range inPath {
		if err := setField(req, name, []string{r.PathValue(name)}); err != nil {
			return err
		}
	}
	return nil
}

func decodeBody(body []byte, req proto.Message) error {
	if len(bytes.TrimSpace(body)) == 0 {
		return nil
	}
	if err := protojson.Unmarshal(body, req); err != nil {
		return invalid("body: %v", err)
	}
	return nil
}

// problemBody is the JSON of an error.
type problemBody struct {
	Error problemJSON `json:"error"`
}

type problemJSON struct {
	Status  string `json:"status"` // gRPC's name, "NotFound"
	Code    string `json:"code,omitempty"`
	Message string `json:"message"`
	Try     string `json:"try,omitempty"`
}

func problemOf(err error) api.Problem {
	var p api.Problem
	if err = explain(err); errors.As(err, &p) {
		return p
	}
	return api.ProblemOf(err)
}

func bodyOf(p api.Problem) problemBody {
	return problemBody{problemJSON{Status: p.Status.String(), Code: string(p.Code), Message: p.Message, Try: p.Try}}
}

func writeProblem(w http.ResponseWriter, err error) {
	p := problemOf(err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(httpStatus(p.Status))
	json.NewEncoder(w).Encode(bodyOf(p))
}
