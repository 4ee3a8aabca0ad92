// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/e2e/stage"
	"github.com/isthmus-mesh/isthmus/registry/etcd"
)

// fleet is services with pods that exist in the API server alone: what meshd sees of a
// cluster does not depend on whether its pods run.
type fleet struct {
	prefix    string // of the services' names
	services  int
	endpoints int // of each
	sliced    int // how many of them are in the slice already; 0 means all
}

// The shape of a fleet.
const (
	fleetNamespaces = 20
	fleetNode       = "fleet-node"
	fleetPort       = 8080
	fillers         = 16 // requests at once
)

func (f fleet) namespace(service int) string { return fmt.Sprintf("team-%d", service%fleetNamespaces) }
func (f fleet) name(service int) string      { return fmt.Sprintf("%s-%d", f.prefix, service) }

func (f fleet) podName(service, endpoint int) string {
	return fmt.Sprintf("%s-7d9f8c6b5-%05d", f.name(service), endpoint)
}

func (f fleet) uid(service, endpoint int) types.UID {
	h := fnv.New32a()
	h.Write([]byte(f.prefix))
	return types.UID(fmt.Sprintf("%08x-0000-4000-8000-%012x", h.Sum32(), service*f.endpoints+endpoint))
}

// address of a pod, in a range that the network's own pods do not use.
func (f fleet) address(service, endpoint int) netip.Addr {
	n := service*f.endpoints + endpoint
	return netip.AddrFrom4([4]byte{10, byte(128 + n>>16), byte(n >> 8), byte(n)})
}

// quick is a client that the API server's answers alone hold up.
func quick(config *rest.Config) (kubernetes.Interface, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = -1, 0
	config.ContentType = "application/vnd.kubernetes.protobuf"
	return kubernetes.NewForConfig(config)
}

// fill creates the fleet. Services and endpoint slices go through the API server; pods, of
// which there are many, go into its etcd, as it would have written them.
func (f fleet) fill(ctx context.Context, c *stage.Cluster) error {
	client, err := quick(c.Config())
	if err != nil {
		return err
	}
	etcd, err := storage(c)
	if err != nil {
		return err
	}
	defer etcd.Close()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fleetNode, Labels: map[string]string{
		corev1.LabelTopologyRegion: "eu", corev1.LabelTopologyZone: "eu-1",
	}}}
	if _, err := client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{}); err != nil {
		return err
	}
	for i := range min(fleetNamespaces, f.services) {
		namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: f.namespace(i)}}
		if _, err := client.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range fillers {
		group.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= f.services {
					return nil
				}
				if err := f.fillService(ctx, client, etcd, i); err != nil {
					return fmt.Errorf("service %s: %w", f.name(i), err)
				}
			}
		})
	}
	return group.Wait()
}

// storage is the etcd of a cluster's API server, which listens inside its host alone.
func storage(c *stage.Cluster) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints: []string{"127.0.0.1:2379"}, DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return c.Namespace().Dial(ctx, "tcp", address)
		})},
	})
}

func (f fleet) fillService(ctx context.Context, client kubernetes.Interface, etcd *clientv3.Client, i int) error {
	namespace, name := f.namespace(i), f.name(i)
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: map[string]string{"app": name}},
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, TargetPort: intstr.FromInt32(fleetPort)},
		}},
	}
	if _, err := client.CoreV1().Services(namespace).Create(ctx, service, metav1.CreateOptions{}); err != nil {
		return err
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: name + "-x1", Namespace: namespace, Labels: map[string]string{
			discoveryv1.LabelServiceName: name, discoveryv1.LabelManagedBy: "bench",
		}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(fleetPort)), Protocol: new(corev1.ProtocolTCP)}},
	}
	for e := range f.endpoints {
		pod := f.pod(i, e)
		value, err := stored(pod)
		if err != nil {
			return err
		}
		// One by one: an API server takes two objects of one revision for one.
		if _, err := etcd.Put(ctx, "/registry/pods/"+namespace+"/"+pod.Name, value); err != nil {
			return err
		}
		if f.sliced == 0 || e < f.sliced {
			slice.Endpoints = append(slice.Endpoints, f.endpoint(i, e))
		}
	}
	_, err := client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, slice, metav1.CreateOptions{})
	return err
}

// pod is one that runs, as injection leaves it.
func (f fleet) pod(i, e int) *corev1.Pod {
	name, address := f.name(i), f.address(i, e).String()
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Name: f.podName(i, e), Namespace: f.namespace(i),
			UID: f.uid(i, e), CreationTimestamp: metav1.Now(),
			Labels: map[string]string{"app": name, "version": "v1", "pod-template-hash": "7d9f8c6b5", "isthmus-mesh.io/proxy": "sidecar"},
		},
		Spec: corev1.PodSpec{
			NodeName: fleetNode, ServiceAccountName: name, RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSClusterFirst,
			Containers: []corev1.Container{{Name: "app", Image: "isthmus/echo:dev"}, {Name: "isthmus-proxy", Image: "isthmus/proxy:dev"}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: address, PodIPs: []corev1.PodIP{{IP: address}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
}

// endpoint is a pod as a slice has it.
func (f fleet) endpoint(i, e int) discoveryv1.Endpoint {
	return discoveryv1.Endpoint{
		Addresses:  []string{f.address(i, e).String()},
		Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
		TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: f.namespace(i), Name: f.podName(i, e), UID: f.uid(i, e)},
		NodeName:   new(fleetNode), Zone: new("eu-1"),
	}
}

// stored is an object in the form in which API servers keep it.
func stored(pod *corev1.Pod) (string, error) {
	var b strings.Builder
	err := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(pod, &b)
	return b.String(), err
}

// arrive waits until meshd has stored that many of the services and pods (or, since several
// pods share a key, all but the last few).
func arrive(ctx context.Context, look peek, services, pods int) error {
	return until(ctx, 200*time.Millisecond, func() (bool, error) {
		workloads, err := look.count(ctx, "workloads/")
		if err != nil {
			return false, err
		}
		// A record is a head and at least one slice.
		records, err := look.count(ctx, "records/")
		bundles := (pods + etcd.WorkloadsPerKey - 1) / etcd.WorkloadsPerKey
		if err == nil && (workloads < bundles || records < 2*services) {
			err = fmt.Errorf("meshd has stored %d of %d keys of pods, %d of %d of services", workloads, bundles, records, 2*services)
		}
		return err == nil, err
	})
}

// member makes a cluster, joins it, and fills it. Its controllers are stopped before,
// because they would tidy up pods of a node that does not answer.
func (b *bench) member(ctx context.Context, s *stage.Stage, name string, f fleet) (*stage.Cluster, error) {
	c, err := s.Cluster(ctx, name, stage.ClusterConfig{Network: name + "-net"})
	if err != nil {
		return nil, err
	}
	if _, err := s.Join(ctx, name, "--no-gateway", "--no-wait"); err != nil {
		return nil, err
	}
	if err := c.ControllerManager.Kill(); err != nil {
		return nil, err
	}
	start := time.Now()
	if err := f.fill(ctx, c); err != nil {
		return nil, fmt.Errorf("fill %s: %w", name, err)
	}
	b.say("filled %s with %d services of %d endpoints in %.1f s", name, f.services, f.endpoints, time.Since(start).Seconds())
	return c, nil
}

// playFleet measures a meshd with 1,000 services of 10 endpoints.
func playFleet(ctx context.Context, b *bench) error {
	return b.stage(func(s *stage.Stage) error {
		hub, err := s.Control(ctx, "hub", stage.ControlConfig{})
		if err != nil {
			return err
		}
		empty, err := b.measure(ctx, hub, "an empty meshd")
		if err != nil {
			return err
		}
		look, err := newPeek(hub)
		if err != nil {
			return err
		}
		defer look.client.Close()
		f := fleet{prefix: "svc", services: 1000, endpoints: 10}
		east, err := b.member(ctx, s, "east", f)
		if err != nil {
			return err
		}
		if err := arrive(ctx, look, f.services, f.services*f.endpoints); err != nil {
			return err
		}
		full, err := b.measure(ctx, hub, "with the fleet")
		if err != nil {
			return err
		}
		if err := b.viewer(ctx, s, east); err != nil {
			return err
		}
		viewed, err := b.measure(ctx, hub, "with a proxy that sees it")
		if err != nil {
			return err
		}
		b.report("memory-1000x10-mib", full.resident-empty.resident,
			"resident set of meshd with its embedded etcd: %.0f MiB, %.0f when empty, %.0f at its peak; live heap %.0f MiB, %.0f when empty; services read from a real API server, no proxies; with one sidecar that sees all of them %.0f MiB, live heap %.0f",
			full.resident, empty.resident, full.peak, full.heap, empty.heap, viewed.resident, viewed.heap)
		if err := b.changes(ctx, hub, look, east, f); err != nil {
			return err
		}
		return b.restarts(ctx, hub, east, f)
	})
}

// viewer runs a pod whose proxy is sent everything. Its cluster's controllers run for as
// long as that takes.
func (b *bench) viewer(ctx context.Context, s *stage.Stage, c *stage.Cluster) error {
	if err := c.ControllerManager.Start(); err != nil {
		return err
	}
	if err := s.Deploy(ctx, c.Name(), stage.Workload{Namespace: "bench", Name: "viewer", Inject: true}); err != nil {
		return err
	}
	return c.ControllerManager.Kill()
}

// changes measures what one endpoint's change costs etcd.
func (b *bench) changes(ctx context.Context, hub *stage.Control, look peek, c *stage.Cluster, f fleet) error {
	client, err := quick(c.Config())
	if err != nil {
		return err
	}
	etcd, err := storage(c)
	if err != nil {
		return err
	}
	defer etcd.Close()
	large := fleet{prefix: "large", services: 1, endpoints: 100}
	if err := large.fillService(ctx, client, etcd, 0); err != nil {
		return err
	}
	if err := arrive(ctx, look, f.services+1, f.services*f.endpoints+large.endpoints); err != nil {
		return err
	}
	const changes = 50
	small, err := b.flip(ctx, hub, look, client, f, changes)
	if err != nil {
		return err
	}
	big, err := b.flip(ctx, hub, look, client, large, changes)
	if err != nil {
		return err
	}
	worst := small
	if big.bytes > worst.bytes {
		worst = big
	}
	b.report("etcd-bytes-per-change", worst.bytes, "an endpoint becomes ready or unready, median of %d times: %.0f bytes of keys and values for a service of %d endpoints, %.0f for one of %d; as meshd counts them",
		changes, small.bytes, f.endpoints, big.bytes, large.endpoints)
	b.report("etcd-txn-per-change", max(small.transactions, big.transactions), "the same changes, median; etcd's own revision rose by %.2f and %.2f a change on average, and by %d in 5 s without one",
		small.revisions, big.revisions, small.idle)
	return nil
}

// cost is what one change costs etcd: bytes and transactions are medians, so that what
// meshd writes for itself now and then is not counted; revisions are the average of all.
type cost struct {
	bytes, transactions, revisions float64
	idle                           int64 // revisions while nothing changed
}

// flip changes the readiness of endpoints, one after the other, and waits for each.
func (b *bench) flip(ctx context.Context, hub *stage.Control, look peek, client kubernetes.Interface, f fleet, n int) (cost, error) {
	var total cost
	quiet, err := look.revision(ctx)
	if err != nil {
		return total, err
	}
	if err := pause(ctx, 5*time.Second); err != nil {
		return total, err
	}
	revision, err := look.revision(ctx)
	if err != nil {
		return total, err
	}
	total.idle = revision - quiet
	bytes, transactions, err := written(ctx, hub)
	if err != nil {
		return total, err
	}
	var eachBytes, eachTransactions []float64
	first := revision
	for i := range n {
		service := i % f.services
		slices := client.DiscoveryV1().EndpointSlices(f.namespace(service))
		slice, err := slices.Get(ctx, f.name(service)+"-x1", metav1.GetOptions{})
		if err != nil {
			return total, err
		}
		conditions := &slice.Endpoints[i%f.endpoints].Conditions
		ready := !*conditions.Ready
		conditions.Ready, conditions.Serving = &ready, &ready
		if _, err := slices.Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
			return total, err
		}
		before := revision
		if err := until(ctx, 5*time.Millisecond, func() (bool, error) {
			revision, err = look.revision(ctx)
			return revision > before, err
		}); err != nil {
			return total, fmt.Errorf("change %d of %s does not arrive: %w", i, f.name(service), err)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil { // for what may follow
			return total, err
		}
		if revision, err = look.revision(ctx); err != nil {
			return total, err
		}
		nowBytes, nowTransactions, err := written(ctx, hub)
		if err != nil {
			return total, err
		}
		eachBytes, eachTransactions = append(eachBytes, nowBytes-bytes), append(eachTransactions, nowTransactions-transactions)
		bytes, transactions = nowBytes, nowTransactions
	}
	total.bytes, total.transactions = quantile(eachBytes, 0.5), quantile(eachTransactions, 0.5)
	total.revisions = float64(revision-first) / float64(n)
	return total, nil
}

// written is what meshd has written to etcd so far.
func written(ctx context.Context, hub *stage.Control) (bytes, transactions float64, err error) {
	bytes, err1 := hub.Metric(ctx, "isthmus_store_written_bytes_total")
	transactions, err2 := hub.Metric(ctx, "isthmus_store_transactions_total")
	return bytes, transactions, errors.Join(err1, err2)
}

// restarts measures how long a meshd that was killed takes to be ready, while its member
// does not answer.
func (b *bench) restarts(ctx context.Context, hub *stage.Control, member *stage.Cluster, f fleet) error {
	took := map[string][]float64{}
	for _, away := range []struct {
		how  string
		make func() error
	}{
		{"paused", member.APIServer.Pause}, {"killed", member.APIServer.Kill},
	} {
		if err := away.make(); err != nil {
			return err
		}
		for range 3 {
			if err := hub.Process.Kill(); err != nil {
				return err
			}
			start := time.Now()
			if err := hub.Process.Start(); err != nil {
				return err
			}
			if err := until(ctx, 5*time.Millisecond, func() (bool, error) {
				status, body, err := hub.Host.Get(ctx, "http://127.0.0.1:15014/readyz?verbose")
				if err == nil && status != 200 {
					err = fmt.Errorf("/readyz: %d\n%s", status, body)
				}
				return err == nil, err
			}); err != nil {
				return err
			}
			took[away.how] = append(took[away.how], time.Since(start).Seconds())
		}
	}
	worst := max(quantile(took["paused"], 1), quantile(took["killed"], 1))
	b.report("ready-members-dead-s", worst, "kill -9, then start until /readyz says ok, the slowest of 3 each: API server paused %.2f, killed %.2f s; %d services of %d endpoints",
		took["paused"], took["killed"], f.services, f.endpoints)
	return nil
}

// playClusters measures what each further cluster of 500 services of 5 endpoints takes.
func playClusters(ctx context.Context, b *bench) error {
	return b.stage(func(s *stage.Stage) error {
		hub, err := s.Control(ctx, "hub", stage.ControlConfig{})
		if err != nil {
			return err
		}
		look, err := newPeek(hub)
		if err != nil {
			return err
		}
		defer look.client.Close()
		const more = 3
		var first, last memory
		services := 0
		for i := range 1 + more {
			f := fleet{prefix: fmt.Sprintf("c%d", i), services: 500, endpoints: 5}
			if i%2 == 1 {
				f.prefix = fmt.Sprintf("c%d", i-1) // every second one has the services of the one before
			}
			if _, err := b.member(ctx, s, fmt.Sprintf("cluster-%d", i), f); err != nil {
				return err
			}
			services += f.services
			if err := arrive(ctx, look, services, services*f.endpoints); err != nil {
				return err
			}
			if last, err = b.measure(ctx, hub, fmt.Sprintf("with %d clusters", i+1)); err != nil {
				return err
			}
			if i == 0 {
				first = last
			}
		}
		b.report("memory-per-cluster-mib", (last.resident-first.resident)/more,
			"resident set of meshd from 1 cluster (%.0f MiB) to %d (%.0f MiB), 500 services of 5 endpoints each, half of them of the same names; live heap %.1f MiB a cluster; no proxies",
			first.resident, 1+more, last.resident, (last.heap-first.heap)/more)
		return nil
	})
}
