// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// hostileWords are about what must be refused or survived.
//
//	person NAME CLUSTER [role=R] [expired]     an account, and its kubeconfig NAME.conf
//	remote-secret CLUSTER FILE [expired]       what istioctl create-remote-secret prints
//	interrupt TEXT ARG… [code=N]               mesh ARG…, and Ctrl-C once it has printed TEXT
//	crowd CLUSTER NS/NAME n=N                  a Service whose N endpoints are written by hand
//	known CLUSTER as=NAME                      the cluster's name in the mesh is another one
//	denied CLUSTER NS/APP                      its first pod's agent asks for a certificate and is turned away
//	crds CLUSTER                               the kinds of Istio
//	bloat CLUSTER NS/NAME ANNOTATION n=BYTES   a very long annotation of a Service
var hostileWords = map[string]word{
	"person": wordPerson, "remote-secret": wordRemoteSecret, "interrupt": wordInterrupt, "crowd": wordCrowd, "bloat": wordBloat,
	"crds": wordCRDs, "known": wordKnown, "denied": wordDenied,
}

func wordPerson(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	p := stage.Person{Name: args[0], Role: s.opts["role"], Expired: s.has("expired")}
	return s.Kubeconfig(ctx, args[1], p, s.ts.MkAbs(args[0]+".conf"))
}

func wordRemoteSecret(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	return s.RemoteSecret(ctx, args[0], s.has("expired"), s.ts.MkAbs(args[1]))
}

func wordInterrupt(ctx context.Context, s *scene) error {
	args, rest, err := s.need(1)
	if err != nil {
		return err
	}
	r, err := s.Interrupt(ctx, args[0], rest...)
	s.out = r.Stdout
	if err == nil {
		err = s.exited(r.Code, "130")
	}
	return err
}

func wordKnown(_ context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	c, err := s.ClusterNamed(args[0])
	if err == nil {
		c.KnownAs(s.opts["as"])
	}
	return err
}

// wordDenied makes an agent renew its certificate, and reads in its log what became of it.
func wordDenied(ctx context.Context, s *scene) error {
	cluster, pod, err := s.pod(ctx)
	if err != nil {
		return err
	}
	asked := time.Now()
	if err := s.Signal(cluster, pod, stage.ProxyContainer, syscall.SIGHUP); err != nil {
		return err
	}
	namespace, name, _ := strings.Cut(pod, "/")
	_, err = stage.Until(ctx, stage.Patience, func() error {
		since := "--since-time=" + asked.Add(-time.Second).UTC().Format(time.RFC3339)
		r, err := s.Kubectl(ctx, cluster, nil, "logs", "-n", namespace, name, "-c", stage.ProxyContainer, since)
		if err != nil {
			return err
		}
		s.out = r.Stdout + r.Stderr
		if !strings.Contains(r.Stdout, "PermissionDenied") {
			return fmt.Errorf("the agent says nothing of a refusal:\n%s", s.out)
		}
		return nil
	})
	return err
}

func wordCRDs(ctx context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	return s.IstioKinds(ctx, args[0])
}

func wordCrowd(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	n, err := s.number("n", 5000)
	if err != nil {
		return err
	}
	return s.Crowd(ctx, args[0], args[1], n)
}

func wordBloat(ctx context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	n, err := s.number("n", 200<<10)
	if err != nil {
		return err
	}
	return s.Bloat(ctx, args[0], args[1], args[2], n)
}
