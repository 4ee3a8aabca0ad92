// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// faultWords break things, and look into proxies.
var faultWords = map[string]word{
	"unready": wordReady, "ready": wordReady, "crash": wordProcess, "end": wordProcess, "pause": wordProcess,
	"resume": wordProcess, "start": wordProcess, "cut": wordCut, "heal": wordCut, "capture": wordCapture,
	"captured": wordCaptured, "stat": wordStat, "in": wordIn, "proxy": wordProxy,
}

// wordReady tells the pods of a workload to be ready or not; they go on answering.
func wordReady(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	pods, err := s.Pods(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	n, err := s.number("pods", len(pods))
	if err != nil {
		return err
	}
	for _, pod := range pods[:min(n, len(pods))] {
		// From the pod's own loopback, which is not redirected.
		err := s.Exec(ctx, args[0], pod.Namespace+"/"+pod.Name, "app", nil, "echo", "get", "-X", "POST", "http://127.0.0.1:8080/control/"+s.verb)
		if err != nil {
			return err
		}
	}
	return nil
}

// wordProcess does to a process what its verb says.
func wordProcess(ctx context.Context, s *scene) error {
	args, rest, err := s.need(1)
	if err != nil {
		return err
	}
	if args[0] == "etcd" && s.etcd != nil {
		return s.etcdProcess(ctx, rest)
	}
	p, err := s.process(args[0], rest)
	if err != nil {
		return err
	}
	if c, ok := s.Controls()[args[0]]; ok && s.verb == "start" {
		took, err := c.Restart(ctx)
		s.out = fmt.Sprintf("ready after %v\n", took.Round(time.Millisecond))
		return err
	}
	return s.treat(p)
}

// treat does to one process what the verb says.
func (s *scene) treat(p *bed.Process) error {
	switch s.verb {
	case "crash":
		return p.Kill()
	case "end":
		return p.Stop(stage.Patience)
	case "pause":
		return p.Pause()
	case "resume":
		return p.Resume()
	}
	return p.Start()
}

// etcdProcess treats all members of the external etcd, or its leader: to start that is to
// start the members that do not run.
func (s *scene) etcdProcess(ctx context.Context, rest []string) error {
	members := s.etcd.Members
	switch {
	case len(rest) == 0:
	case rest[0] != "leader":
		return fmt.Errorf("etcd %q: want leader, or nothing for all members", rest)
	case s.verb == "start":
		members = slices.DeleteFunc(slices.Clone(members), (*bed.Process).Running)
	default:
		client, err := s.etcdClient(ctx)
		if err != nil {
			return err
		}
		defer client.Close()
		for i, endpoint := range s.etcd.Endpoints() {
			attempt, cancel := context.WithTimeout(ctx, stage.Patience)
			status, err := client.Status(attempt, endpoint)
			cancel()
			if err != nil {
				return err
			}
			if status.Leader == status.Header.MemberId {
				members, s.out = members[i:i+1], fmt.Sprintf("member %d\n", i+1)
				break
			}
		}
	}
	var errs []error
	for _, p := range members {
		errs = append(errs, s.treat(p))
	}
	return errors.Join(errs...)
}

// process finds a meshd by its name, or a part of a cluster's control plane, or etcd.
func (s *scene) process(name string, rest []string) (*bed.Process, error) {
	if c, ok := s.Controls()[name]; ok {
		return c.Process, nil
	}
	c, err := s.ClusterNamed(name)
	if err != nil {
		return nil, err
	}
	switch strings.Join(rest, " ") {
	case "apiserver":
		return c.APIServer, nil
	case "etcd":
		return c.Etcd, nil
	case "controllers":
		return c.ControllerManager, nil
	}
	return nil, fmt.Errorf("%s %q: want apiserver, etcd or controllers", name, rest)
}

// wordCut drops packets between two places, or lets them pass again.
func wordCut(_ context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	from, err1 := s.point(args[0])
	to, err2 := s.point(args[1])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	fault := bed.Fault{From: from, To: to}
	if s.verb == "heal" {
		return s.World.Heal(fault)
	}
	return s.World.Cut(fault)
}

// point is a meshd, a cluster's control plane, or a network.
func (s *scene) point(name string) (bed.Point, error) {
	if c, ok := s.Controls()[name]; ok {
		return c.Host, nil
	}
	if c, err := s.ClusterNamed(name); err == nil {
		return c.Namespace(), nil
	}
	if n, ok := s.Networks()[name]; ok {
		return n, nil
	}
	return nil, fmt.Errorf("there is no meshd, cluster or network %q", name)
}

func wordCapture(ctx context.Context, s *scene) (err error) {
	s.capture, err = s.World.CaptureTransit(ctx, "tcp port 15443")
	return err
}

func wordCaptured(ctx context.Context, s *scene) error {
	if s.capture == nil {
		return errors.New("nothing was captured")
	}
	if err := s.capture.Stop(); err != nil {
		return err
	}
	text, err := s.capture.Text(ctx)
	s.out = text
	return err
}

// wordStat matches lines of an Envoy's statistics.
func wordStat(ctx context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	want, err := regexp.Compile(`(?m)` + args[2])
	if err != nil {
		return err
	}
	stats, err := s.Envoy(ctx, args[0], args[1], "/stats")
	if err != nil {
		return err
	}
	found := want.FindAllString(stats, -1)
	if len(found) == 0 {
		return fmt.Errorf("no statistic matches %s", args[2])
	}
	s.out = strings.Join(found, "\n") + "\n"
	return nil
}

// wordProxy prints a page of an Envoy's administration, "/config_dump?include_eds" say.
func wordProxy(ctx context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	s.out, err = s.Envoy(ctx, args[0], args[1], args[2])
	return err
}

// wordIn runs a command in the app container of a workload's first pod, or on a VM.
func wordIn(ctx context.Context, s *scene) error {
	args, rest, err := s.need(2)
	if err != nil {
		return err
	}
	if vm, ok := s.VMs()[args[0]]; ok {
		out, err := vm.Run(ctx, strings.Join(s.args[1:], " "))
		s.out = string(out)
		return err
	}
	pod, err := s.FirstPod(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	var out bytes.Buffer
	err = s.Exec(ctx, args[0], pod, first(s.opts["container"], "app"), &out, rest...)
	s.out = out.String()
	return err
}
