// SPDX-License-Identifier: Apache-2.0

package stage

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// lookPatience bounds one look at a stage on which something has gone wrong.
const lookPatience = 5 * time.Second

// viewLines is how much of an answer is shown.
const viewLines = 100

// View is what the mesh and the clusters say of themselves, for who has only a failed
// story's output: on which side of the mesh something was not known.
func (s *Stage) View(ctx context.Context) string {
	var b strings.Builder
	look := func(what string, run func(ctx context.Context) (Result, error)) {
		ctx, cancel := context.WithTimeout(ctx, lookPatience)
		defer cancel()
		r, err := run(ctx)
		fmt.Fprintf(&b, "%s:\n%s%s", what, atMost(r.Stdout, viewLines), r.Stderr)
		if err != nil {
			fmt.Fprintf(&b, "%v\n", err)
		}
	}
	s.mu.Lock()
	started := s.first != nil
	s.mu.Unlock()
	if started {
		for _, args := range [][]string{{"clusters", "-o", "wide"}, {"proxies", "-o", "wide"}, {"services", "-o", "wide"}, {"endpoints", "-o", "wide"}, {"check"}} {
			look("mesh "+strings.Join(args, " "), func(ctx context.Context) (Result, error) { return s.Mesh(ctx, args...) })
		}
	}
	var names []string
	for _, c := range s.allClusters() {
		names = append(names, c.Name())
	}
	slices.Sort(names)
	for _, name := range names {
		look("pods and endpoint slices of "+name, func(ctx context.Context) (Result, error) {
			return s.Kubectl(ctx, name, nil, "get", "pods,endpointslices", "-A", "-o", "wide", "--request-timeout=3s")
		})
	}
	return b.String()
}

// atMost is the beginning of a text.
func atMost(text string, lines int) string {
	all := strings.SplitAfter(text, "\n")
	if len(all) <= lines {
		return text
	}
	return strings.Join(all[:lines], "") + fmt.Sprintf("… %d more lines\n", len(all)-lines)
}
