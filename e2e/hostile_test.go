// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"strconv"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// hostileWords are about what must be refused or survived.
//
//	person NAME CLUSTER [role=R] [expired]     an account, and its kubeconfig NAME.conf
//	remote-secret CLUSTER FILE [expired]       what istioctl create-remote-secret prints
//	interrupt TEXT ARG… [code=N]               mesh ARG…, and Ctrl-C once it has printed TEXT
//	crowd CLUSTER NS/NAME n=N                  a Service whose N endpoints are written by hand
//	crds CLUSTER                               the kinds of Istio
//	bloat CLUSTER NS/NAME ANNOTATION n=BYTES   a very long annotation of a Service
var hostileWords = map[string]word{
	"person": wordPerson, "remote-secret": wordRemoteSecret, "interrupt": wordInterrupt, "crowd": wordCrowd, "bloat": wordBloat,
	"crds": wordCRDs,
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
	if want := first(s.opts["code"], "130"); err == nil && want != strconv.Itoa(r.Code) {
		err = fmt.Errorf("exit code %d, want %s\n%s", r.Code, want, s.out)
	}
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
