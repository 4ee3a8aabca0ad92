// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"syscall"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"

	"github.com/isthmus-mesh/isthmus/federation"
	"github.com/isthmus-mesh/isthmus/xds"
	"github.com/isthmus-mesh/isthmus/xds/xdsserver"
)

// subjectRole says which server this process is, if it is one.
const subjectRole = "ISTHMUS_BENCH_SUBJECT"

// The subjects of comparison.
const (
	subjectOurs  = "ours"  // an xds-only meshd
	subjectGRPC  = "grpc"  // grpc-go, tuned alike, sending the same bytes with no engine
	subjectFloor = "floor" // TLS, writing the same bytes

	subjectLinear = "linear" // go-control-plane's LinearCache of the same endpoints
)

// subjectConfig is what a subject is given on its first line.
type subjectConfig struct {
	World           engineWorld
	CA, Cert, Key   []byte // PEM
	Message         []byte // what grpc and floor send
	MessagesPerFlap int
}

// subjectHello is what it answers: where it listens, and what proxies ask it for.
type subjectHello struct {
	Address       string
	Names         map[string][]string // by type URL
	LoneNames     map[string][]string
	MessagesFloor int
}

// spent is what a subject has used so far.
type spent struct {
	CPU     float64 // microseconds
	Mallocs uint64
	RSS     float64 // KiB
	Heap    float64 // KiB
	Woken   float64
}

// subject is one server.
type subject interface {
	start(subjectConfig, *tls.Config, net.Listener) (subjectHello, error)
	flap(service int) // the lone one if it is negative
	woken() float64
}

// serveSubject plays a subject: orders come as lines, answers go as lines of JSON.
func serveSubject(role string) error {
	in, out := bufio.NewReaderSize(os.Stdin, 1<<20), json.NewEncoder(os.Stdout)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	var config subjectConfig
	if err := json.Unmarshal(line, &config); err != nil {
		return err
	}
	s := map[string]subject{subjectOurs: &ours{}, subjectGRPC: &bare{}, subjectFloor: &floor{}, subjectLinear: &linear{}}[role]
	if s == nil {
		return fmt.Errorf("there is no subject %q", role)
	}
	pair, err := tls.X509KeyPair(config.Cert, config.Key)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(config.CA)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	hello, err := s.start(config, &tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true,
	}, listener)
	if err != nil {
		return err
	}
	hello.Address = listener.Addr().String()
	if err := out.Encode(hello); err != nil {
		return err
	}
	for {
		order, err := in.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if file, ok := strings.CutPrefix(strings.TrimSpace(order), "profile "); ok {
			if err := profile(file); err != nil {
				return err
			}
		}
		var answer spent
		if service, ok := strings.CutPrefix(strings.TrimSpace(order), "flap "); ok {
			i, err := strconv.Atoi(service)
			if err != nil {
				return err
			}
			s.flap(i)
			order = ""
		}
		switch strings.TrimSpace(order) {
		case "all":
			s.flap(0)
		case "one":
			s.flap(-1)
		case "settle":
			debug.FreeOSMemory()
			answer = measured(s)
		case "":
		default:
			answer = measured(s)
		}
		if err := out.Encode(answer); err != nil {
			return err
		}
	}
}

// profile begins a profile of the processor's time, or ends it where there is no file.
func profile(file string) error {
	if file == "-" {
		pprof.StopCPUProfile()
		return nil
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return pprof.StartCPUProfile(f)
}

func measured(s subject) spent {
	var r syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &r)
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	u := spent{
		CPU:     float64(r.Utime.Sec+r.Stime.Sec)*1e6 + float64(r.Utime.Usec+r.Stime.Usec),
		Mallocs: m.Mallocs, Heap: float64(m.HeapAlloc) / 1024, Woken: s.woken(),
	}
	var pages float64
	if text, err := os.ReadFile("/proc/self/statm"); err == nil {
		var size float64
		fmt.Sscan(string(text), &size, &pages)
	}
	u.RSS = pages * float64(os.Getpagesize()) / 1024
	return u
}

// ours is this project's server.
type ours struct {
	world    engineWorld
	pipeline *xdsserver.Pipeline
}

func (o *ours) start(c subjectConfig, t *tls.Config, l net.Listener) (hello subjectHello, err error) {
	o.world = c.World
	o.world.build()
	sidecar := func(r xdsserver.Restraint) xdsserver.Generator { return &xds.Builder{Weigh: r.Weigh, Closed: r.Closed} }
	o.pipeline = xdsserver.NewPipeline(xdsserver.PipelineConfig{
		Generators: map[federation.ProxyRole]func(xdsserver.Restraint) xdsserver.Generator{federation.Sidecar: sidecar},
	})
	go func() { _ = o.pipeline.Run(context.Background()) }()
	o.pipeline.Update(o.world.snapshot)
	if hello.Names, err = o.names(0); err != nil {
		return hello, err
	}
	if hello.LoneNames, err = o.names(o.world.Proxies); err != nil {
		return hello, err
	}
	gate := xdsserver.NewGate(xdsserver.Limits{})
	server := xdsserver.New(xdsserver.Config{Source: o.pipeline, Authenticate: o.who, Gate: gate})
	g := grpc.NewServer(append(xdsserver.Options(), grpc.Creds(gate.Credentials(credentials.NewTLS(t))))...)
	server.Register(g)
	go func() { _ = g.Serve(gate.Listener(l)) }()
	return hello, nil
}

// who takes the caller's word for which proxy it is: all share one certificate.
func (o *ours) who(ctx context.Context) (xdsserver.Peer, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	var i int
	if _, err := fmt.Sscan(strings.Join(headers.Get("x-proxy"), ""), &i); err != nil {
		return xdsserver.Peer{}, err
	}
	return o.peer(i), nil
}

func (o *ours) peer(i int) xdsserver.Peer {
	w := o.world.proxy(i)
	return xdsserver.Peer{
		Workload: federation.WorkloadKey{Source: w.Source, UID: w.UID}, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount,
	}
}

// names are what a proxy asks for by name, as Envoy does.
func (o *ours) names(i int) (map[string][]string, error) {
	feed, err := o.pipeline.Attach(context.Background(), o.peer(i))
	if err != nil {
		return nil, err
	}
	defer feed.Close()
	out := map[string][]string{}
	for _, typeURL := range []string{xds.EndpointType, xds.RouteType} {
		for _, r := range feed.Current().Resources[typeURL] {
			out[typeURL] = append(out[typeURL], r.Name)
		}
	}
	return out, nil
}

func (o *ours) flap(service int) {
	name := loneService
	if service >= 0 {
		name = engineService(service)
	}
	o.pipeline.Update(o.world.flap(name))
}

func (o *ours) woken() float64 {
	registry := prometheus.NewRegistry()
	registry.MustRegister(o.pipeline)
	families, err := registry.Gather()
	if err != nil {
		return 0
	}
	for _, f := range families {
		if f.GetName() == "isthmus_xds_streams_woken_total" {
			return f.Metric[0].GetCounter().GetValue()
		}
	}
	return 0
}

// bare is grpc-go that sends one message to all its streams.
type bare struct {
	message mem.BufferSlice
	mu      sync.Mutex
	streams map[grpc.ServerStream]bool
}

func (b *bare) start(c subjectConfig, t *tls.Config, l net.Listener) (subjectHello, error) {
	b.message, b.streams = mem.BufferSlice{mem.SliceBuffer(c.Message)}, map[grpc.ServerStream]bool{}
	g := grpc.NewServer(append(xdsserver.Options(), grpc.Creds(credentials.NewTLS(t)), grpc.ForceServerCodecV2(rawCodec{}))...)
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: discoveryv3.AggregatedDiscoveryService_ServiceDesc.ServiceName, HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: "DeltaAggregatedResources", Handler: b.handle, ServerStreams: true, ClientStreams: true}},
	}, b)
	go func() { _ = g.Serve(l) }()
	return subjectHello{}, nil
}

func (b *bare) handle(_ any, s grpc.ServerStream) error {
	b.mu.Lock()
	b.streams[s] = true
	b.mu.Unlock()
	defer func() {
		b.mu.Lock()
		delete(b.streams, s)
		b.mu.Unlock()
	}()
	for {
		var raw rawMessage
		if err := s.RecvMsg(&raw); err != nil {
			return err
		}
		raw.Free()
	}
}

func (b *bare) flap(int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := rawMessage{b.message}
	for s := range b.streams {
		_ = s.SendMsg(&m) // who has gone is found by its handler
	}
}

func (b *bare) woken() float64 { return 0 }

// rawMessage is a message that is neither encoded nor decoded.
type rawMessage struct{ mem.BufferSlice }

type rawCodec struct{}

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) { return v.(*rawMessage).BufferSlice, nil }
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	data.Ref()
	v.(*rawMessage).BufferSlice = data
	return nil
}
func (rawCodec) Name() string { return "proto" }

// floor writes a finished HTTP/2 frame to every connection, and reads what comes.
type floor struct {
	frame []byte
	mu    sync.Mutex
	conns map[net.Conn]bool
}

func (f *floor) start(c subjectConfig, t *tls.Config, l net.Listener) (subjectHello, error) {
	f.frame, f.conns = dataFrame(c.Message), map[net.Conn]bool{}
	listener := tls.NewListener(l, t)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go f.read(conn)
		}
	}()
	return subjectHello{}, nil
}

func (f *floor) read(conn net.Conn) {
	buf := make([]byte, 2048)
	for first := true; ; first = false {
		if _, err := conn.Read(buf); err != nil {
			return
		}
		if first {
			f.mu.Lock()
			f.conns[conn] = true
			f.mu.Unlock()
		}
	}
}

func (f *floor) flap(int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for conn := range f.conns {
		_, _ = conn.Write(f.frame) // who has gone is found by its reader
	}
}

func (f *floor) woken() float64 { return 0 }

// dataFrame is a gRPC message on stream 1, in as many DATA frames as it needs.
func dataFrame(message []byte) []byte {
	const most = 16384
	body := append([]byte{0, 0, 0, 0, 0}, message...)
	binary.BigEndian.PutUint32(body[1:], uint32(len(message)))
	var out []byte
	for len(body) > 0 {
		n := min(most, len(body))
		out = append(out, byte(n>>16), byte(n>>8), byte(n), 0, 0, 0, 0, 0, 1)
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}
