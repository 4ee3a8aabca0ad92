// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"strings"
)

// rotationWords are about the authority that is replaced.
//
//	handshakes CLUSTER NS/APP [min=N]      how many TLS handshakes its Envoy has made since the last time, as either side;
//	     at least N, and none that it refused or that was broken off
var rotationWords = map[string]word{"handshakes": wordHandshakes}

// handshakes is what an Envoy has counted, over all its listeners and clusters.
type handshakes struct {
	made   int
	failed map[string]int // by statistic
}

// failures are the statistics of handshakes that came to nothing.
var failures = []string{"ssl.fail_verify_error", "ssl.fail_verify_no_cert", "ssl.fail_verify_san", "ssl.fail_verify_cert_hash", "ssl.connection_error"}

func wordHandshakes(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	least, err := s.number("min", 0)
	if err != nil {
		return err
	}
	page, err := s.Envoy(ctx, args[0], args[1], "/stats?filter=ssl")
	if err != nil {
		return err
	}
	name := args[0] + " " + args[1]
	before, now := s.shakes[name], countHandshakes(page)
	if s.shakes == nil {
		s.shakes = map[string]handshakes{}
	}
	s.shakes[name] = now
	made := now.made - before.made
	s.out = fmt.Sprintf("%d handshakes\n", made)
	if before.failed != nil {
		for _, f := range failures {
			if n := now.failed[f] - before.failed[f]; n > 0 {
				err = fmt.Errorf("%s: %d more of %s after %d handshakes\n%s", name, n, f, made, failedLines(page))
			}
		}
	}
	if err == nil && made < least {
		err = fmt.Errorf("%s: %d handshakes, want at least %d", name, made, least)
	}
	return err
}

func countHandshakes(page string) handshakes {
	h := handshakes{failed: map[string]int{}}
	for line := range strings.SplitSeq(page, "\n") {
		name, value, ok := strings.Cut(line, ": ")
		n := 0
		if _, err := fmt.Sscan(value, &n); !ok || err != nil {
			continue
		}
		if strings.HasSuffix(name, "ssl.handshake") {
			h.made += n
		}
		for _, f := range failures {
			if strings.HasSuffix(name, f) {
				h.failed[f] += n
			}
		}
	}
	return h
}

// failedLines are the statistics that say where.
func failedLines(page string) string {
	var out []string
	for line := range strings.SplitSeq(page, "\n") {
		for _, f := range failures {
			if strings.Contains(line, f+": ") && !strings.HasSuffix(line, ": 0") {
				out = append(out, line)
			}
		}
	}
	return strings.Join(out, "\n")
}
