// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// A story runs a dozen processes of two Kubernetes clusters on whatever machine there is,
// which may starve one of them for longer than any deadline. So a story that fails is told
// again, once and alone; one that passes then is counted and named as flaky, with what it
// said first. It is a bug all the same: of a story, of the bed, or of the mesh.

// mostAgain is how many stories may fail in one run for that; more are no accident.
const mostAgain = 2

// story is the prefix of the tests that are told again: nothing else is.
const story = "TestScripts/"

// again is what failed, if all of it may be run again.
func (t *tally) again() []failure {
	if len(t.failures) > mostAgain {
		return nil
	}
	for _, f := range t.failures {
		if f.panicked || f.name != "e2e" || !strings.HasPrefix(f.test, story) {
			return nil
		}
	}
	return t.failures
}

// runAgain runs stories one at a time; the error says which still fail.
func runAgain(ctx context.Context, t *tally, stories []failure) error {
	t.failures = nil
	var failed []error
	for _, f := range stories {
		fmt.Printf("again: %v\n", f)
		second := &tally{}
		name := strings.TrimPrefix(f.test, story)
		err := second.goTest(ctx, "-timeout=10m", "-count=1", "-run=^TestScripts$/^"+name+"$", "./e2e")
		t.settle(f, err == nil && second.passed == 1)
		if err != nil {
			failed = append(failed, fmt.Errorf("%v failed twice: %w", f, err))
		}
	}
	return errors.Join(failed...)
}

// settle counts a story that was run again.
func (t *tally) settle(f failure, passed bool) {
	if !passed {
		t.failures = append(t.failures, f)
		return
	}
	t.passed++
	t.flaky = append(t.flaky, f)
}
