// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	security "istio.io/api/security/v1alpha1"
)

// roundOf is how often each thing is done in a round, and underWay how many calls at once.
const roundOf, underWay = 400, 8

// playAuthority measures what issuing costs the service, in processor time of its process, against what no
// authority can do without.
func playAuthority(ctx context.Context, b *bench) error {
	dir, err := os.MkdirTemp("", "isthmus-bench-ca-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	a, err := startAuthority(ctx, dir)
	if err != nil {
		return err
	}
	return errors.Join(a.measure(ctx, b), a.stop())
}

// authorityClient is who asks the service.
type authorityClient struct {
	*child
	access authorityAccess
	tls    []*tls.Config // one for each workload
	csr    string
	conn   *grpc.ClientConn
	writes int64 // to its state, by the last answer
}

func startAuthority(ctx context.Context, dir string) (*authorityClient, error) {
	c, err := newChild(ctx, authoritySwitch, dir)
	if err != nil {
		return nil, err
	}
	a := &authorityClient{child: c}
	if err := a.out.Decode(&a.access); err != nil {
		return nil, errors.Join(err, a.stop())
	}
	if err := a.prepare(); err != nil {
		return nil, errors.Join(err, a.stop())
	}
	return a, nil
}

func (a *authorityClient) prepare() error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.access.Roots)
	for _, chain := range a.access.Chains {
		pair, err := tls.X509KeyPair(chain, a.access.Key)
		if err != nil {
			return err
		}
		a.tls = append(a.tls, &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}, ServerName: "127.0.0.1"})
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), key)
	if err != nil {
		return err
	}
	a.csr = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	a.conn, err = a.dial(0)
	return err
}

func (a *authorityClient) dial(workload int) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+a.access.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(a.tls[workload])))
}

func (a *authorityClient) stop() error {
	if a.conn != nil {
		a.conn.Close()
	}
	return a.child.stop()
}

// order has the service do something in process.
func (a *authorityClient) order(what string, times int) error {
	var answer struct {
		Writes int64 `json:"writes"`
	}
	err := a.child.ask(fmt.Sprintf("{\"do\":%q,\"times\":%d}", what, times), &answer)
	a.writes = answer.Writes
	return err
}

// ask is one renewal.
func (a *authorityClient) ask(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := security.NewIstioCertificateServiceClient(conn).CreateCertificate(ctx, &security.IstioCertificateRequest{Csr: a.csr})
	return err
}

// connectAndAsk is one renewal on a connection of its own.
func (a *authorityClient) connectAndAsk(ctx context.Context, workload int) error {
	conn, err := a.dial(workload)
	if err != nil {
		return err
	}
	defer conn.Close()
	return a.ask(ctx, conn)
}

// shake is one handshake.
func (a *authorityClient) shake(ctx context.Context, workload int) error {
	conn, err := (&tls.Dialer{Config: a.tls[workload]}).DialContext(ctx, "tcp", a.access.Handshake)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Read(make([]byte, 1)) // in TLS 1.3 the client is through before the server is
	return err
}

func (a *authorityClient) measure(ctx context.Context, b *bench) error {
	const rounds, times = 21, roundOf
	// repeat has some calls under way at any moment, as a service with something to do has.
	repeat := func(one func(workload int) error) func() error {
		return func() error {
			group := new(errgroup.Group)
			group.SetLimit(underWay)
			for n := range times {
				group.Go(func() error { return one(n) })
			}
			return group.Wait()
		}
	}
	works := []struct {
		name string
		work func() error
	}{
		{"bare", func() error { return a.order("bare", times) }},
		{"issue", func() error { return a.order("issue", times) }},
		{"grpc", repeat(func(int) error { return a.ask(ctx, a.conn) })},
		{"handshake", repeat(func(n int) error { return a.shake(ctx, n) })},
		{"connect", repeat(func(n int) error { return a.connectAndAsk(ctx, n) })},
	}
	if err := a.order("issue", 1); err != nil { // the issuer of the source is made
		return err
	}
	before := a.writes
	each := map[string][]float64{} // microseconds of the service's processor time for one
	var issue, kept, fresh []float64
	for round := range rounds + 1 {
		now := map[string]float64{}
		for _, w := range works {
			if err := a.order("collect", 1); err != nil {
				return err
			}
			start, err := processorTime(a.cmd.Process.Pid)
			if err != nil {
				return err
			}
			if err := w.work(); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			end, err := processorTime(a.cmd.Process.Pid)
			if err != nil {
				return err
			}
			now[w.name] = (end - start) / times
			each[w.name] = append(each[w.name], now[w.name])
		}
		if round == 0 {
			each = map[string][]float64{} // everything is warm from here on
			continue
		}
		issue = append(issue, now["issue"]/now["bare"])
		kept = append(kept, now["grpc"]/now["bare"])
		fresh = append(fresh, now["connect"]/(now["bare"]+now["handshake"]))
	}
	median := func(name string) float64 { return quantile(each[name], 0.5) }
	note := fmt.Sprintf("processor time of the service for one, median of %d rounds of %d each, in turn, %d calls at once: bare %.0f us (%.0f a second and processor), issue %.0f us (%.0f), renewal on a kept connection %.0f us, mutual handshake %.0f us, renewal on a fresh connection %.0f us",
		rounds, times, underWay, median("bare"), 1e6/median("bare"), median("issue"), 1e6/median("issue"), median("grpc"), median("handshake"), median("connect"))
	b.say("%s", note)
	b.report("issue-vs-bare", quantile(issue, 0.5), "%s", note)
	b.report("issue-grpc-vs-bare", quantile(kept, 0.5), "%s", note)
	b.report("issue-connect-vs-sum", quantile(fresh, 0.5), "%s", note)
	b.report("etcd-writes-per-leaf", float64(a.writes-before), "writes to the state while %d certificates were issued", 3*(rounds+1)*times)
	return nil
}

// processorTime is what a process has used so far, of all its threads, in microseconds.
func processorTime(pid int) (float64, error) {
	threads, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task", "*", "schedstat"))
	if err != nil || len(threads) == 0 {
		return 0, fmt.Errorf("processor time of %d: %d threads, %w", pid, len(threads), err)
	}
	total := 0.0
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // it has ended since
		}
		if err != nil {
			return 0, err
		}
		nanoseconds, err := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
		if err != nil {
			return 0, err
		}
		total += nanoseconds / 1000
	}
	return total, nil
}
