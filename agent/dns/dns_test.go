// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/isthmus-mesh/isthmus/api"
)

func names() *api.NameTable {
	return &api.NameTable{Table: map[string]*api.NameTable_NameInfo{
		"reviews.shop.svc.cluster.local":        {Ips: []string{"10.96.0.7"}, Registry: "Kubernetes", Shortname: "reviews", Namespace: "shop"},
		"both.shop.svc.cluster.local":           {Ips: []string{"10.96.0.8", "fd00::8", "not an address"}, Registry: "Kubernetes", Shortname: "both", Namespace: "shop"},
		"db-0.db.shop.svc.cluster.local":        {Ips: []string{"240.240.0.1"}},
		"charge.pay.svc.cluster.local":          {Ips: []string{"240.240.0.2"}, Registry: "Kubernetes", Shortname: "charge", Namespace: "pay"},
		"db-0.west.db.pay.svc.clusterset.local": {Ips: []string{"240.240.0.3"}},
		"API.example.com":                       {Ips: []string{"240.240.0.4"}},
	}}
}

func TestNamesAreFoundAsPeopleWriteThem(t *testing.T) {
	t.Parallel()
	table := NewTable(names(), "shop", "cluster.local", []string{"shop.svc.cluster.local", "svc.cluster.local", "cluster.local"})
	for _, c := range []struct{ name, want string }{
		{"reviews", "10.96.0.7"},
		{"reviews.shop", "10.96.0.7"},
		{"reviews.shop.svc", "10.96.0.7"},
		{"reviews.shop.svc.cluster.local", "10.96.0.7"},
		{"Reviews.SHOP.svc.cluster.local.", "10.96.0.7"},
		{"charge.pay", "240.240.0.2"},
		{"charge", ""}, // another namespace's
		{"db-0.db", "240.240.0.1"},
		{"db-0.db.shop", "240.240.0.1"},
		{"db-0.west.db.pay.svc.clusterset.local", "240.240.0.3"},
		{"api.example.com", "240.240.0.4"},
		// What a C library with ndots:5 asks before it asks what was written.
		{"charge.pay.svc.cluster.local.shop.svc.cluster.local", "240.240.0.2"},
		{"charge.pay.svc.svc.cluster.local", "240.240.0.2"},
		{"api.example.com.shop.svc.cluster.local", "240.240.0.4"},
		// Could be pod "charge" of headless service "pay": not ours to answer.
		{"charge.pay.shop.svc.cluster.local", ""},
		{"example.com", ""},
		{"", ""},
		{".", ""},
	} {
		got := ""
		if e, ok := table.find(c.name); ok {
			got = e.four[0].String()
		}
		if got != c.want {
			t.Errorf("%q is %q, want %q", c.name, got, c.want)
		}
	}
}

// served is a server with the names above, and a resolver behind it.
type served struct {
	server   *Server
	udp, tcp string // addresses
}

// upstreamAnswer is what the resolver behind says about a name.
type upstreamAnswer func(name string) (dnsmessage.RCode, []netip.Addr)

func serve(t *testing.T, change func(*Server), behind upstreamAnswer) served {
	t.Helper()
	s := &Server{Namespace: "shop", ResolvConf: filepath.Join(t.TempDir(), "resolv.conf")}
	conf := "search corp.example\n"
	if behind != nil {
		resolver := listen(t)
		s.Port = uint16(resolver.LocalAddr().(*net.UDPAddr).Port)
		conf += "nameserver 127.0.0.1\n"
		go answerAll(resolver, behind)
	}
	if err := os.WriteFile(s.ResolvConf, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(s)
	}
	s.SetNames(names())
	packets := listen(t)
	streams, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, []net.PacketConn{packets}, []net.Listener{streams}) }()
	t.Cleanup(func() { cancel(); <-done })
	return served{s, packets.LocalAddr().String(), streams.Addr().String()}
}

func listen(t *testing.T) net.PacketConn {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func answerAll(conn net.PacketConn, behind upstreamAnswer) {
	buffer := make([]byte, 4096)
	for {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		q, err := parse(buffer[:n])
		if err != nil {
			continue
		}
		code, addresses := behind(q.question.Name.String())
		out, err := q.reply(code, addresses, 4096)
		if err == nil {
			conn.WriteTo([]byte("noise"), from)
			conn.WriteTo(out, from)
		}
	}
}

// ask sends one query and returns the answer's header and addresses.
func (s served) ask(t *testing.T, network, name string, kind dnsmessage.Type, edns int) (dnsmessage.Header, []netip.Addr) {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 4711, RecursionDesired: true})
	must(t, b.StartQuestions())
	must(t, b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}))
	if edns > 0 {
		must(t, b.StartAdditionals())
		var h dnsmessage.ResourceHeader
		must(t, h.SetEDNS0(edns, 0, false))
		must(t, b.OPTResource(h, dnsmessage.OPTResource{}))
	}
	query, err := b.Finish()
	must(t, err)
	answer, err := s.send(network, query)
	if err != nil {
		t.Fatalf("%s %s: %v", name, kind, err)
	}
	var p dnsmessage.Parser
	header, err := p.Start(answer)
	must(t, err)
	if header.ID != 4711 || !header.Response || !header.RecursionDesired {
		t.Errorf("%s: header %+v", name, header)
	}
	must(t, p.SkipAllQuestions())
	var found []netip.Addr
	resources, err := p.AllAnswers()
	must(t, err)
	for _, r := range resources {
		switch body := r.Body.(type) {
		case *dnsmessage.AResource:
			found = append(found, netip.AddrFrom4(body.A))
		case *dnsmessage.AAAAResource:
			found = append(found, netip.AddrFrom16(body.AAAA))
		}
	}
	return header, found
}

func (s served) send(network string, query []byte) ([]byte, error) {
	address := s.udp
	if network == "tcp" {
		address = s.tcp
	}
	conn, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if network == "tcp" {
		if err := writeFramed(conn, query); err != nil {
			return nil, err
		}
		return readFramed(conn)
	}
	if _, err := conn.Write(query); err != nil {
		return nil, err
	}
	buffer := make([]byte, 64<<10)
	n, err := conn.Read(buffer)
	return buffer[:n], err
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	behind := func(name string) (dnsmessage.RCode, []netip.Addr) {
		if name == "outside.example." {
			return dnsmessage.RCodeSuccess, []netip.Addr{netip.MustParseAddr("192.0.2.1")}
		}
		return dnsmessage.RCodeNameError, nil
	}
	s := serve(t, nil, behind)
	for _, c := range []struct {
		why, name string
		kind      dnsmessage.Type
		code      dnsmessage.RCode
		want      string
	}{
		{"a mesh service", "reviews.shop.svc.cluster.local.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, "10.96.0.7"},
		{"an IPv6 address that it lacks is no error", "reviews.shop.svc.cluster.local.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, ""},
		{"one that it has", "both.shop.svc.cluster.local.", dnsmessage.TypeAAAA, dnsmessage.RCodeSuccess, "fd00::8"},
		{"other types, where the resolver knows no such name", "reviews.shop.svc.cluster.local.", dnsmessage.TypeMX, dnsmessage.RCodeSuccess, ""},
		{"somebody else's", "outside.example.", dnsmessage.TypeA, dnsmessage.RCodeSuccess, "192.0.2.1"},
		{"nobody's", "nobody.example.", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
		{"a local pod that only cluster DNS knows", "pod.db.shop.svc.cluster.local.", dnsmessage.TypeA, dnsmessage.RCodeNameError, ""},
	} {
		header, found := s.ask(t, "udp", c.name, c.kind, 0)
		got := strings.Trim(fmt.Sprint(found), "[]")
		if header.RCode != c.code || got != c.want {
			t.Errorf("%s: %s, %q; want %s, %q", c.why, header.RCode, got, c.code, c.want)
		}
	}
}

func TestOnAMachineNobodyElseKnowsTheMesh(t *testing.T) {
	t.Parallel()
	s := serve(t, func(s *Server) { s.Authoritative = true }, func(name string) (dnsmessage.RCode, []netip.Addr) {
		return dnsmessage.RCodeSuccess, []netip.Addr{netip.MustParseAddr("192.0.2.66")} // a resolver that invents
	})
	header, found := s.ask(t, "udp", "nobody.shop.svc.cluster.local.", dnsmessage.TypeA, 0)
	if header.RCode != dnsmessage.RCodeNameError || len(found) != 0 {
		t.Errorf("%s %v, want no such name", header.RCode, found)
	}
}

func TestWithoutResolversOtherNamesFailAtOnce(t *testing.T) {
	t.Parallel()
	s := serve(t, nil, nil)
	header, _ := s.ask(t, "udp", "outside.example.", dnsmessage.TypeA, 0)
	if header.RCode != dnsmessage.RCodeServerFailure {
		t.Errorf("%s, want a server failure", header.RCode)
	}
}

func TestLargeAnswersAreTruncatedAndCompleteOverTCP(t *testing.T) {
	t.Parallel()
	s := serve(t, nil, nil)
	table := names()
	many := &api.NameTable_NameInfo{}
	for i := range 200 {
		many.Ips = append(many.Ips, fmt.Sprintf("10.1.%d.%d", i/250, i%250+1))
	}
	table.Table["many.shop.svc.cluster.local"] = many
	s.server.SetNames(table)
	for _, c := range []struct {
		network   string
		edns      int
		truncated bool
		all       bool
	}{
		{"udp", 0, true, false},
		{"udp", 1232, true, false},
		{"udp", 65535, false, true}, // within our own limit
		{"tcp", 0, false, true},
	} {
		header, found := s.ask(t, c.network, "many.shop.svc.cluster.local.", dnsmessage.TypeA, c.edns)
		if header.Truncated != c.truncated || (len(found) == 200) != c.all {
			t.Errorf("%s with %d: truncated %v, %d addresses", c.network, c.edns, header.Truncated, len(found))
		}
	}
}

func TestSeveralQueriesOnOneConnection(t *testing.T) {
	t.Parallel()
	s := serve(t, nil, nil)
	conn, err := net.Dial("tcp", s.tcp)
	must(t, err)
	defer conn.Close()
	must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	for range 3 {
		b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 1})
		must(t, b.StartQuestions())
		must(t, b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName("reviews."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}))
		query, err := b.Finish()
		must(t, err)
		must(t, writeFramed(conn, query))
		if _, err := readFramed(conn); err != nil {
			t.Fatal(err)
		}
	}
}

func TestGarbageIsRefusedOrIgnored(t *testing.T) {
	t.Parallel()
	s := serve(t, nil, nil)
	// A header that promises two questions and has none.
	query := binary.BigEndian.AppendUint16(nil, 9)
	query = append(query, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0)
	answer, err := s.send("udp", query)
	if err != nil || answer[1] != 9 || dnsmessage.RCode(answer[3]&0xf) != dnsmessage.RCodeFormatError {
		t.Errorf("answer %v, %v; want a format error", answer, err)
	}
	conn, err := net.Dial("udp", s.udp)
	must(t, err)
	defer conn.Close()
	query[2] = 0x80 // a response: answering it could go in circles
	_, err = conn.Write(query)
	must(t, err)
	must(t, conn.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
	if n, err := conn.Read(make([]byte, 512)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a response was answered with %d bytes, %v", n, err)
	}
}

func TestResolvConf(t *testing.T) {
	t.Parallel()
	c := ParseResolvConf("# x\nnameserver 10.0.0.1 # y\nnameserver fe80::1%eth0\nnameserver nonsense\nsearch a b ; c\noptions ndots:5\n")
	if got := fmt.Sprint(c); got != "{[10.0.0.1 fe80::1%eth0] [a b]}" {
		t.Error(got)
	}
	if got := fmt.Sprint(ResolvConf{}.Captured()); got != "[127.0.0.1 ::1]" {
		t.Errorf("a file without resolvers means %s, want loopback as C libraries have it", got)
	}
}

func FuzzAnswer(f *testing.F) {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 1})
	_ = b.StartQuestions()
	_ = b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName("reviews.shop."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET})
	seed, _ := b.Finish()
	f.Add(seed)
	f.Add([]byte{0, 9, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0})
	s := &Server{Namespace: "shop", Log: nil}
	s.SetNames(names())
	s.Log = discard()
	f.Fuzz(func(t *testing.T, packet []byte) {
		for _, network := range []string{"udp", "tcp"} {
			out := s.answer(context.Background(), packet, network)
			if out == nil {
				continue
			}
			var p dnsmessage.Parser
			header, err := p.Start(out)
			if err != nil || !header.Response {
				t.Fatalf("answer %x to %x: %v", out, packet, err)
			}
			if header.ID != binary.BigEndian.Uint16(packet) {
				t.Fatalf("answer to another query")
			}
			if network == "udp" && len(out) > largest {
				t.Fatalf("%d bytes over UDP", len(out))
			}
		}
	})
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add("nameserver 10.0.0.1\nsearch a b\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, a := range ParseResolvConf(text).Servers {
			if !a.IsValid() {
				t.Fatal("an invalid address")
			}
		}
	})
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }
