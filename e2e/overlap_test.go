// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
)

// overlapWords count at the callees: what a caller is told could itself have strayed.
//
//	recount WHO…                      begin anew: what was answered so far does not count
//	counted WHO… [http=N] [first=N]   how many calls all of WHO answered since; WHO is
//	                                  CLUSTER:NS/APP (all its pods) or a VM
var overlapWords = map[string]word{"recount": wordRecount, "counted": wordCounted}

func wordRecount(ctx context.Context, s *scene) error {
	for _, who := range s.args {
		if _, err := s.ask(ctx, who, "-X", "POST", "http://127.0.0.1:8080/control/recount"); err != nil {
			return err
		}
	}
	return nil
}

func wordCounted(ctx context.Context, s *scene) error {
	if _, _, err := s.need(1); err != nil {
		return err
	}
	counts := map[string]int{}
	for _, who := range s.args {
		pages, err := s.ask(ctx, who, "http://127.0.0.1:8080/count")
		if err != nil {
			return err
		}
		for _, page := range pages {
			for line := range strings.Lines(page) {
				var protocol string
				var n int
				if _, err := fmt.Sscan(line, &protocol, &n); err != nil {
					return fmt.Errorf("%s: /count: %q: %w", who, line, err)
				}
				counts[protocol] += n
			}
		}
	}
	var wrong []error
	for _, protocol := range []string{"http", "first"} {
		want, err := s.number(protocol, 0)
		if err != nil {
			return err
		}
		s.out += fmt.Sprintf("%s %d\n", protocol, counts[protocol])
		if counts[protocol] != want {
			wrong = append(wrong, fmt.Errorf("%s: %d calls, want %d", protocol, counts[protocol], want))
		}
	}
	return errors.Join(wrong...)
}

// ask gets a page of each echo program over its own loopback, which no proxy captures.
func (s *scene) ask(ctx context.Context, who string, get ...string) ([]string, error) {
	if vm, ok := s.VMs()[who]; ok {
		out, err := vm.Run(ctx, "/opt/echo get "+strings.Join(get, " "))
		return []string{string(out)}, err
	}
	cluster, workload, ok := strings.Cut(who, ":")
	if !ok {
		return nil, fmt.Errorf("%s: want CLUSTER:NAMESPACE/APP or a VM", who)
	}
	pods, err := s.Pods(ctx, cluster, workload)
	if err != nil {
		return nil, err
	}
	if len(pods) == 0 {
		return nil, fmt.Errorf("there are no pods of %s in %s", workload, cluster)
	}
	var pages []string
	for _, pod := range pods {
		var out bytes.Buffer
		err := s.Exec(ctx, cluster, pod.Namespace+"/"+pod.Name, "app", &out, append([]string{"echo", "get"}, get...)...)
		if err != nil {
			return nil, err
		}
		pages = append(pages, out.String())
	}
	return pages, nil
}
