// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/isthmus-mesh/isthmus/e2e/bed"
	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// play is what a story's words act on.
type play struct {
	*stage.Stage
	loads   map[string]*stage.Load
	capture *bed.Capture
	etcd    *bed.Etcd
	follows map[string]*stage.Follow
	shakes  map[string]handshakes
	front   *stage.Front
}

type key string

const stageKey = key("stage")

// words are the verbs of the scripts. Each prints the time it took, and leaves what it
// found in stdout for the next line to match. Options are written name=value.
//
//	cluster NAME [network=N] [pods=CIDR] [services=CIDR] [nodes=N] [region=R] [key=CLUSTER]
//	meshd NAME [FLAG…]                     a replica of the control service
//	join NAME [primary] [FLAG…]            mesh join cluster, from the laptop
//	mesh ARG… [code=N]                     anything else a person would type, and its exit code
//	kubectl CLUSTER ARG…
//	workload CLUSTER NS/NAME [port=NAME:N[:SPEAKS]]… [replicas=N] [headless] [statefulset] [gated] [inject=false] [export=false] [sa=A] [address=A] [clusterip=A]
//	     [version=V] [set=S: a label] [grace=DURATION: it serves on after SIGTERM]
//	apply CLUSTER FILE [inject]
//	call CLUSTER NS/APP URL [n=N] [want=CLUSTER] [some=CLUSTER] [FLAG…]
//	eventually WORD… [within=DURATION]     repeat a word until it succeeds
//	share CLUSTER MIN MAX                  share of the last call's answers
//	load start NAME CLUSTER NS/APP URL [rate=N] [FLAG…];  load stop NAME;  load cut NAME: it ended by itself, by a failure
//	unready, ready CLUSTER NS/APP [pods=N] their processes go on answering
//	crash, end, pause, resume, start WHAT  a meshd by name, or CLUSTER apiserver|etcd|controllers
//	cut, heal A B                          packets between two of: cluster, network or meshd
//	capture transit;  captured             what crossed, as text
//	stat CLUSTER NS/APP REGEXP             a line of the Envoy's /stats
func words() map[string]func(*testscript.TestScript, bool, []string) {
	commands := map[string]func(*testscript.TestScript, bool, []string){}
	for name, w := range vocabulary() {
		commands[name] = perform(name, w)
	}
	return commands
}

// vocabulary collects the words of all files.
func vocabulary() map[string]word {
	all := map[string]word{
		"cluster": wordCluster, "meshd": wordMeshd, "etcd": wordEtcd, "join": wordJoin, "mesh": wordMesh, "kubectl": wordKubectl,
		"workload": wordWorkload, "apply": wordApply, "call": wordCall, "share": wordShare, "load": wordLoad, "eventually": wordEventually,
	}
	for _, some := range []map[string]word{faultWords, trafficWords, machineWords, overlapWords, outageWords, hostileWords, replicaWords, rotationWords} {
		maps.Copy(all, some)
	}
	return all
}

// scene is one line of a script.
type scene struct {
	*play
	ts   *testscript.TestScript
	verb string
	args []string          // without options
	opts map[string]string // name=value
	many map[string][]string
	out  string // for stdout
}

type word func(ctx context.Context, s *scene) error

// perform turns a word into a command of testscript.
func perform(name string, w word) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		s := newScene(ts, name, args)
		start := time.Now()
		err := w(context.Background(), s)
		fmt.Fprint(ts.Stdout(), s.out)
		took := time.Since(start).Round(time.Millisecond)
		switch {
		case err == nil && neg:
			ts.Fatalf("%s succeeded, and must not (%v)\n%s", name, took, s.out)
		case err != nil && !neg:
			ts.Fatalf("%s: %v (%v)", name, err, took)
		case err != nil:
			ts.Logf("refused as it must be: %v (%v)", err, took)
		default:
			ts.Logf("(%v)", took)
		}
	}
}

var option = regexp.MustCompile(`^([a-z]+)=(.*)$`)

func newScene(ts *testscript.TestScript, verb string, args []string) *scene {
	s := &scene{play: ts.Value(stageKey).(*play), ts: ts, verb: verb, opts: map[string]string{}, many: map[string][]string{}}
	for _, arg := range args {
		if m := option.FindStringSubmatch(arg); m != nil {
			s.opts[m[1]] = m[2]
			s.many[m[1]] = append(s.many[m[1]], m[2])
			continue
		}
		s.args = append(s.args, arg)
	}
	return s
}

// need returns the first n arguments, and the rest.
func (s *scene) need(n int) ([]string, []string, error) {
	if len(s.args) < n {
		return nil, nil, fmt.Errorf("want %d arguments, got %q", n, s.args)
	}
	return s.args[:n], s.args[n:], nil
}

// pod takes the first two arguments, CLUSTER and NAMESPACE/APP, for a workload's first pod,
// "namespace/name".
func (s *scene) pod(ctx context.Context) (cluster, pod string, err error) {
	args, _, err := s.need(2)
	if err != nil {
		return "", "", err
	}
	pod, err = s.FirstPod(ctx, args[0], args[1])
	return args[0], pod, err
}

// control takes the first argument for the name of a replica of the control service.
func (s *scene) control(n int) (c *stage.Control, rest []string, err error) {
	args, _, err := s.need(n)
	if err != nil {
		return nil, nil, err
	}
	c, ok := s.Controls()[args[0]]
	if !ok {
		return nil, nil, fmt.Errorf("there is no meshd %q", args[0])
	}
	return c, s.args[1:], nil
}

// exited checks the exit code of a program against code=, or against what is usual.
func (s *scene) exited(code int, usual string) error {
	if want := first(s.opts["code"], usual); want != strconv.Itoa(code) {
		return fmt.Errorf("exit code %d, want %s\n%s", code, want, s.out)
	}
	return nil
}

// callFlags are those of `echo call` for a URL and the options n= and want=.
func (s *scene) callFlags(url string, more []string) []string {
	flags := append([]string{url, "-n", first(s.opts["n"], "1")}, more...)
	if want, ok := s.opts["want"]; ok {
		flags = append(flags, "--want", want)
	}
	return flags
}

func (s *scene) number(name string, otherwise int) (int, error) {
	text, ok := s.opts[name]
	if !ok {
		return otherwise, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("%s=%s: want a number", name, text)
	}
	return n, nil
}

func (s *scene) has(arg string) bool {
	for _, a := range s.args {
		if a == arg {
			return true
		}
	}
	return false
}

func wordCluster(ctx context.Context, s *scene) error {
	args, _, err := s.need(1)
	if err != nil {
		return err
	}
	config := stage.ClusterConfig{Network: s.opts["network"], Region: s.opts["region"], Zone: s.opts["zone"], KeyOf: s.opts["key"]}
	if config.Nodes, err = s.number("nodes", 1); err != nil {
		return err
	}
	for name, to := range map[string]*netip.Prefix{"pods": &config.Pods, "services": &config.Services} {
		if text, ok := s.opts[name]; ok {
			if *to, err = netip.ParsePrefix(text); err != nil {
				return fmt.Errorf("%s=%s: %w", name, text, err)
			}
		}
	}
	_, err = s.Cluster(ctx, args[0], config)
	return err
}

func wordMeshd(ctx context.Context, s *scene) error {
	args, flags, err := s.need(1)
	if err != nil {
		return err
	}
	_, err = s.Control(ctx, args[0], stage.ControlConfig{Flags: flags, Etcd: s.etcd, Front: s.front})
	return err
}

func wordEtcd(_ context.Context, s *scene) error {
	members, err := s.number("members", 1)
	if err != nil {
		return err
	}
	s.etcd, err = s.World.Etcd("etcd", members)
	return err
}

func wordJoin(ctx context.Context, s *scene) error {
	args, rest, err := s.need(1)
	if err != nil {
		return err
	}
	var flags []string
	for _, f := range rest {
		if f == "primary" {
			f = "--primary"
		}
		flags = append(flags, f)
	}
	s.out, err = s.Join(ctx, args[0], flags...)
	return err
}

func wordMesh(ctx context.Context, s *scene) error {
	r, err := s.Mesh(ctx, s.args...)
	s.out = r.Stdout + r.Stderr
	if err == nil {
		err = s.exited(r.Code, "0")
	}
	return err
}

func wordKubectl(ctx context.Context, s *scene) error {
	args, rest, err := s.need(1)
	if err != nil {
		return err
	}
	r, err := s.Kubectl(ctx, args[0], nil, rest...)
	s.out = r.Stdout
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("exit code %d\n%s", r.Code, r.Stderr)
	}
	return err
}

func wordWorkload(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	w := stage.Workload{
		Account: s.opts["sa"], Headless: s.has("headless"), StatefulSet: s.has("statefulset"), Gated: s.has("gated"),
		Inject: s.opts["inject"] != "false", Export: s.opts["export"] != "false",
		Address: s.opts["address"], ClusterIP: s.opts["clusterip"],
	}
	var ok bool
	if w.Namespace, w.Name, ok = strings.Cut(args[1], "/"); !ok {
		return fmt.Errorf("workload %q: want NAMESPACE/NAME", args[1])
	}
	if w.Replicas, err = s.number("replicas", 1); err != nil {
		return err
	}
	if v, ok := s.opts["version"]; ok {
		w.Labels = map[string]string{"version": v}
		w.Args = []string{"--version=" + v}
	}
	if set, ok := s.opts["set"]; ok {
		w.Labels = merged(w.Labels, map[string]string{"set": set})
	}
	if grace, ok := s.opts["grace"]; ok {
		serveOn, err := time.ParseDuration(grace)
		if err != nil {
			return fmt.Errorf("grace=%s: %w", grace, err)
		}
		w.Args = append(w.Args, "--grace="+grace)
		w.Grace = int(serveOn.Seconds()) + 5
	}
	for _, p := range s.many["port"] {
		port, err := stage.ParsePort(p)
		if err != nil {
			return err
		}
		w.Ports = append(w.Ports, port)
	}
	return s.Deploy(ctx, args[0], w)
}

func wordApply(ctx context.Context, s *scene) error {
	args, _, err := s.need(2)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(s.ts.MkAbs(args[1]))
	if err != nil {
		return err
	}
	return s.Apply(ctx, args[0], string(text), s.has("inject"))
}

func wordCall(ctx context.Context, s *scene) error {
	args, flags, err := s.need(3)
	if err != nil {
		return err
	}
	report, err := s.Call(ctx, args[0], args[1], s.callFlags(args[2], flags)...)
	if err != nil {
		return err
	}
	s.out = report.Text
	s.ts.Setenv("LAST_CALL", report.Text)
	if some, ok := s.opts["some"]; ok && report.Err == nil && !strings.Contains(firstLine(report.Text), " "+some+" ") {
		return fmt.Errorf("no answer came from %s:\n%s", some, report.Text)
	}
	return report.Err
}

// wordShare checks what share of the last call's answers came from a cluster.
func wordShare(_ context.Context, s *scene) error {
	args, _, err := s.need(3)
	if err != nil {
		return err
	}
	low, err1 := strconv.ParseFloat(args[1], 64)
	high, err2 := strconv.ParseFloat(args[2], 64)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	line := firstLine(s.ts.Getenv("LAST_CALL"))
	var all, own int
	if _, err := fmt.Sscanf(line, "%d answers:", &all); err != nil || all == 0 {
		return fmt.Errorf("the last call has no answers: %q", line)
	}
	if m := regexp.MustCompile(`\b` + regexp.QuoteMeta(args[0]) + ` (\d+)`).FindStringSubmatch(line); m != nil {
		own, _ = strconv.Atoi(m[1])
	}
	share := float64(own) / float64(all)
	s.ts.Logf("share of %s: %.3f", args[0], share)
	if share < low || share > high {
		return fmt.Errorf("share of %s is %.3f, want %v to %v: %s", args[0], share, low, high, line)
	}
	return nil
}

func wordLoad(ctx context.Context, s *scene) error {
	args, rest, err := s.need(2)
	if err != nil {
		return err
	}
	if s.loads == nil {
		s.loads = map[string]*stage.Load{}
	}
	switch args[0] {
	case "start":
		if len(rest) < 3 {
			return fmt.Errorf("want load start NAME CLUSTER NS/APP URL, got %q", s.args)
		}
		flags := append([]string{rest[2], "--rate", first(s.opts["rate"], "20")}, rest[3:]...)
		if c, ok := s.opts["c"]; ok {
			flags = append(flags, "-c", c)
		}
		s.loads[args[1]], err = s.Load(ctx, rest[0], rest[1], flags...)
		return err
	case "stop", "cut":
		l, ok := s.loads[args[1]]
		if !ok {
			return fmt.Errorf("there is no load %q", args[1])
		}
		end := l.Stop
		if args[0] == "cut" {
			end = l.Ended
		}
		report, err := end()
		s.out = report.Text
		s.ts.Logf("%s", report.Text)
		if args[0] == "cut" && err == nil && report.Err == nil {
			return errors.New("it ended without a failure")
		} else if args[0] == "cut" {
			return err
		}
		return errors.Join(err, report.Err)
	}
	return fmt.Errorf("load %s: want start, stop or cut", args[0])
}

// wordEventually repeats another word until it succeeds (with ! before it: until it is
// refused), and with match=REGEXP until what it found matches too.
func wordEventually(ctx context.Context, s *scene) error {
	args := s.args
	neg := len(args) > 0 && args[0] == "!"
	if neg {
		args = args[1:]
	}
	if len(args) == 0 {
		return errors.New("want a word to repeat")
	}
	w, ok := vocabulary()[args[0]]
	if !ok {
		return fmt.Errorf("there is no word %s", args[0])
	}
	matching, err := regexp.Compile(s.opts["match"])
	if err != nil {
		return err
	}
	patience := stage.Patience
	if text, ok := s.opts["within"]; ok {
		if patience, err = time.ParseDuration(text); err != nil {
			return fmt.Errorf("within=%s: %w", text, err)
		}
	}
	inner := *s
	inner.verb, inner.args = args[0], args[1:]
	took, err := stage.Until(ctx, patience, func() error {
		err := w(ctx, &inner)
		switch {
		case neg && err == nil:
			return fmt.Errorf("%s still succeeds:\n%s", args[0], inner.out)
		case neg:
			return nil
		case err == nil && !matching.MatchString(inner.out):
			return fmt.Errorf("no match for %q in:\n%s", s.opts["match"], inner.out)
		}
		return err
	})
	s.out = inner.out
	s.ts.Logf("%s: after %v", strings.Join(s.args, " "), took.Round(time.Millisecond))
	return err
}

func merged(several ...map[string]string) map[string]string {
	all := map[string]string{}
	for _, m := range several {
		maps.Copy(all, m)
	}
	return all
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}
