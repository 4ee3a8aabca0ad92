// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/xds"
)

// crowd is proxies that acknowledge what they get and never decode it. They ask as Envoy
// does: clusters, then the endpoints of these, then listeners, then their routes.
type crowd struct {
	address string
	tls     *tls.Config
	hello   subjectHello
	last    int // index of the lone proxy; -1 if there is none

	together int                          // how many connect at once
	only     string                       // the one type that is asked for; empty for all
	kept     map[string]map[string]string // what proxies come back with: versions by type and name

	proxies  []*simulated
	messages atomic.Int64
	bytes    atomic.Int64
	latest   atomic.Int64 // when a message came last, in Unix nanoseconds
	lost     atomic.Pointer[error]
	heard    atomic.Pointer[func(name string, at time.Time)] // called for each endpoint resource

	mu      sync.Mutex
	capture []byte                       // the last endpoint response
	learnt  map[string]map[string]string // versions that the first proxy got, by type and name
}

// simulated is one of them.
type simulated struct {
	crowd *crowd
	lone  bool
	slow  atomic.Bool // does not answer for now, and is not counted
	picky atomic.Bool // refuses what it gets
	conn  *tls.Conn
	asked map[string]bool

	writing sync.Mutex
}

// connect brings n proxies up, some at a time. Those that ask get their first answers.
func (c *crowd) connect(ctx context.Context, n int, ask bool) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(16, c.together))
	first := len(c.proxies)
	c.proxies = append(c.proxies, make([]*simulated, n)...)
	for i := first; i < first+n; i++ {
		group.Go(func() error {
			p := &simulated{crowd: c, lone: i == c.last, asked: map[string]bool{}}
			c.proxies[i] = p
			if err := p.open(ctx, i); err != nil {
				return fmt.Errorf("proxy %d: %w", i, err)
			}
			switch {
			case !ask:
				return nil
			case c.kept != nil:
				return p.comeBack(i)
			case c.only != "":
				return p.ask(c.only, i)
			}
			return p.ask(xds.ClusterType, i)
		})
	}
	return group.Wait()
}

func (c *crowd) close() {
	for _, p := range c.proxies {
		if p != nil && p.conn != nil {
			p.conn.Close()
		}
	}
}

// quiet waits until nothing has come for a while.
func (c *crowd) quiet(ctx context.Context, d time.Duration) error {
	return c.until(ctx, 20*time.Millisecond, func() bool { return time.Since(time.Unix(0, c.latest.Load())) > d })
}

// arrived waits until so many messages have come altogether.
func (c *crowd) arrived(ctx context.Context, messages int64) error {
	return c.until(ctx, time.Millisecond, func() bool { return c.messages.Load() >= messages })
}

// until waits for a condition, or for the first proxy that is lost.
func (c *crowd) until(ctx context.Context, every time.Duration, holds func() bool) error {
	err := until(ctx, every, func() (bool, error) { return holds() || c.lost.Load() != nil, nil })
	if lost := c.lost.Load(); lost != nil {
		return *lost
	}
	return err
}

// open dials, and begins an incremental stream.
func (p *simulated) open(ctx context.Context, i int) error {
	conn, err := (&tls.Dialer{Config: p.crowd.tls}).DialContext(ctx, "tcp", p.crowd.address)
	if err != nil {
		return err
	}
	p.conn = conn.(*tls.Conn)
	var out bytes.Buffer
	out.WriteString(http2.ClientPreface)
	f := http2.NewFramer(&out, nil)
	_ = f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1})
	_ = f.WriteWindowUpdate(0, 1<<30)
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, h := range [][2]string{
		{":method", "POST"}, {":scheme", "https"},
		{":path", "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"},
		{":authority", "bench"}, {"content-type", "application/grpc"}, {"te", "trailers"}, {"x-proxy", fmt.Sprint(i)},
	} {
		_ = encoder.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	if _, err := p.conn.Write(out.Bytes()); err != nil {
		return err
	}
	go func() {
		if err := p.read(i); !errors.Is(err, io.EOF) && ctx.Err() == nil {
			err = fmt.Errorf("proxy %d: %w", i, err)
			p.crowd.lost.CompareAndSwap(nil, &err)
		}
	}()
	return nil
}

// ask subscribes to a type.
func (p *simulated) ask(typeURL string, i int) error {
	p.asked[typeURL] = true
	r := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL}
	if len(p.asked) == 1 {
		r.Node = &corev3.Node{Id: fmt.Sprintf("sidecar~10.0.0.1~app-%d.app~app.svc.cluster.local", i)}
	}
	names := p.crowd.hello.Names
	if p.lone {
		names = p.crowd.hello.LoneNames
	}
	r.ResourceNamesSubscribe, r.InitialResourceVersions = names[typeURL], p.crowd.kept[typeURL]
	if typeURL == probeType {
		r.ResourceNamesSubscribe = []string{"x"}
	}
	body, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	return p.send(dataFrame(body))
}

// probeType is a type that there is nothing of. It is answered when all else has been.
const probeType = "type.googleapis.com/envoy.bench.Probe"

// comeBack asks for everything at once, as who was connected before.
func (p *simulated) comeBack(i int) error {
	for _, typeURL := range []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, probeType} {
		if err := p.ask(typeURL, i); err != nil {
			return err
		}
	}
	return nil
}

func (p *simulated) send(b []byte) error {
	p.writing.Lock()
	defer p.writing.Unlock()
	_, err := p.conn.Write(b)
	return err
}

// read answers until the connection ends.
func (p *simulated) read(i int) error {
	f := http2.NewFramer(nil, p.conn)
	f.SetReuseFrames()
	var pending []byte
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.DataFrame:
			pending = append(pending, frame.Data()...)
			for len(pending) >= 5 {
				n := int(binary.BigEndian.Uint32(pending[1:5]))
				if len(pending) < 5+n {
					break
				}
				if err := p.hear(pending[5:5+n], i); err != nil {
					return err
				}
				pending = pending[5+n:]
			}
			if len(pending) == 0 {
				pending = nil // most of the time there is nothing to keep
			}
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				err = p.send([]byte{0, 0, 0, byte(http2.FrameSettings), byte(http2.FlagSettingsAck), 0, 0, 0, 0})
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				err = p.send(append([]byte{0, 0, 8, byte(http2.FramePing), byte(http2.FlagPingAck), 0, 0, 0, 0}, frame.Data[:]...))
			}
		case *http2.HeadersFrame:
			if frame.StreamEnded() {
				return errors.New("the stream was ended")
			}
		case *http2.GoAwayFrame:
			return fmt.Errorf("sent away: %v", frame.ErrCode)
		}
		if err != nil {
			return err
		}
	}
}

// hear acknowledges a response, and asks for what Envoy asks for next.
func (p *simulated) hear(message []byte, i int) error {
	typeURL, nonce, err := envelope(message)
	if err != nil {
		return err
	}
	ack := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), typeURL)
	ack = protowire.AppendBytes(protowire.AppendTag(ack, 6, protowire.BytesType), nonce)
	if p.slow.Load() {
		return nil
	}
	if p.picky.Load() {
		ack = protowire.AppendBytes(protowire.AppendTag(ack, 7, protowire.BytesType), []byte("\x12\x02no")) // google.rpc.Status.message
	}
	if err := p.send(dataFrame(ack)); err != nil {
		return err
	}
	p.crowd.bytes.Add(int64(len(message)))
	p.crowd.latest.Store(time.Now().UnixNano())
	follow := map[string]string{xds.ClusterType: xds.EndpointType, xds.EndpointType: xds.ListenerType, xds.ListenerType: xds.RouteType}
	kind := string(typeURL)
	if kind == xds.EndpointType {
		p.crowd.keep(message)
	}
	if i == 0 || p.crowd.heard.Load() != nil && kind == xds.EndpointType {
		p.crowd.look(message, kind, i == 0)
	}
	p.crowd.messages.Add(1)
	if p.crowd.only != "" || p.crowd.kept != nil {
		return nil
	}
	if next := follow[kind]; next != "" && !p.asked[next] && p.asked[kind] {
		return p.ask(next, i)
	}
	return nil
}

func (c *crowd) keep(message []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.capture = append(c.capture[:0], message...)
}

// look reads names and versions of the resources in a response.
func (c *crowd) look(message []byte, kind string, learn bool) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(message) > 0 {
		number, _, n := protowire.ConsumeTag(message)
		size := protowire.ConsumeFieldValue(number, protowire.BytesType, message[n:])
		if size < 0 {
			return
		}
		if number == 2 {
			resource, _ := protowire.ConsumeBytes(message[n:])
			name, version := identity(resource)
			if learn {
				if c.learnt == nil {
					c.learnt = map[string]map[string]string{}
				}
				if c.learnt[kind] == nil {
					c.learnt[kind] = map[string]string{}
				}
				c.learnt[kind][name] = version
			}
			if heard := c.heard.Load(); heard != nil {
				(*heard)(name, now)
			}
		}
		message = message[n+size:]
	}
}

// identity is the name and the version of an encoded resource.
func identity(resource []byte) (name, version string) {
	for len(resource) > 0 {
		number, _, n := protowire.ConsumeTag(resource)
		value, size := protowire.ConsumeBytes(resource[n:])
		if size < 0 {
			return "", ""
		}
		switch number {
		case 1:
			version = string(value)
		case 3:
			name = string(value)
		}
		resource = resource[n+size:]
	}
	return name, version
}

// envelope finds type and nonce of an incremental response without decoding its resources.
func envelope(b []byte) (typeURL, nonce []byte, err error) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, nil, protowire.ParseError(n)
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			return nil, nil, protowire.ParseError(n)
		}
		if kind == protowire.BytesType && (number == 4 || number == 5) {
			value, _ := protowire.ConsumeBytes(b)
			if number == 4 {
				typeURL = value
			} else {
				nonce = value
			}
		}
		b = b[n:]
	}
	return typeURL, nonce, nil
}
