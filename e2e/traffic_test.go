// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// trafficWords are about who answers, in which protocol.
//
//	peer CLUSTER NS/APP CLUSTER NS/APP     the certificate that the caller's Envoy logged (peer=%UPSTREAM_PEER_CERT%) is the callee's
//	churn CLUSTER NS/APP DURATION          services before a workload come and go
//	changes CLUSTER NS/APP URL CLUSTER NS/APP [n=N]   how long the callee's coming and going takes to reach the caller
//	changes … CLUSTER NS/SERVICE to=NS/APP [n=N]      the same for an endpoint that appears ready, and disappears
var trafficWords = map[string]word{"peer": wordPeer, "churn": wordChurn, "changes": wordChanges}

var loggedCertificate = regexp.MustCompile(`peer="?([^" ]+CERTIFICATE[^" ]+)`)

// wordPeer compares the serial of the certificate that a caller's Envoy was shown last with
// that of the certificate that the callee's Envoy has.
func wordPeer(ctx context.Context, s *scene) error {
	args, _, err := s.need(4)
	if err != nil {
		return err
	}
	page, err := s.Envoy(ctx, args[2], args[3], "/certs")
	if err != nil {
		return err
	}
	own, err := workloadSerial(page)
	if err != nil {
		return err
	}
	pod, err := s.FirstPod(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	namespace, name, _ := strings.Cut(pod, "/")
	_, err = stage.Until(ctx, stage.Patience, func() error {
		r, err := s.Kubectl(ctx, args[0], nil, "logs", "-n", namespace, name, "-c", stage.ProxyContainer)
		if err != nil {
			return err
		}
		found := loggedCertificate.FindAllStringSubmatch(r.Stdout, -1)
		if len(found) == 0 {
			return fmt.Errorf("the log of %s has no certificate of a peer", pod)
		}
		seen, err := loggedSerial(found[len(found)-1][1])
		if err != nil {
			return err
		}
		if seen.Cmp(own) != 0 {
			return fmt.Errorf("the Envoy of %s saw the certificate %x, that of %s is %x", args[1], seen, args[3], own)
		}
		s.out = fmt.Sprintf("same serial %x\n", own)
		return nil
	})
	return err
}

// loggedSerial reads a certificate in PEM that is written as in a URL.
func loggedSerial(text string) (*big.Int, error) {
	plain, err := url.PathUnescape(text)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(plain))
	if block == nil {
		return nil, fmt.Errorf("no certificate in %q", plain)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	return c.SerialNumber, nil
}

// workloadSerial finds the one certificate with an identity on Envoy's page /certs.
func workloadSerial(page string) (*big.Int, error) {
	var certs struct {
		Certificates []struct {
			CertChain []struct {
				Serial string `json:"serial_number"`
				Names  []struct {
					URI string `json:"uri"`
				} `json:"subject_alt_names"`
			} `json:"cert_chain"`
		} `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(page), &certs); err != nil {
		return nil, err
	}
	for _, c := range certs.Certificates {
		for _, one := range c.CertChain {
			if len(one.Names) == 1 && strings.HasPrefix(one.Names[0].URI, "spiffe://") {
				if n, ok := new(big.Int).SetString(one.Serial, 16); ok {
					return n, nil
				}
			}
		}
	}
	return nil, fmt.Errorf("no certificate of a workload in\n%s", page)
}

// wordChurn makes services and deletes them again, some at a time, for a while.
func wordChurn(ctx context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	d, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	c, err := s.ClusterNamed(args[0])
	if err != nil {
		return err
	}
	namespace, app, _ := strings.Cut(args[1], "/")
	services := c.Client().CoreV1().Services(namespace)
	const atOnce = 5
	made := 0
	for end := time.Now().Add(d); time.Now().Before(end); made++ {
		one := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("passing-%d", made)},
			Spec: corev1.ServiceSpec{Selector: map[string]string{"app": app}, Ports: []corev1.ServicePort{
				{Name: "http", Port: 80}, {Name: "grpc", Port: 82}, {Name: "tcp", Port: 83},
			}},
		}
		if _, err := services.Create(ctx, one, metav1.CreateOptions{}); err != nil {
			return err
		}
		if made >= atOnce {
			if err := services.Delete(ctx, fmt.Sprintf("passing-%d", made-atOnce), metav1.DeleteOptions{}); err != nil {
				return err
			}
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.out = fmt.Sprintf("%d services came and %d went\n", made, made-atOnce)
	return nil
}

// wordChanges measures how long an endpoint's coming and going takes to reach a caller.
func wordChanges(ctx context.Context, s *scene) error {
	args, _, err := s.need(5)
	if err != nil {
		return err
	}
	n, err := s.number("n", 50)
	if err != nil {
		return err
	}
	o, err := s.Observe(ctx, args[0], args[1], args[2], 200)
	if err != nil {
		return err
	}
	defer o.Close()
	var come, gone []stage.Delay
	if to := s.opts["to"]; to != "" {
		come, gone, err = s.MeasureArrivals(ctx, o, args[3], args[4], to, n)
	} else if _, err = o.Until(ctx, args[3]+"/"); err == nil {
		come, gone, err = s.MeasureChanges(ctx, o, args[3], args[4], n)
	}
	s.out = fmt.Sprintf("%d changes\n0→1: %s\n1→0: %s\n", len(come)+len(gone), percentiles(come), percentiles(gone))
	if err == nil && len(come)+len(gone) != n {
		err = errors.New("not all changes were seen")
	}
	return err
}

// percentiles are of what the mesh took, and of all since the change was asked for.
func percentiles(delays []stage.Delay) string {
	if len(delays) == 0 {
		return "none"
	}
	at := func(q float64, of func(stage.Delay) time.Duration) time.Duration {
		var all []time.Duration
		for _, d := range delays {
			all = append(all, of(d))
		}
		slices.Sort(all)
		return all[int(q*float64(len(all)-1)+.5)].Round(100 * time.Microsecond)
	}
	mesh := func(d stage.Delay) time.Duration { return d.Mesh }
	all := func(d stage.Delay) time.Duration { return d.All }
	return fmt.Sprintf("mesh p50 %v, p99 %v, max %v; with the cluster's own controllers p50 %v, p99 %v, max %v",
		at(.5, mesh), at(.99, mesh), at(1, mesh), at(.5, all), at(.99, all), at(1, all))
}
