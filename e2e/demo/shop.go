// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
)

// shop is the demo's plot.
type shop struct {
	*stage.Stage
	teller *teller
}

func (s *shop) clusters(ctx context.Context) error {
	for _, name := range []string{"east", "west"} {
		start := time.Now()
		network := map[string]string{"east": "n1", "west": "n2"}[name]
		c, err := s.Cluster(ctx, name, stage.ClusterConfig{Network: network, Region: name})
		if err != nil {
			return err
		}
		s.teller.note("%s  network %s, pods %s, API server %s  (%.1fs)", name, network, c.Network().Pods(), c.URL(), time.Since(start).Seconds())
	}
	return nil
}

func (s *shop) control(ctx context.Context) error {
	c, err := s.Control(ctx, "hub", stage.ControlConfig{})
	if err != nil {
		return err
	}
	s.teller.command(fmt.Sprintf("meshd --data-dir /var/lib/meshd --advertise %s:15012", c.Host.Addr()), "")
	return nil
}

// mesh runs a command on the laptop and shows it.
func (s *shop) mesh(ctx context.Context, line string) error {
	out, err := s.MustMesh(ctx, strings.Fields(line)...)
	s.teller.command("mesh "+line, out)
	return err
}

func (s *shop) join(ctx context.Context) error {
	for _, line := range []string{
		"join cluster east --context east --network n1 --primary --yes",
		"join cluster west --context west --network n2 --yes",
		"clusters",
	} {
		if err := s.mesh(ctx, line); err != nil {
			return err
		}
	}
	return nil
}

func (s *shop) open(ctx context.Context) error {
	http := []stage.WorkloadPort{{Name: "http", Port: 80, Target: 8080}}
	for _, w := range []struct {
		cluster string
		stage.Workload
	}{
		{"east", stage.Workload{Name: "catalogue", Replicas: 2, Ports: http}},
		{"west", stage.Workload{Name: "catalogue", Replicas: 2, Ports: http}},
		{"west", stage.Workload{Name: "payments", Ports: http}},
		{"east", stage.Workload{Name: "web", Ports: http, Command: []string{
			"shop", "catalogue=http://catalogue.shop/", "payments=http://payments.shop/", "stock=http://stock.shop/",
		}}},
	} {
		w.Namespace, w.Inject, w.Export = "shop", true, true
		if err := s.Deploy(ctx, w.cluster, w.Workload); err != nil {
			return err
		}
		s.teller.command(fmt.Sprintf("mesh inject -f %s.yaml | kubectl --context %s apply -f -", w.Name, w.cluster), "")
	}
	return nil
}

func (s *shop) machine(ctx context.Context) error {
	vm, err := s.VM(ctx, "stock-1", "n1")
	if err != nil {
		return err
	}
	if err := s.Serve(vm, "serve", "--http", "8080"); err != nil {
		return err
	}
	out, err := s.Onboard(ctx, "stock-1", "--service", "shop/stock", "--port", "80:8080/HTTP")
	if err != nil {
		return err
	}
	line, _, _ := strings.Cut(out, "\n")
	s.teller.command("mesh vm onboard stock-1 --network n1 --service shop/stock --port 80:8080/HTTP", "")
	s.teller.note("pasted on the machine: %.60s…", line)
	if err := s.settle(ctx, map[string]string{"stock": ""}); err != nil {
		return err
	}
	return s.mesh(ctx, "vm list")
}

// answer is what the front end says about one of its services.
type answer struct {
	Name   string
	Answer struct{ Cluster, Pod, Peer string }
	Err    string `json:"error"`
}

// ask asks the front end, on its own loopback.
func (s *shop) ask(ctx context.Context) ([]answer, error) {
	pod, err := s.FirstPod(ctx, "east", "shop/web")
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := s.Exec(ctx, "east", pod, "app", &out, "echo", "get", "http://127.0.0.1:8080/json"); err != nil {
		return nil, err
	}
	var answers []answer
	return answers, json.Unmarshal(out.Bytes(), &answers)
}

// expect asks and compares where the answers came from.
func (s *shop) expect(ctx context.Context, want map[string]string) error {
	answers, err := s.ask(ctx)
	if err != nil {
		return err
	}
	for _, a := range answers {
		cluster, asked := want[a.Name]
		switch {
		case !asked:
		case a.Err != "":
			return fmt.Errorf("%s: %s", a.Name, a.Err)
		case a.Answer.Cluster != cluster:
			return fmt.Errorf("%s answered from %q, want %q", a.Name, a.Answer.Cluster, cluster)
		}
	}
	return nil
}

// settle waits until everything answers from where it should, some times in a row: while
// only some pods of a service have changed, some requests still go elsewhere.
func (s *shop) settle(ctx context.Context, want map[string]string) error {
	took, err := stage.Until(ctx, stage.Patience, func() error {
		for range 15 {
			if err := s.expect(ctx, want); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && took > time.Second {
		s.teller.note("settled after %.1fs", took.Seconds())
	}
	return err
}

// show asks many times, and prints who answered.
func (s *shop) show(ctx context.Context, want map[string]string) error {
	if err := s.settle(ctx, want); err != nil {
		return err
	}
	const times = 20
	counts := map[string]map[string]int{}
	for range times {
		answers, err := s.ask(ctx)
		if err != nil {
			return err
		}
		for _, a := range answers {
			if a.Err != "" {
				return fmt.Errorf("%s: %s", a.Name, a.Err)
			}
			if cluster := want[a.Name]; a.Answer.Cluster != cluster {
				return fmt.Errorf("%s answered from %q, want %q", a.Name, a.Answer.Cluster, cluster)
			}
			if counts[a.Name] == nil {
				counts[a.Name] = map[string]int{}
			}
			counts[a.Name][place(a)]++
		}
	}
	for _, name := range []string{"catalogue", "payments", "stock"} {
		for where, n := range counts[name] {
			s.teller.note("%-10s %2d of %d answers from %s", name, n, times, where)
		}
	}
	return nil
}

func place(a answer) string {
	if a.Answer.Cluster == "" {
		return "virtual machine " + a.Answer.Pod
	}
	return "cluster " + a.Answer.Cluster
}

func (s *shop) visit(ctx context.Context) error {
	return s.show(ctx, map[string]string{"catalogue": "east", "payments": "west", "stock": ""})
}

// failover lets the local catalogue fail its readiness while it still answers, so that only
// configuration can move the traffic.
func (s *shop) failover(ctx context.Context) error {
	if err := s.tellCatalogue(ctx, "unready"); err != nil {
		return err
	}
	return s.show(ctx, map[string]string{"catalogue": "west", "payments": "west", "stock": ""})
}

func (s *shop) recover(ctx context.Context) error {
	if err := s.tellCatalogue(ctx, "ready"); err != nil {
		return err
	}
	// With one pod back and one not, some requests would still leave, as they should.
	if err := s.WaitPods(ctx, "east", "shop/catalogue", 2); err != nil {
		return err
	}
	return s.show(ctx, map[string]string{"catalogue": "east", "payments": "west", "stock": ""})
}

func (s *shop) tellCatalogue(ctx context.Context, what string) error {
	pods, err := s.Pods(ctx, "east", "shop/catalogue")
	if err != nil {
		return err
	}
	for _, p := range pods {
		url := "http://127.0.0.1:8080/control/" + what
		if err := s.Exec(ctx, "east", "shop/"+p.Name, "app", nil, "echo", "get", "-X", "POST", url); err != nil {
			return err
		}
	}
	s.teller.note("both of its pods say that they are %s; their processes go on answering", what)
	return nil
}

// invite opens the way in for a second terminal and prints what to try there.
func (s *shop) invite(ctx context.Context) error {
	access, err := s.OpenDoors(ctx, "east", "shop/web", 8080)
	if err != nil {
		return err
	}
	s.teller.say(fmt.Sprintf(`
All of it is running. In a second terminal:

   export KUBECONFIG=%s MESH_CONFIG=%s PATH=%s:$PATH
   mesh clusters
   mesh services
   mesh check
   kubectl --context west -n shop get pods
   kubectl --context east -n shop scale deployment catalogue --replicas 0

The shop's page: http://%s

Ctrl-C removes all of it.`, access.Kubeconfig, access.MeshConfig, access.Programs, access.Page))
	_ = os.Stdout.Sync()
	return nil
}
