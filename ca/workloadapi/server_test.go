// SPDX-License-Identifier: Apache-2.0

package workloadapi_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	spiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/ca"
	"github.com/isthmus-mesh/isthmus/ca/catest"
	"github.com/isthmus-mesh/isthmus/ca/workloadapi"
)

// held is a Source that a test changes.
type held struct {
	mu      sync.Mutex
	svid    workloadapi.SVID
	err     error
	changed chan struct{}
}

func (h *held) SVID() (workloadapi.SVID, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.svid, h.err
}

func (h *held) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.changed == nil {
		h.changed = make(chan struct{})
	}
	return h.changed
}

func (h *held) set(svid workloadapi.SVID, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.svid, h.err = svid, err
	if h.changed != nil {
		close(h.changed)
		h.changed = nil
	}
}

// issued is an identity of a real authority.
func issued(t testing.TB, authority *catest.CA, namespace string) workloadapi.SVID {
	t.Helper()
	leaf := authority.Leaf(t, catest.Subject("kube:c1", "pod-1", namespace))
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	svid := workloadapi.SVID{ID: leaf.Leaf.URIs[0].String(), Chain: leaf.Certificate, Key: key}
	for _, root := range authority.Bundle().Roots {
		svid.Roots = append(svid.Roots, root.Raw)
	}
	return svid
}

// serve runs a server on a socket until the test ends.
func serve(t testing.TB, s *workloadapi.Server) (address string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "w") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
		os.RemoveAll(dir)
	})
	return "unix://" + path
}

// dial is a client that adds nothing to its calls.
func dial(t testing.TB, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// code is the answer to the first message of a stream of identities.
func code(ctx context.Context, conn grpc.ClientConnInterface) codes.Code {
	stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	return status.Code(err)
}

// The library that everybody uses gets the identity and the roots, and makes connections with them.
func TestUnmodifiedClient(t *testing.T) {
	t.Parallel()
	authority := catest.New(t)
	source := &held{svid: issued(t, authority, "shop")}
	client, err := spiffe.New(within(t), spiffe.WithAddr(serve(t, &workloadapi.Server{Source: source})))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	svid, err := client.FetchX509SVID(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != "spiffe://cluster.local/ns/shop/sa/default" || len(svid.Certificates) != 2 {
		t.Errorf("got %s with %d certificates", svid.ID, len(svid.Certificates))
	}
	bundles, err := client.FetchX509Bundles(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if id, _, err := x509svid.Verify(svid.Certificates, bundles); err != nil || id != svid.ID {
		t.Errorf("the library does not verify what it got: %v %v", id, err)
	}
	if _, err := ca.VerifyChain(authority.TrustDomain(), authority.Pool(), time.Now(), svid.Certificates); err != nil {
		t.Error(err)
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tls.X509KeyPair(chain, key); err != nil {
		t.Errorf("the key does not belong to the certificate: %v", err)
	}
}

// collector is what a watching client saw.
type collector struct{ got chan *spiffe.X509Context }

func (c collector) OnX509ContextUpdate(x *spiffe.X509Context) { c.got <- x }
func (c collector) OnX509ContextWatchError(error)             {}

// A renewed certificate and a new root reach whoever watches, on the stream that is open.
func TestRotationIsPushed(t *testing.T) {
	t.Parallel()
	one, two := catest.New(t), catest.New(t)
	source := &held{svid: issued(t, one, "shop")}
	address := serve(t, &workloadapi.Server{Source: source})
	ctx, stop := context.WithCancel(within(t))
	seen := collector{make(chan *spiffe.X509Context, 8)}
	ended := make(chan error, 1)
	go func() { ended <- spiffe.WatchX509Context(ctx, seen, spiffe.WithAddr(address)) }()
	first := <-seen.got

	source.set(source.svid, nil) // nothing has changed: nothing is sent
	renewed := issued(t, one, "shop")
	renewed.Roots = append(renewed.Roots, two.Bundle().Roots[0].Raw)
	source.set(renewed, nil)
	second := <-seen.got
	if first.DefaultSVID().Certificates[0].Equal(second.DefaultSVID().Certificates[0]) {
		t.Error("the same certificate came twice")
	}
	bundle, ok := second.Bundles.Get(one.TrustDomain())
	if !ok || len(bundle.X509Authorities()) != 2 {
		t.Errorf("the second update has roots %v, want two", bundle)
	}
	stop()
	<-ended
	if len(seen.got) != 0 {
		t.Errorf("%d more updates came", len(seen.got))
	}
}

// The rules of the SPIFFE Workload Endpoint and Workload API, by the names they have in this project.
func TestSpiffeWorkloadAPI(t *testing.T) {
	t.Parallel()
	authority := catest.New(t)
	source := &held{svid: issued(t, authority, "shop")}
	conn := dial(t, serve(t, &workloadapi.Server{Source: source}))

	t.Run("W-1 a Unix socket, without TLS", func(t *testing.T) {
		t.Parallel()
		if got := code(withHeader(within(t)), conn); got != codes.OK {
			t.Errorf("code %v", got)
		}
	})
	t.Run("W-2 the security header", func(t *testing.T) {
		t.Parallel()
		for _, headers := range [][]string{nil, {"workload.spiffe.io", "True"}, {"workload.spiffe.io", ""}, {"workload.spiffe.io", "1"}, {"x-workload.spiffe.io", "true"}} {
			if got := code(metadata.AppendToOutgoingContext(within(t), headers...), conn); got != codes.InvalidArgument {
				t.Errorf("with %q: code %v, want InvalidArgument, after which a client does not come again", headers, got)
			}
		}
		if _, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(within(t), &workload.JWTSVIDRequest{Audience: []string{"a"}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("a call that is no stream: %v", err)
		}
	})
	t.Run("W-4 codes", func(t *testing.T) {
		t.Parallel()
		for _, c := range []struct {
			err  error
			want codes.Code
		}{
			{workloadapi.ErrStarting, codes.Unavailable}, {workloadapi.ErrNoIdentity, codes.PermissionDenied}, {os.ErrNotExist, codes.Unavailable},
		} {
			other := dial(t, serve(t, &workloadapi.Server{Source: &held{err: c.err}}))
			if got := code(withHeader(within(t)), other); got != c.want {
				t.Errorf("%v: code %v, want %v", c.err, got, c.want)
			}
		}
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchWITSVID(withHeader(within(t)), &workload.WITSVIDRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("a profile that is not there: %v", err)
		}
	})
	t.Run("W-5 reflection", func(t *testing.T) {
		t.Parallel()
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(withHeader(within(t)))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(answer.GetListServicesResponse().GetService(), func(s *reflectionpb.ServiceResponse) bool { return s.GetName() == "SpiffeWorkloadAPI" }) {
			t.Errorf("services: %v", answer)
		}
	})
	t.Run("W-6, W-8 the whole state at once", func(t *testing.T) {
		t.Parallel()
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(withHeader(within(t)), &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(answer.GetSvids()) != 1 || len(answer.GetFederatedBundles()) != 0 {
			t.Fatalf("got %v", answer)
		}
		got, want := answer.GetSvids()[0], source.svid
		if got.GetSpiffeId() != want.ID || !bytes.Equal(got.GetX509Svid(), bytes.Join(want.Chain, nil)) ||
			!bytes.Equal(got.GetX509SvidKey(), want.Key) || !bytes.Equal(got.GetBundle(), want.Roots[0]) {
			t.Errorf("got %v", got)
		}
	})
	t.Run("W-7 nothing goes out incomplete", func(t *testing.T) {
		t.Parallel()
		for _, part := range []func(*workloadapi.SVID){
			func(s *workloadapi.SVID) { s.Key = nil }, func(s *workloadapi.SVID) { s.Chain = nil },
			func(s *workloadapi.SVID) { s.Roots = nil }, func(s *workloadapi.SVID) { s.ID = "" },
		} {
			svid := source.svid
			part(&svid)
			other := dial(t, serve(t, &workloadapi.Server{Source: &held{svid: svid}}))
			if got := code(withHeader(within(t)), other); got != codes.Unavailable {
				t.Errorf("code %v, want Unavailable", got)
			}
		}
	})
	t.Run("W-9 bundles", func(t *testing.T) {
		t.Parallel()
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509Bundles(withHeader(within(t)), &workload.X509BundlesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(answer.GetBundles()) != 1 || !bytes.Equal(answer.GetBundles()["spiffe://cluster.local"], source.svid.Roots[0]) {
			t.Errorf("bundles of %d domains", len(answer.GetBundles()))
		}
	})
}

// Who asks is what the kernel says, and another user of the machine gets nothing.
func TestUsers(t *testing.T) {
	t.Parallel()
	source := &held{svid: issued(t, catest.New(t), "shop")}
	me := uint32(os.Getuid())
	for _, c := range []struct {
		users []uint32
		want  codes.Code
	}{
		{nil, codes.OK}, {[]uint32{me + 1, me}, codes.OK}, {[]uint32{me + 1}, codes.PermissionDenied}, {[]uint32{}, codes.PermissionDenied},
	} {
		conn := dial(t, serve(t, &workloadapi.Server{Source: source, Users: c.users}))
		if got := code(withHeader(within(t)), conn); got != c.want {
			t.Errorf("users %v: code %v, want %v", c.users, got, c.want)
		}
	}
}

// One user cannot take the whole server: calls beyond the limit are told to come again, and connections are closed.
func TestLimits(t *testing.T) {
	t.Parallel()
	source := &held{svid: issued(t, catest.New(t), "shop")}
	address := serve(t, &workloadapi.Server{Source: source, Streams: 2, Connections: 2})
	one, two := dial(t, address), dial(t, address)
	ctx := withHeader(within(t))
	var leave []context.CancelFunc
	for _, conn := range []*grpc.ClientConn{one, two} {
		call, cancel := context.WithCancel(ctx)
		defer cancel()
		leave = append(leave, cancel)
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(call, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	if got := code(ctx, one); got != codes.Unavailable {
		t.Errorf("a third call: code %v, want Unavailable", got)
	}
	if got := code(ctx, dial(t, address)); got != codes.Unavailable {
		t.Errorf("a third connection: code %v, want Unavailable", got)
	}
	leave[0]()
	for code(ctx, one) != codes.OK { // the server learns of the end a moment later
		if ctx.Err() != nil {
			t.Fatal("what was given back cannot be had again")
		}
	}
}
